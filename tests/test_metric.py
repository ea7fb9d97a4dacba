"""Squared Euclidean distances, picks that go on from others, and a number of picks for each set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from everywhere import WHERE
from oracle import Select
from problems import random_case, spoil
from torch import Tensor

from fcn_kernels import CoresetState, coreset_select
from reference.listing import coreset_listing

METRICS = ("cosine", "sqeuclidean")
F64 = torch.float64


def state(select: Select, *args: Any, **options: Any) -> CoresetState:
    found = select(*args, return_min_distances=True, **options)
    assert isinstance(found, CoresetState)
    return found


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("noise", [None, 1.0])
def test_the_state_is_the_references(metric: str, noise: float | None, select: Select) -> None:
    case = random_case(2, 13, 6, 4, noise=noise, duplicates=True)
    case = case.with_options(min_distances=torch.rand(2, 13, generator=torch.Generator().manual_seed(1)) * 2)
    exact = case.cast(F64)
    for options in ({}, {"min_distances": case.options["min_distances"]}):
        given = {**options, "noise": case.options.get("noise"), "metric": metric}
        got = state(select, case.features, 4, case.quality, 0.5, **given)
        wide = {name: value.to(F64) if isinstance(value, Tensor) else value for name, value in given.items()}
        want = coreset_listing(exact.features, exact.quality, 4, 0.5, return_min_distances=True, **wide)
        assert torch.equal(got.indices, want.indices)
        torch.testing.assert_close(got.min_distances.double(), want.min_distances, rtol=1e-4, atol=1e-5)
        mine, theirs = (first_of_equals(one.nearest, case.features, one.indices) for one in (got, want))
        assert torch.equal(mine, theirs)


def first_of_equals(nearest: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """Rounding can set copies of a pick apart: of picks that are copies the first is meant."""
    for b, picks in enumerate(indices.tolist()):
        for j, pick in enumerate(picks):
            for i in range(j):
                if torch.equal(rows[b, picks[i]], rows[b, pick]):
                    nearest[b][nearest[b] == j] = i
    return nearest


@pytest.mark.parametrize(
    ("metric", "distinct", "noisy"),
    [("cosine", False, True), ("cosine", True, False), ("sqeuclidean", True, True), ("sqeuclidean", False, False)],
)
def test_a_selection_goes_on_where_it_stopped(metric: str, distinct: bool, noisy: bool, select: Select) -> None:
    """k picks and then k' more are k + k' picks of one call, bit for bit, also among duplicates."""
    case = random_case(2, 14, 6, 9, noise=0.5 if noisy else None, duplicates=True)
    noise = case.options.get("noise")
    options = {"metric": metric, "distinct": distinct}

    def go(k: int, at: slice, known: Tensor | None = None) -> CoresetState:
        given = None if noise is None else noise[at]
        return state(select, case.features, k, case.quality, 0.5, noise=given, min_distances=known, **options)

    whole, first = go(9, slice(9)), go(6, slice(6))
    more = go(3, slice(6, 9), first.min_distances)
    assert torch.equal(torch.cat([first.indices, more.indices], 1), whole.indices)
    assert torch.equal(torch.cat([first.distances, more.distances], 1), whole.distances)
    assert torch.equal(more.min_distances, whole.min_distances)
    assert torch.equal(torch.where(more.nearest < 0, first.nearest, more.nearest + 6), whole.nearest)
    assert (whole.min_distances == -torch.inf).sum() == 18 * distinct


@pytest.mark.parametrize("metric", METRICS)
def test_a_number_for_each_set_is_a_call_for_each(metric: str, select: Select) -> None:
    case = random_case(4, 9, 5, 4, noise=0.5)
    each = [3, 4, 0, 1]
    got = state(select, case.features, each, case.quality, 0.5, noise=case.options["noise"], metric=metric)
    assert got.counts.tolist() == each
    for b, k in enumerate(each):
        assert (got.indices[b, k:] == -1).all()
        assert not got.features[b, k:].any()
        assert not got.distances[b, k:].any()
        if k:
            noise = case.options["noise"][:k, b]
            alone = state(select, case.features[b], k, case.quality[b], 0.5, noise=noise, metric=metric)
            for mine, theirs in zip(got, alone, strict=True):
                assert torch.equal(mine[b][:k] if mine[b].ndim and len(mine[b]) == 4 else mine[b], theirs)
    assert (got.min_distances[2] == torch.inf).all()
    assert (got.nearest[2] == -1).all()


def test_no_picks_of_any_set(select: Select) -> None:
    rows = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    noise = torch.zeros(0, 2, 9)
    for k, options in (([0, 0], {}), (torch.tensor([0, 0]), {"noise": noise}), ([0, 0], {"anchors": rows[0, :2]})):
        found = state(select, rows, k, **options)
        assert [tuple(t.shape) for t in found] == [(2, 0, 4), (2, 0), (2,), (2, 0), (2, 9), (2, 9)]
        assert (found.nearest == -1).all()
        found.features.sum().backward()
    assert not rows.grad.any()  # type: ignore[union-attr]
    assert select(rows[0], [0]).features.shape == (0, 4)


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_of_sets_with_numbers_of_their_own(metric: str, select: Select) -> None:
    case = random_case(3, 9, 5, 4, noise=0.5)
    features = case.features.requires_grad_()
    options = {"metric": metric, "noise": case.options["noise"]}
    found = select(features, [2, 4, 1], case.quality, 0.5, **options)
    (got,) = torch.autograd.grad(found.features.sum(), features)
    for b, k in enumerate((2, 4, 1)):
        alone = select(features[b], k, case.quality[b], 0.5, metric=metric, noise=options["noise"][:k, b])
        (want,) = torch.autograd.grad(alone.features.sum(), features)
        torch.testing.assert_close(got[b], want[b], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_rows_that_cannot_be_picked_have_no_distance(metric: str, select: Select) -> None:
    case = spoil(random_case(2, 14, 5, 3), seed=3)
    got = state(select, case.features, 3, case.quality, 0.5, metric=metric)
    bad = ~case.features.isfinite().all(-1) | ~((case.quality > 0) & case.quality.isfinite())
    if metric == "cosine":
        bad |= ~case.features.any(-1)
    assert bad.any()
    assert (got.min_distances[bad] == 0).all()
    assert (got.nearest[bad] == -1).all()
    assert (got.nearest[~bad] >= 0).all()


def test_a_negative_quality_is_no_distance_below_0(select: Select) -> None:
    rows, quality = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[1.0, -1, 1, 1]])
    got = state(select, rows, 2, quality, 1.0, anchors=rows[0, :1])
    assert got.min_distances[0, 1] == 0
    assert got.nearest[0, 1] == -1


def test_squared_distances_far_from_the_origin(where: str, select: Select) -> None:
    """float32 picks are those of float64: distances are made of differences, duplicates are 0 apart, zeros are rows."""
    generator = torch.Generator().manual_seed(0)
    slow = where.startswith("triton")
    count, k = (24, 6) if slow else (200, 40)
    for dim in (3, 33) if slow else (1, 3, 8, 33):
        for offset in (1e4,) if slow else (0.0, 10.0, 1e3, 1e5):
            rows = torch.rand(count, dim, generator=generator) + offset
            rows[count // 2 : count // 4 * 3] = rows[: count // 4]
            rows[7] = 0
            got = state(select, rows[None], k, metric="sqeuclidean")
            want = coreset_listing(
                rows[None].double(), torch.ones(1, count, dtype=F64), k, metric="sqeuclidean", return_min_distances=True
            )
            assert torch.equal(got.indices, want.indices)
            torch.testing.assert_close(got.min_distances.double(), want.min_distances, rtol=1e-5, atol=0)


def test_gradients_far_from_the_origin(select: Select) -> None:
    offset = 1e4
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(2, 15, 3, generator=generator) + offset
    grad = torch.randn(2, 4, 3, generator=generator)
    quality = torch.rand(2, 15, generator=generator) + 0.5
    found = []
    for dtype in (torch.float32, F64):
        leaves = [rows.to(dtype).requires_grad_(), quality.to(dtype).requires_grad_()]
        if dtype == F64:
            picked = coreset_listing(*leaves, 4, 0.5, metric="sqeuclidean").features
        else:
            picked = select(leaves[0], 4, leaves[1], 0.5, metric="sqeuclidean").features
        found.append(torch.autograd.grad((picked * grad).sum(), leaves))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_no_quality_starts_at_the_first_row_that_can_be_picked(select: Select) -> None:
    rows = torch.tensor([[torch.nan, 0.0], [0.0, 0.0], [3.0, 4.0], [torch.inf, 1.0]])
    got = select(rows, 4, metric="sqeuclidean")
    assert got.indices.tolist() == [1, 2, -1, -1]
    assert got.distances.tolist() == [torch.inf, 25.0, 0.0, 0.0]


def test_earlier_distances_of_inf_leave_the_lowest_row_first(select: Select) -> None:
    rows = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    known = torch.full((1, 9), torch.inf)
    known[0, 0] = -torch.inf
    got = select(rows, 2, torch.rand(1, 9) + 0.1, min_distances=known)
    assert int(got.indices[0, 0]) == 1
    assert got.distances[0, 0] == torch.inf


@pytest.mark.parametrize("metric", METRICS)
def test_earlier_distances_are_kept_beside_extreme_weights(metric: str, select: Select) -> None:
    """Weights of 1e30 are held in a unit of their own; what was given before comes back as it was given."""
    rows = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    quality = torch.tensor([[1.0, 1e3, 1.0, 1e3, 1e3, 1.0]])
    known = torch.tensor([[1e-30, 1e-30, torch.inf, 3e38, 0.0, 0.5]])
    got = state(select, rows, 1, quality, 10.0, metric=metric, min_distances=known)
    assert got.indices.tolist() == [[2]]
    assert got.distances.tolist() == [[torch.inf]]
    assert torch.equal(got.min_distances[0, [0, 1, 4, 5]], known[0, [0, 1, 4, 5]])
    assert got.nearest[0, [0, 1, 4, 5]].tolist() == [-1, -1, -1, -1]
    assert got.min_distances[0, 2] == 0


@pytest.mark.parametrize("where", WHERE[:2], indirect=True)  # what they make is min_distances
@pytest.mark.parametrize("metric", METRICS)
def test_anchors_are_picks_made_before(metric: str, select: Select) -> None:
    """In the set or elsewhere, the same for all sets, one batch a set, or different numbers of them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 13, 6, generator=generator)
    quality = torch.rand(3, 13, generator=generator) + 0.5
    anchors = torch.randn(3, 4, 6, generator=generator)
    anchors[1, 2] = rows[1, 11]
    anchors[2, 0] = torch.nan  # passed by
    together = state(select, rows, 3, quality, 0.5, metric=metric, anchors=anchors)
    assert together.min_distances[1, 11] == 0
    counts = [4, 4, 3]
    nested = torch.nested.nested_tensor([anchors[0], anchors[1], anchors[2, 1:]], layout=torch.jagged)
    ragged = state(select, rows, 3, quality, 0.5, metric=metric, anchors=nested)
    for b in range(3):
        good = anchors[b, 4 - counts[b] :]
        if metric == "cosine":
            cosine = torch.nn.functional.cosine_similarity(rows[b].double()[:, None], good.double(), dim=-1)
            gap = (1 - cosine).clamp(min=0)
        else:
            gap = (rows[b].double()[:, None] - good.double()).square().sum(-1)
        known = gap.amin(-1) * quality[b].double() ** 0.5
        alone = state(select, rows[b], 3, quality[b], 0.5, metric=metric, anchors=good)
        want = state(select, rows[b], 3, quality[b], 0.5, metric=metric, min_distances=known.float())
        for one in (together, ragged):
            for mine, theirs in zip(one, alone, strict=True):
                assert torch.equal(mine[b], theirs)
        assert torch.equal(alone.indices, want.indices)
        torch.testing.assert_close(alone.distances, want.distances, rtol=1e-4, atol=1e-5)
        assert float(alone.distances[0]) == pytest.approx(float(known.max()), rel=1e-4)


def test_weights_beyond_the_range_leave_the_first_pick_to_the_distances(select: Select) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, quality = torch.randn(1, 6, 4, generator=generator), torch.rand(1, 6, generator=generator) + 195
    known = torch.rand(1, 6, generator=generator)
    for gamma in (20.0, -20.0):
        for size in (1e-30, 1.0, 1e38):
            assert int(select(rows, 2, quality, gamma, min_distances=known * size).indices[0, 0]) == int(known.argmax())


@pytest.mark.parametrize("metric", METRICS)
def test_distances_to_anchors_beyond_the_range(metric: str, select: Select) -> None:
    rows = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    quality, largest = torch.full((1, 6), 200.0), torch.finfo(torch.float32).max
    got = state(select, rows, 1, quality, 20.0, metric=metric, anchors=rows[0, :2])
    assert int(got.indices[0, 0]) == 2
    assert got.distances[0, 0] == largest
    assert got.min_distances[0].tolist() == [0, 0, 0, largest, largest, largest]


def test_no_anchors_are_none(select: Select) -> None:
    rows = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    for mine, theirs in zip(select(rows, 3, anchors=rows[0, :0]), select(rows, 3), strict=True):
        assert torch.equal(mine, theirs)


ROWS = torch.ones(2, 5, 3)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"metric": "l2"}, ValueError, 'expected metric "cosine" or "sqeuclidean"'),
    ({"metric": "sqeuclidean", "normalized": True}, ValueError, "expected normalized with metric"),
    ({"anchors": torch.ones(4, 2)}, ValueError, r"expected anchors of shape \(A, 3\), or \(2, A, 3\)"),
    ({"anchors": torch.ones(3, 4, 3)}, ValueError, "expected anchors of shape"),
    ({"anchors": [1.0]}, TypeError, "expected anchors to be a Tensor"),
    ({"anchors": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "expected anchors of dtype"),
    ({"anchors": torch.eye(3).to_sparse()}, TypeError, "expected anchors to be a dense tensor, got one of layout"),
    ({"anchors": torch.ones(4, 3, device="meta")}, ValueError, "expected anchors on the features' device"),
    ({"min_distances": torch.ones(2, 4)}, ValueError, "expected min_distances of shape"),
    ({"min_distances": -torch.ones(2, 5)}, ValueError, "expected min_distances of at least 0"),
    ({"min_distances": torch.full((2, 5), torch.nan)}, ValueError, "expected min_distances of at least 0"),
    ({"k": [1, 2, 3]}, ValueError, "expected k of 2 numbers"),
    ({"k": [1, 2.0]}, TypeError, "expected k of integers, one for each set"),
    ({"k": [1, True]}, TypeError, "expected k of integers, one for each set"),
    ({"k": [1, torch.tensor(True)]}, TypeError, "expected k of integers, one for each set"),
    ({"k": [1, torch.tensor(2.0)]}, TypeError, "expected k of integers, one for each set"),
    ({"k": [1, torch.ones(2, dtype=torch.int64)]}, TypeError, "expected k of integers, one for each set"),
    ({"k": torch.tensor(True)}, TypeError, "expected k to be an integer of at least 1"),
    ({"k": torch.tensor([1, -1])}, ValueError, "expected k of each set from 0"),
    ({"k": torch.tensor([1.0, 2.0])}, TypeError, "expected k of dtype int32 or int64"),
    ({"k": torch.tensor([1])}, ValueError, r"expected k of shape \(2,\)"),
    ({"return_nearest": 1}, TypeError, "expected return_nearest to be a bool"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        coreset_select(ROWS, **{"k": 2, **options})


def test_one_call_in_a_compiled_graph() -> None:
    """State, anchors and numbers of their own are part of the graph."""
    rows = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))

    def picks(rows: Tensor, anchors: Tensor) -> tuple[Tensor, ...]:
        found = coreset_select(rows, [3, 2], metric="sqeuclidean", anchors=anchors, return_min_distances=True)
        return tuple(found)

    compiled = torch.compile(picks, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(compiled(rows, rows[0, :3]), picks(rows, rows[0, :3]), strict=True):
        assert torch.equal(mine, theirs)


def test_anchors_are_exported_for_any_number_of_sets() -> None:
    class Query(torch.nn.Module):
        def forward(self, rows: Tensor, anchors: Tensor) -> Tensor:
            return coreset_select(rows, 3, anchors=anchors).indices

    rows = torch.randn(4, 20, 5, generator=torch.Generator().manual_seed(0))
    sets, known = torch.export.Dim("sets", min=2, max=9), torch.export.Dim("known", min=2, max=9)
    shapes = ({0: sets}, {0: known})
    program = torch.export.export(Query(), (rows[:2], rows[0, :3]), dynamic_shapes=shapes, strict=True)
    assert torch.equal(program.module()(rows, rows[1, :5]), Query()(rows, rows[1, :5]))


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_many_columns_meet_the_nearest_anchor(offset: float) -> None:
    """A product in float64 finds it, also where another one is a bit away, or a copy."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 200, 100, generator=generator) + offset
    anchors = torch.cat(
        [rows[0, :40], rows[0, :40], rows[0, 40:60], torch.randn(30, 100, generator=generator) + offset]
    )
    anchors[:20, 3] = anchors[:20, 3].nextafter(torch.tensor(torch.inf))  # these come before the copies
    got = coreset_select(rows, [0], metric="sqeuclidean", anchors=anchors, return_min_distances=True).min_distances
    want = (rows[0].double()[:, None] - anchors.double()).square().sum(-1).amin(-1)
    assert (got[0, :60] == 0).all()
    torch.testing.assert_close(got[0].double(), want, rtol=1e-6, atol=0)
    for row in (0, 30, 150):
        alone = coreset_select(
            rows[:, row : row + 1], [0], metric="sqeuclidean", anchors=anchors, return_min_distances=True
        )
        assert torch.equal(alone.min_distances[0, 0], got[0, row])


def test_a_row_that_is_taken_out_is_nearest_to_its_own_pick(select: Select) -> None:
    x, x[:, 4] = (rows := torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(5))), rows[:, 1]
    for given in ({}, {"min_distances": torch.full((2, 9), 0.5), "start": torch.tensor([3, 0])}):
        found = select(x, 5, distinct=True, return_nearest=True, metric="sqeuclidean", **given)
        picked = found.nearest.gather(1, found.indices)
        wanted = coreset_select(
            x, 5, distinct=True, return_nearest=True, metric="sqeuclidean", backend="torch", **given
        )
        assert torch.equal(found.nearest, wanted.nearest)
        assert (picked == torch.arange(5)).sum() >= 8


def test_the_first_distance_is_the_first_pick_s_own(select: Select) -> None:
    """The row that lies farthest from what was picked before cannot be picked, which shows only when rows are read."""
    x, known = (
        torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[1.0, 2, 7, 3, 4, 5]] * 2),
    )
    x[:, 2] = torch.inf
    found = select(x, 2, torch.ones(2, 6), min_distances=known)
    assert found.indices[:, 0].tolist() == [5, 5]
    assert found.distances[:, 0].tolist() == [5.0, 5.0]


def test_a_set_whose_start_cannot_be_picked_has_no_state(select: Select) -> None:
    x, quality = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2, 6)
    quality[1, 2] = torch.nan
    for known in (None, torch.arange(12.0).reshape(2, 6)):
        for k in (1, 3):
            found = select(x, k, quality, start=2, min_distances=known, return_min_distances=True)
            assert found.counts.tolist() == [k, 0]
            assert found.min_distances[0].any()
            assert not found.min_distances[1].any()
            assert found.nearest[1].tolist() == [-1] * 6
