"""The backends of a CPU against the reference listing, in float64, and what a call takes, keeps and gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from oracle import (
    SMOOTH,
    WithGradientOf,
    assert_as_accurate_as_eager,
    assert_equal_in_float64,
    decided,
    listing_of,
    outcome,
    smooth_counterpart,
    weights_for,
)
from poison import poisoned
from problems import Case, cases, pack, random_case, spoil
from torch import Tensor

from fcn_kernels import coreset_select
from fcn_kernels.selection import torch_backend
from fcn_kernels.selection.cpp import launch as cpp
from reference.listing import coreset_listing

F64 = torch.float64


@pytest.fixture(autouse=True, scope="module", params=["torch", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """All of this on either backend that a CPU may have."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(cpp, "unavailable", lambda dtype: "not in this test")
        elif reason := cpp.unavailable(torch.float32):
            pytest.skip(reason)
        yield request.param


@pytest.fixture(autouse=True)
def bad_memory(backend: str) -> Iterator[None]:
    """Whatever a backend allocates is full of NaN, and guarded."""
    with poisoned():
        yield


# --- equal to the reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [-0.7, 0.0, 0.5, 1.6])
@pytest.mark.parametrize("noise", [None, 0.01, 1.0])
@pytest.mark.parametrize("quality", ["random", "flat", "norms"])
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (1, 3), (2, 4), (7, 7), (12, 5), (40, 3)])
def test_equals_the_listing(rows: int, k: int, quality: str, noise: float | None, gamma: float) -> None:
    # Rows that coincide tie but for rounding, so that without noise which of them is picked would be a matter of luck.
    options: dict[str, Any] = {"duplicates": noise is not None, "dtype": F64, "gamma": gamma, "noise": noise}
    assert_equal_in_float64(random_case(3, rows, 6, k, quality=quality, **options))


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("tau", [0.05, 1.0, 7.0])
def test_equals_the_listing_with_options(tau: float, scale: float, distinct: bool, unit: bool) -> None:
    for seed in range(4):
        options: dict[str, Any] = {"tau": tau, "distance_scale": scale, "distinct": distinct, "unit": unit}
        assert_equal_in_float64(random_case(2, 9, 5, 6, seed=seed, dtype=F64, noise=2.0, **options))


def test_equals_the_listing_where_a_row_is_picked_twice() -> None:
    """The running minimum then ties everywhere, and half of its gradient goes to either pick."""
    case = random_case(4, 6, 5, 5, dtype=F64, noise=3.0)
    assert any(len(set(picks)) < 5 for picks in listing_of(case).indices.tolist())
    assert_equal_in_float64(case)


@given(cases(F64))
@settings(max_examples=150)
def test_equals_the_listing_whatever_the_call(case: Case) -> None:
    """Every layout, option, unpickable row and short set that hypothesis thinks of."""
    if decided(case, listing_of(case)).all():
        assert_equal_in_float64(case)


@given(cases(torch.float32))
@settings(max_examples=100)
def test_float32_is_as_accurate_as_the_listing(case: Case) -> None:
    assert_as_accurate_as_eager(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_accurate_as_the_listing(dtype: torch.dtype) -> None:
    compared = 0
    for seed in range(12):
        quality = ("random", "norms")[seed % 2]
        case = random_case(3, 20, 24, 3, seed=seed, dtype=dtype, quality=quality)
        compared += assert_as_accurate_as_eager(case)
    assert compared > 18  # of 36; in the others the listing's own rounding picks another row


def test_gradient_of_a_sharp_softmax_is_accurate() -> None:
    """At tau = 0.01 and qualities of 20, logits / tau are in the thousands, where a float32 ends at 2^-13."""
    case = random_case(4, 10, 8, 3, noise=1.0, tau=0.01)
    case = Case(case.features, case.k, 20 * case.quality, case.gamma, case.options)
    assert assert_as_accurate_as_eager(case) == 4
    vanishing = outcome(coreset_select, case.with_options(tau=1e-10), weights_for(case))
    assert torch.equal(vanishing.quality, torch.zeros_like(case.quality))  # the listing's tau at inference


@pytest.mark.parametrize("options", SMOOTH, ids=str)
def test_gradcheck(options: dict[str, Any]) -> None:
    """Against finite differences of the smooth function that has the straight-through gradient."""
    case = random_case(1, 5, 4, 3, dtype=F64, seed=3, distinct=True, **options)
    value, leaves = smooth_counterpart(case)

    def select(features: Tensor, gamma: Tensor, quality: Tensor | None = None) -> Tensor:
        quality = None if quality is None else quality[None]
        return coreset_select(features[None], case.k, quality, gamma, **case.options).features[0]

    assert torch.autograd.gradcheck(lambda *args: WithGradientOf.apply(value, select, *args), leaves)


# --- the walk through memory changes nothing ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("group_bytes", [1, 6 * 40 * 8, 5 * 11 * 40 * 8])
def test_groups_and_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch, group_bytes: int, layout: str) -> None:
    """One row at a time, some rows of a set at a time, and several sets at a time."""
    monkeypatch.setattr(torch_backend, "GROUP_BYTES", group_bytes)
    case = spoil(random_case(7, 11, 40, 4, dtype=F64, duplicates=True), share=0.2)
    if layout == "packed":
        case = pack(case, torch.tensor([11, 3, 0, 10, 5, 11, 1]))
    assert_equal_in_float64(case)
    half = case.cast(torch.bfloat16)
    assert_as_accurate_as_eager(half)


def test_threads_change_nothing() -> None:
    """A single set is split between threads; the parts have to add up, the rows left over by the split included."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for rows in (5, 6, 7, 100):
            assert_equal_in_float64(random_case(1, rows, 12, 4, dtype=F64))
    finally:
        torch.set_num_threads(before)


# --- what a call takes ----------------------------------------------------------------------------------------------


def test_one_set_has_no_batch_dimension() -> None:
    case = random_case(1, 9, 4, 3)
    batched = coreset_select(case.features, 3, case.quality, 0.5, **case.options, lengths=torch.tensor([7]))
    single = coreset_select(
        case.features[0], 3, case.quality[0], 0.5, noise=case.options["noise"][:, 0], lengths=torch.tensor(7)
    )
    assert all(torch.equal(one, many[0]) for one, many in zip(single, batched, strict=True))
    assert torch.equal(
        coreset_select(case.features[0], 2, start=3).indices, coreset_select(case.features, 2, start=3).indices[0]
    )


def test_padding_and_masked_rows_have_no_part() -> None:
    """Whatever is in them, the picks are the same and their gradient is zero."""
    case = random_case(2, 8, 5, 3)
    lengths, out = torch.tensor([5, 8]), torch.arange(8) >= torch.tensor([[5], [8]])
    spoiled = case.features.masked_fill(out[..., None], torch.nan).requires_grad_()
    quality = case.quality.masked_fill(out, torch.nan).requires_grad_()
    for option in ({"lengths": lengths}, {"mask": ~out}):
        clean = coreset_select(case.features, 3, case.quality, 0.5, **case.options, **option)
        coreset = coreset_select(spoiled, 3, quality, 0.5, **case.options, **option)
        assert all(torch.equal(a, b) for a, b in zip(clean, coreset, strict=True))
        dx, dq = torch.autograd.grad(coreset.features.sum(), (spoiled, quality))
        assert (dx[out] == 0).all()
        assert (dq[out] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, "zero", "quality"])
@pytest.mark.parametrize("normalized", [False, True])
def test_an_unpickable_row_changes_nothing_for_the_others(normalized: bool, bad: float | str) -> None:
    clean = random_case(1, 6, 5, 3, unit=normalized, dtype=F64)
    features, quality = clean.features.clone(), clean.quality.clone()
    if bad == "quality":
        quality[0, 2] = 0
    else:
        features[0, 2] = 0
        features[0, 2, 1] = 0.0 if bad == "zero" else bad
    case = Case(features, 3, quality, clean.gamma, clean.options)
    got = outcome(coreset_select, case, weights_for(case))
    keep = torch.arange(6) != 2
    options = {**clean.options, "noise": clean.options["noise"][..., keep]}
    others = Case(clean.features[:, keep], 3, clean.quality[:, keep], clean.gamma, options)
    expected = outcome(coreset_select, others, weights_for(case))
    assert torch.equal(got.coreset.features, expected.coreset.features)
    assert (got.coreset.indices != 2).all()
    for name, grad in got.gradients().items():
        theirs = expected.gradients()[name]
        torch.testing.assert_close(grad if name == "gamma" else grad[:, keep], theirs, rtol=1e-12, atol=1e-12)
        assert name == "gamma" or (grad[0, 2] == 0).all()


def test_start_takes_the_first_pick_out_of_the_gradient() -> None:
    """A given first pick was not chosen, so no gradient reaches the quality through it."""
    case = random_case(2, 6, 4, 1, start=1)
    assert torch.equal(outcome(coreset_select, case, weights_for(case)).quality, torch.zeros(2, 6))


def test_tau_does_not_change_the_picks() -> None:
    case = random_case(3, 20, 6, 5)
    sharp, soft = (coreset_select(case.features, 5, case.quality, tau=t, **case.options) for t in (1e-3, 1e3))
    assert torch.equal(sharp.indices, soft.indices)


def test_distances_are_to_the_nearest_earlier_pick() -> None:
    case = random_case(3, 20, 6, 5, dtype=F64, noise=None, gamma=0.5)
    coreset = coreset_select(case.features, 5, case.quality, 0.5, distance_scale=0.5)
    unit = torch.nn.functional.normalize(coreset.features, dim=-1)
    weight = case.quality.gather(1, coreset.indices) ** 0.5
    for step in range(1, 5):
        nearest = (1 - (unit[:, :step] @ unit[:, step, :, None])[..., 0]).min(-1).values
        torch.testing.assert_close(coreset.distances[:, step], 0.5 * weight[:, step] * nearest)
    assert (coreset.distances[:, 0] == torch.inf).all()


@pytest.mark.parametrize("gamma", [0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=F64)], ids=["float", "f32", "f64"])
def test_gamma_as_number_and_tensor(gamma: float | Tensor) -> None:
    case = random_case(2, 12, 6, 4)
    expected = coreset_select(case.features, 4, case.quality, 0.5, **case.options)
    got = coreset_select(case.features, 4, case.quality, gamma, **case.options)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_gradients_come_in_the_dtypes_of_what_they_belong_to() -> None:
    case = random_case(2, 12, 6, 4)
    leaves = [
        case.features.to(torch.bfloat16).requires_grad_(),
        case.quality.to(F64).requires_grad_(),
        torch.tensor(0.5, requires_grad=True),
    ]
    coreset = coreset_select(leaves[0], 4, leaves[1], leaves[2], sample=True)
    assert coreset.features.dtype == torch.bfloat16
    assert coreset.distances.dtype == torch.float32
    assert coreset.indices.dtype == coreset.counts.dtype == torch.int64
    for leaf, grad in zip(leaves, torch.autograd.grad(coreset.features.sum(), leaves), strict=True):
        assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape)


@pytest.mark.parametrize("wanted", range(3))
def test_each_gradient_alone(wanted: int) -> None:
    case = random_case(2, 12, 6, 4, dtype=F64)
    weights = weights_for(case)
    every = outcome(coreset_select, case, weights)
    leaves = [case.features.clone(), case.quality.clone(), case.gamma.clone()]
    leaves[wanted].requires_grad_()
    coreset = coreset_select(leaves[0], 4, *leaves[1:], **case.options)
    (grad,) = torch.autograd.grad((coreset.features * weights).sum(), leaves[wanted])
    assert torch.equal(grad, (every.features, every.quality, every.gamma)[wanted])


def test_indices_counts_and_distances_carry_no_gradient() -> None:
    coreset = coreset_select(torch.randn(2, 5, 3, requires_grad=True), 2)
    assert coreset.features.requires_grad
    assert not any(t.requires_grad for t in coreset[1:])


def test_inputs_are_left_alone() -> None:
    case = spoil(random_case(2, 9, 5, 3))
    before = [case.features.clone(), case.quality.clone(), case.options["noise"].clone()]
    outcome(coreset_select, case, weights_for(case))
    for left, right in zip(before, [case.features, case.quality, case.options["noise"]], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


# --- what a call keeps ----------------------------------------------------------------------------------------------


def test_backward_keeps_forty_times_less_than_eager() -> None:
    """Beyond the inputs, at N = 4,000 and C = 512 with given noise: the listing keeps unit rows, we keep scalars."""
    case = random_case(1, 4000, 512, 3)

    def kept(call: Any) -> int:
        features = case.features.clone().requires_grad_()
        inputs = {t.untyped_storage().data_ptr() for t in (features, case.quality, case.options["noise"])}
        sizes: dict[int, int] = {}

        def pack_tensor(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in inputs:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
            alive = call(features, 3, case.quality, torch.tensor(0.5), **case.options)
        del alive
        return sum(sizes.values())

    eager = kept(lambda x, k, q, g, **options: coreset_listing(x, q, k, g, **options))
    assert kept(coreset_select) * 40 <= eager


def test_nothing_is_kept_without_a_gradient() -> None:
    case = random_case(1, 50, 16, 3)
    with torch.no_grad():
        assert coreset_select(case.features.requires_grad_(), 3).features.grad_fn is None
