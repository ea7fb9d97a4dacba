"""What a call promises at its edges, on every backend; Triton's kernels on whole sets and on sets in parts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from everywhere import WHERE
from oracle import Outcome, Select, assert_as_accurate_as_eager, outcome, weights_for
from problems import STRIDED, Case, pack, random_case, spoil
from torch import Tensor

from fcn_kernels import Coreset

NAN, INF = torch.nan, torch.inf


def run(select: Select, case: Case, device: torch.device) -> Outcome:
    case = case.to(device)
    return outcome(select, case, weights_for(case))


def gradient(select: Select, features: Tensor, k: int, *given: Any, **options: Any) -> tuple[Coreset, Tensor]:
    leaf = features.detach().requires_grad_()
    coreset = select(leaf, k, *given, **options)
    return coreset, torch.autograd.grad(coreset.features.sum(), leaf)[0]


def test_exact_ties_go_to_the_lowest_row(select: Select, device: torch.device) -> None:
    """Unit vectors are equally far from each other in exact arithmetic, so nothing is left to rounding."""
    features = (torch.eye(6) * torch.tensor([1.0, 2, 4, 8, 2, 1])[:, None])[None].to(device)
    assert select(features, 6, torch.ones(1, 6, device=device)).indices.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert select(features, 3).indices.tolist() == [[3, 0, 1]]
    twice = torch.eye(6).repeat(1, 2)[None].to(device)  # each row has the same columns again
    assert select(twice, 6, torch.ones(1, 6, device=device)).indices.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_short_and_empty_sets(select: Select, device: torch.device) -> None:
    case = random_case(4, 5, 4, 4)
    case.features[3] = NAN
    case = case.with_options(lengths=torch.tensor([0, 2, 5, 5]))
    got = run(select, case, device)
    coreset = got.coreset
    assert coreset.counts.tolist() == [0, 2, 4, 0]
    there = torch.arange(4) < torch.tensor([[0], [2], [4], [0]])
    assert torch.equal(coreset.indices.cpu() >= 0, there)
    assert (coreset.indices.cpu()[~there] == -1).all()
    for values in (coreset.features, coreset.distances[..., None]):
        assert (values.cpu()[~there] == 0).all()
    assert (got.features[[0, 3]] == 0).all()
    assert got.features.isfinite().all()
    assert got.gamma.isfinite()


@pytest.mark.parametrize("where", WHERE[:3], indirect=True)
@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (0, 0, 4)])
def test_no_rows_at_all(shape: tuple[int, ...], select: Select, device: torch.device) -> None:
    coreset, grad = gradient(select, torch.zeros(shape, device=device), 3, sample=True)
    assert [tuple(t.shape) for t in coreset] == [(shape[0], 3, 4), (shape[0], 3), (shape[0],), (shape[0], 3)]
    assert (coreset.indices == -1).all()
    assert (coreset.counts == 0).all()
    assert grad.shape == shape


@pytest.mark.parametrize("ends", [[0], [0, 0], [0, 0, 3, 3]])
def test_packed_sets_without_rows(ends: list[int], select: Select, device: torch.device) -> None:
    features = torch.randn(ends[-1], 4, device=device)
    coreset, grad = gradient(select, features, 2, cu_seqlens=torch.tensor(ends, device=device))
    assert coreset.counts.tolist() == [min(2, b - a) for a, b in pairwise(ends)]
    assert grad.isfinite().all()


@pytest.mark.parametrize(("k", "quality"), [(1, "random"), (3, "norms")])
def test_given_starts(k: int, quality: str, where: str, select: Select, device: torch.device) -> None:
    """Sound ones in a set with a row that is not; and one that is not finite, is zero, masked, or of no quality."""
    case = random_case(6, 14, 7, k, quality=quality)
    features, mask = case.features.clone(), torch.ones(6, 14, dtype=torch.bool)
    features[0, 4] = features[2, 7] = NAN
    features[3, 0] = 0.0
    mask[4, 12] = False
    given = case.quality
    if given is not None:
        given = given.clone()
        given[5, 2] = -1.0
    case = Case(features, k, given, case.gamma, {**case.options, "mask": mask})
    case = case.with_options(start=torch.tensor([9, 13, 7, 0, 12, 2])).to(device)
    got = run(select, case, device)
    last = -1 if given is not None else 2
    assert got.coreset.indices[:, 0].tolist() == [9, 13, -1, -1, -1, last]
    assert got.coreset.counts.tolist() == [k, k, 0, 0, 0, k if last > 0 else 0]
    assert got.features.isfinite().all()
    assert (got.features[2:5] == 0).all()
    assert_as_accurate_as_eager(case, where.partition(", ")[0])


def test_padded_and_packed_are_the_same_bits(select: Select, device: torch.device) -> None:
    padded = spoil(random_case(3, 6, 7, 3, duplicates=True), share=0.2)
    lengths = torch.tensor([6, 0, 5])
    inside = torch.arange(6) < lengths[:, None]
    twin = run(select, pack(padded, lengths), device)
    for other in (
        run(select, padded.with_options(lengths=lengths), device),
        run(select, padded.with_options(mask=inside), device),
    ):
        assert all(torch.equal(a, b) for a, b in zip(twin.coreset, other.coreset, strict=True))
        assert torch.equal(twin.features, other.features[inside])
        assert torch.equal(twin.quality, other.quality[inside])
        assert (other.features[~inside] == 0).all()
        assert (other.quality[~inside] == 0).all()


@pytest.mark.parametrize("where", WHERE[:3], indirect=True)
@pytest.mark.parametrize("layout", ["start", "lengths", "mask", "packed"])
def test_strides_of_what_is_given_beside_the_rows(layout: str, select: Select, device: torch.device) -> None:
    """Every second element of one set's or of all sets' numbers."""
    case = random_case(2, 6, 6, 2)
    known = torch.linspace(0.1, 1, 12).view(2, 6)
    given = {
        "start": {"start": torch.tensor([3, 1])},
        "lengths": {"lengths": torch.tensor([6, 4])},
        "mask": {"mask": torch.arange(12).view(2, 6) % 3 > 0},
        "packed": {"cu_seqlens": torch.tensor([0, 5, 12])},
    }[layout]
    case = case.with_options(min_distances=known, **given)
    if layout == "packed":
        options = {**case.options, "noise": case.options["noise"].flatten(1), "min_distances": known.flatten()}
        case = Case(case.features.flatten(0, 1), 2, case.quality.flatten(), case.gamma, options)
    case = case.to(device)

    def spread(values: Any) -> Any:
        return values.repeat_interleave(2, -1)[..., ::2] if isinstance(values, Tensor) and values.ndim else values

    options = {name: spread(values) for name, values in case.options.items()}
    plain, strided = run(select, case, device), run(
        select, Case(case.features, 2, spread(case.quality), case.gamma, options), device
    )  # fmt: skip
    assert plain.same_bits(strided)


@pytest.mark.parametrize("where", WHERE[:3], indirect=True)  # tiers address rows alike
@pytest.mark.parametrize("how", STRIDED)
def test_strides_change_no_bit(how: str, select: Select, device: torch.device) -> None:
    case = random_case(3, 6, 6, 2).to(device)
    strided = STRIDED[how](case.features)
    plain = strided.clone(memory_format=torch.contiguous_format)
    before = strided.clone()
    results = [run(select, Case(x, 2, case.quality, case.gamma, case.options), device) for x in (plain, strided)]
    assert results[0].same_bits(results[1])
    assert torch.equal(strided, before)
