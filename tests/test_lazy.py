"""The kernel that leaves out rows that cannot win: the picks and distances of the one that reads all, to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from poison import poisoned
from problems import Case, random_case, spoil
from side_by_side import side_by_side

from fcn_kernels import coreset_select
from fcn_kernels.device.splits import COOPERATIVE, LAUNCHES
from fcn_kernels.selection.kernels import launch
from fcn_kernels.selection.kernels.plans import POINT, Plan
from fcn_kernels.selection.problem import Problem
from fcn_kernels.selection.select import Coreset

ROWS, DIM, K = 16, 9, 5


@contextmanager
def planned(split: int | None, eager: int = 1) -> Iterator[None]:
    """Rows are left out after ``eager`` picks, by two parts that meet so; None: one program reads all of them."""
    plan = Plan(4, 16, 1, 1, block_r=16)
    plan = plan if split is None else plan._replace(parts=2, split=split)
    with pytest.MonkeyPatch.context() as patch, poisoned():
        patch.setattr(launch, "forward_plans", lambda *sizes: (plan,))
        for name, value in (("LAZY_PICKS", 3), ("LAZY_BYTES", 1), ("EAGER_PICKS", eager), ("LATE_ROWS", 4)):
            patch.setattr(launch, name, value)
        yield


def select(case: Case, split: int | None, **options: Any) -> Coreset:
    generator = torch.Generator().manual_seed(3) if case.options.get("sample") else None
    with planned(split, **options), torch.no_grad():
        return coreset_select(
            case.features, case.k, case.quality, case.gamma, backend="triton", generator=generator, **case.options
        )


def assert_same_bits(case: Case, split: int = LAUNCHES.value, **options: Any) -> Coreset:
    expected, got = select(case, None), select(case, split, **options)
    for name, a, b in zip(expected._fields, expected, got, strict=True):
        assert (a is None and b is None) or torch.equal(a, b), name
    return got


def random(**options: Any) -> Case:
    return random_case(1, ROWS, DIM, K, **options)


def earlier(case: Case) -> Case:
    """With distances to earlier picks, of which some forbid a row."""
    generator = torch.Generator().manual_seed(1)
    distances = torch.rand(1, ROWS, generator=generator)
    distances[0, ::5] = -math.inf
    return case.with_options(min_distances=distances)


def extreme(case: Case) -> Case:
    """Rows whose squares leave float32's range, one way and the other."""
    features = case.features.clone()
    features[0, 2::4] *= 1e18
    features[0, 3::4] *= 1e-18
    return Case(features, case.k, case.quality, case.gamma, case.options)


def spread(case: Case) -> Case:
    """Qualities whose powers take parts to units of their own."""
    quality = torch.logspace(-30, 30, ROWS)[None]
    return Case(case.features, case.k, quality, torch.tensor(2.0), case.options)


def with_favorites(case: Case) -> Case:
    """Noise that would have two rows picked again and again."""
    noise = case.options["noise"].clone()
    noise[..., 3] += 60
    noise[..., 12] += 50
    return case.with_options(noise=noise)


CASES: dict[str, Callable[[], Case]] = {
    "quality, start and mask": lambda: random(
        noise=None, start=torch.tensor([5]), mask=(torch.arange(ROWS) % 6 > 0)[None]
    ),
    "noise, distinct, duplicates": lambda: with_favorites(random(distinct=True, duplicates=True)),
    "bounds close together": lambda: random_case(1, 20, 16, 9, noise=None, quality="flat"),
    "drawn noise": lambda: random_case(1, 12, DIM, 5, noise=None, sample=True),
    "squared distances going on": lambda: earlier(random(noise=None, metric="sqeuclidean", duplicates=True)),
    "unit rows of 16 bits": lambda: random(
        noise=None, unit=True, duplicates=True, quality="flat", dtype=torch.bfloat16
    ),
    "norms, rows that cannot be picked": lambda: spoil(extreme(random(noise=None, quality="norms", gamma=0.01))),
    "units of the parts": lambda: spread(random(noise=None, distinct=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits(name: str) -> None:
    assert_same_bits(CASES[name]())


@pytest.mark.parametrize("name", ["quality, start and mask", "drawn noise"])
def test_parts_that_meet_at_barriers(name: str) -> None:
    with side_by_side():
        assert_same_bits(CASES[name](), COOPERATIVE.value)


def test_sets_of_several_lengths() -> None:
    """A set of fewer picks, one shorter than its picks, and one without a row: what is missing is written, too."""
    case = random_case(3, 8, DIM, 5, noise=None, lengths=torch.tensor([8, 3, 0]), distinct=True)
    case = replace(case, k=torch.tensor([4, 5, 5]))  # type: ignore[arg-type]
    got = assert_same_bits(case)
    assert got.counts.tolist() == [4, 3, 0]
    assert got.indices[:, 3].tolist()[1:] == [-1, -1]


def test_a_packed_set() -> None:
    case = random_case(1, ROWS, DIM, 4, noise=None)
    assert case.quality is not None
    case = Case(case.features[0], 4, case.quality[0], case.gamma, {"cu_seqlens": torch.tensor([0, ROWS])})
    assert_same_bits(case)


@pytest.mark.parametrize("order", ["nearest first", "farthest first"])
def test_rows_in_an_adverse_order(order: str) -> None:
    """On a line every bound is stale, and each row that is read may be better or worse than all before it."""
    line = torch.linspace(0, 1, ROWS).square()
    line = line if order == "nearest first" else line.flip(0)
    features = torch.zeros(1, ROWS, DIM)
    features[0, :, 0] = line
    case = Case(features, K, torch.ones(1, ROWS), options={"metric": "sqeuclidean", "start": torch.tensor([0])})
    assert_same_bits(case)


def test_ties_go_to_the_lowest_row() -> None:
    """Orthogonal rows are all as far from one another, whether they have been read or not."""
    features = torch.eye(DIM)[torch.arange(ROWS) % DIM][None].contiguous()
    got = assert_same_bits(Case(features, K, torch.ones(1, ROWS)))
    assert got.indices[0].tolist() == [*range(K)]


def test_which_calls_leave_out_rows() -> None:
    features = torch.empty(1, 200_000, 512, dtype=torch.bfloat16, device="meta")
    many = Problem(features, k=2000)
    assert launch.is_lazy(many, keep=False)
    assert not launch.is_lazy(many, keep=True)  # a gradient wants all distances of all rows
    assert not launch.is_lazy(many._replace(return_state=True), keep=False)
    assert not launch.is_lazy(many._replace(k=launch.LAZY_PICKS - 1), keep=False)
    assert not launch.is_lazy(many._replace(features=features[:, :60_000]), keep=False)
    assert not launch.is_lazy(many._replace(features=features[..., :POINT]), keep=False)
    assert launch.LAZY_PICKS > launch.EAGER_PICKS > 0


@pytest.mark.parametrize("state", [False, True])
def test_the_state_and_gradients_come_from_all_rows(state: bool) -> None:
    """What such a call asks for is not left out with the rows."""
    case = random_case(1, ROWS, DIM, 4, noise=None)
    with planned(LAUNCHES.value), pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "select_lazily", None)  # not to be called
        features = case.features.clone().requires_grad_(not state)
        got = coreset_select(features, 4, case.quality, backend="triton", return_min_distances=state)
    assert hasattr(got, "min_distances") == state
    if not state:
        got.features.sum().backward()
        assert features.grad is not None
        assert features.grad.abs().sum() > 0


def test_a_call_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would compare the other kernel with itself."""
    turns = []
    original = launch._launch

    def counting(kernel: Any, p: Problem, plan: Plan, launches: int, *rest: Any) -> None:
        turns.append((kernel is launch.select_lazily, launches))
        original(kernel, p, plan, launches, *rest)

    monkeypatch.setattr(launch, "_launch", counting)
    with planned(LAUNCHES.value):
        launch.forward(Problem(torch.randn(1, 8, 16), torch.rand(8), k=3), keep=False)
    assert turns == [(False, 2), (True, 4)]
