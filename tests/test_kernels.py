"""The Triton kernels against the reference listing: interpreted on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from oracle import Outcome, assert_as_accurate_as_eager, outcome, select_on, weights_for
from poison import poisoned
from problems import Case, cases, random_case, spoil
from side_by_side import side_by_side
from tiers import TIERS, forced, run

from fcn_kernels import coreset_select
from fcn_kernels.selection import op
from fcn_kernels.selection.kernels import launch
from fcn_kernels.selection.problem import Problem

# What the barriers carry: the softmax sums, the first pick made early or not, counts of few rows, and one step alone.
BARRIER_CASES: tuple[dict[str, Any], ...] = (
    {},
    {"quality": "norms"},
    {"noise": None, "spoiled": True},
    {"distinct": True, "noise": 3.0, "duplicates": True},
    {"start": torch.tensor([3, 12])},
    {"k": 1},
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- as accurate as eager, picks as in float64 ------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
def test_whatever_the_call(tier: str, device: torch.device) -> None:
    """Every layout, option, dtype, unpickable row and short set that hypothesis thinks of."""

    @given(st.sampled_from(DTYPES).flatmap(lambda dtype: cases(dtype, max_rows=12, max_dim=20, max_k=4)))
    # the interpreter is too slow to shrink what fails, and runs the launches of split sets one by one
    @settings(max_examples=2 if tier == "split" else 4, phases=[Phase.generate])
    def check(case: Case) -> None:
        with forced(tier), poisoned():
            assert_as_accurate_as_eager(case.to(device), "triton")

    check()


@pytest.mark.parametrize(
    ("tier", "dtype", "options"),
    [
        ("whole", torch.float32, {"noise": None}),
        ("whole", torch.bfloat16, {"quality": "norms", "gamma": -0.7}),
        ("whole", torch.bfloat16, {}),
        ("whole", torch.float32, {"unit": True, "distinct": True, "noise": 3.0, "duplicates": True}),
        ("two lengths", torch.float16, {"quality": "norms"}),
        ("split", torch.float32, {"quality": "norms", "gamma": -0.7}),
        ("split", torch.float16, {"distinct": True, "noise": 3.0, "duplicates": True}),
    ],
    ids=str,
)
def test_each_tier(tier: str, dtype: torch.dtype, options: dict[str, Any], device: torch.device) -> None:
    case = random_case(2, 11, 19, 3, dtype=dtype, tau=0.5, distance_scale=0.5, seed=2, **options)
    with forced(tier), poisoned():
        assert assert_as_accurate_as_eager(case.to(device), "triton") > 0


@pytest.mark.parametrize("dim", [1, 16, 100, 4096])
def test_rows_of_any_width(dim: int, device: torch.device) -> None:
    case = random_case(1, 4, dim, 2, quality="norms" if dim == 1 else "random")
    with poisoned():
        assert assert_as_accurate_as_eager(case.to(device), "triton") == 1


@pytest.mark.parametrize(("tier", "quality"), [("two lengths", "random"), ("whole", "norms"), ("split", "random")])
def test_a_sharp_softmax(tier: str, quality: str, device: torch.device) -> None:
    """At tau = 0.02 and qualities of 20, logits / tau are in the hundreds, where a float32 ends at 2^-14."""
    case = random_case(2, 6, 8, 3, tau=0.02, quality=quality)
    given = None if case.quality is None else 20 * case.quality
    case = Case(case.features * (4 if given is None else 1), 3, given, case.gamma, case.options)
    with forced(tier), poisoned():
        assert assert_as_accurate_as_eager(case.to(device), "triton") == 2


@pytest.mark.parametrize("tau", [0.013, 1e-10])
@pytest.mark.parametrize("tier", TIERS)
def test_a_one_hot_softmax_has_no_gradient(tier: str, tau: float, device: torch.device) -> None:
    """What is left is the gradient of the picked rows, however large logits / tau and so their rounding are."""
    case = random_case(1, 6, 8, 2, tau=tau, gamma=0.0, noise=None)
    noise = torch.zeros(2, 1, 6)
    noise[0, 0, 2] = noise[1, 0, 4] = 50.0
    case = Case(case.features, 2, 20 + case.quality, case.gamma, {**case.options, "noise": noise}).to(device)
    got = run(case, tier)
    expected = torch.zeros_like(got.features)
    expected[0, [2, 4]] = weights_for(case)[0]
    # products of up to 10 may round differently for a row alone and in a tile: 10 eps / tau = 1e-4, ten times over
    torch.testing.assert_close(got.features, expected, rtol=0, atol=1e-3)
    assert got.quality is not None
    torch.testing.assert_close(got.quality, torch.zeros_like(got.quality), rtol=0, atol=1e-3)


@pytest.mark.parametrize("tier", TIERS)
def test_a_row_picked_twice(tier: str, device: torch.device) -> None:
    """The second pick's distance ties with the first's everywhere, and each takes half of the gradient."""
    case = random_case(1, 5, 4, 3, noise=None, gamma=0.5)
    noise = torch.zeros(3, 1, 5)
    noise[0, 0, 1] = noise[1, 0, 1] = 5.0
    case = case.with_options(noise=noise)
    assert run(case.to(device), tier).coreset.indices[0, :2].tolist() == [1, 1]
    with forced(tier), poisoned():
        assert assert_as_accurate_as_eager(case.to(device), "triton") == 1


@pytest.mark.parametrize("options", BARRIER_CASES, ids=str)
def test_parts_that_meet_at_barriers(options: dict[str, Any], device: torch.device) -> None:
    """Bit for bit what parts that meet between launches give; and parts that hold their rows, as accurate as eager."""
    options = dict(options)
    spoiled, k, start = options.pop("spoiled", False), options.pop("k", 3), options.pop("start", None)
    case = random_case(2, 13, 9, k, seed=4, **options)
    case = spoil(case) if spoiled else case
    case = (case if start is None else case.with_options(start=start)).to(device)
    together = nullcontext() if device.type == "cuda" else side_by_side()
    with together:
        met = run(case, "split at barriers")
    between = run(case, "split")
    assert met.same_bits(between)


def test_barriers_leave_their_counters_ready(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """For launches of other parts and picks, after an odd number of barriers, too."""
    kept = torch.zeros(2, dtype=torch.int32, device=device)
    monkeypatch.setattr(launch, "counters", lambda features, sets: kept)
    seen = set()
    for k in (2, 1, 2):
        case = random_case(2, 7, 4, k, seed=k).to(device)
        with nullcontext() if device.type == "cuda" else side_by_side():
            met = run(case, "split at barriers")
        assert met.same_bits(run(case, "split"))
        assert (kept & 0x7FFFFFFF == 0).all()
        seen |= set(kept.tolist())
    assert seen == {0, -(2**31)}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("noise", [None, 0.5])
def test_favourites_that_turn_out_unpickable(noise: float | None, tier: str, device: torch.device) -> None:
    """Streamed sets choose the first pick by quality, before a row is seen; the best may not be finite, or be zero."""
    case = random_case(3, 14, 7, 3, noise=noise)
    features, quality = case.features.clone(), case.quality.clone()
    features[0, 9], features[0, 2], features[0, 11] = math.nan, 0.0, math.inf
    quality[0, 9] = quality[0, 2] = quality[0, 11] = 50.0  # tied, so the search goes on from row to row
    quality[0, 5] = 49.0
    features[1] = math.nan  # no row is left
    quality[2, 3] = quality[2, 8] = 50.0
    features[2, 3, 0] = -math.inf
    case = Case(features, 3, quality, case.gamma, case.options).to(device)
    with forced(tier), poisoned():
        picked = coreset_select(case.features, 3, case.quality, case.gamma, backend="triton", **case.options)
        assert picked.indices[:, 0].tolist() == [5, -1, 8]
        assert picked.counts.tolist() == [3, 0, 3]
        assert_as_accurate_as_eager(case, "triton")


def test_many_picks(device: torch.device) -> None:
    """K = 40 of 42 rows."""
    case = random_case(1, 42, 3, 40, noise=None, quality="flat").to(device)
    with forced("whole"), poisoned():
        picked = coreset_select(case.features, 40, case.quality, backend="triton")
    torch_backend = coreset_select(case.features, 40, case.quality, backend="torch")
    assert torch.equal(picked.indices, torch_backend.indices)
    torch.testing.assert_close(picked.distances, torch_backend.distances, rtol=0, atol=1e-6)  # 4 roundings of 2


@pytest.mark.parametrize("tier", TIERS)
def test_drawn_noise(tier: str, device: torch.device) -> None:
    """The torch backend's noise, for more steps than one Philox draw serves, forward and again backward."""
    case = random_case(2, 9, 6, 6, noise=None, sample=True).to(device)

    def on(backend: str) -> Outcome:
        return outcome(select_on(backend), case, weights_for(case), generator=torch.Generator().manual_seed(3))

    with forced(tier), poisoned():
        got = on("triton")
    expected = on("torch")
    assert torch.equal(got.coreset.indices, expected.coreset.indices)
    for name, grad in got.gradients().items():
        # The noise's logarithms are good to 2e-6, and the softmax passes that on.
        torch.testing.assert_close(grad, expected.gradients()[name], rtol=1e-4, atol=1e-5)


# --- layout, order and memory change nothing ------------------------------------------------------------


def test_forward_and_backward_may_differ_in_tier(device: torch.device) -> None:
    """What the forward pass saves means the same to every backward pass."""
    case = random_case(1, 9, 7, 3, duplicates=True).to(device)
    grads = []
    for forward, backward in (("two lengths", "whole"), ("whole", "split"), ("split", "two lengths")):
        with forced(forward, backward), poisoned():
            grads.append(outcome(select_on("triton"), case, weights_for(case)).gradients())
    for other in grads[1:]:
        for name, grad in other.items():
            torch.testing.assert_close(grad, grads[0][name], rtol=1e-5, atol=1e-6)  # sums in another order


def test_the_same_bits_again(device: torch.device) -> None:
    case = random_case(3, 10, 9, 3).to(device)
    assert run(case).same_bits(run(case))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_offsets_beyond_32_bits(layout: str, device: torch.device) -> None:
    """The third row begins beyond 2^31, at a stride below it; of the memory only the rows are ever touched."""
    far, dim = 2**30 + 64, 8
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    try:
        memory = torch.empty(2 * far + dim, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of address space: {error}")
    case = random_case(3, 1, dim, 2, dtype=torch.bfloat16).to(device)
    if layout == "packed":
        case = Case(case.features.transpose(0, 1)[0], 2, case.quality[:, 0], case.gamma)
        case = case.with_options(cu_seqlens=torch.tensor([0, 3], device=device))
        strided = memory.as_strided((3, dim), (far, 1))
    else:
        strided = memory.as_strided((3, 1, dim), (far, dim, 1))
    strided.copy_(case.features)
    expected = run(case)
    # torch's clone would be as large as the memory, so only the features' gradient is taken
    features = strided.requires_grad_()
    with forced("whole"), poisoned():
        got = coreset_select(features, 2, case.quality, case.gamma, backend="triton", **case.options)
        (grad,) = torch.autograd.grad((got.features * weights_for(case)).sum(), features)
    assert all(torch.equal(a, b) for a, b in zip(got, expected.coreset, strict=True))
    assert torch.equal(grad, expected.features)


def test_scalars_on_the_device(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Gamma and seed are read by the kernel where they are on the device, and passed by value where they are not."""
    case = random_case(2, 6, 5, 3, noise=None, sample=True).to(device)
    results = []
    for gamma, seed in (
        (lambda gamma: (gamma.to(device), 0.0), lambda seed, stand_in: (seed.to(device), -1)),
        (lambda gamma: (None, float(gamma)), lambda seed, stand_in: (stand_in, int(seed))),
    ):
        monkeypatch.setattr(launch, "gamma_argument", gamma)
        monkeypatch.setattr(launch, "seed_argument", seed)
        torch.manual_seed(2)
        results.append(run(case))
    assert results[0].same_bits(results[1])
    torch.manual_seed(3)
    assert not results[0].same_bits(run(case))


# --- corners ------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    "wrong",
    [{"lengths": [99, -3]}, {"cu_seqlens": [-4, 5, 99]}, {"cu_seqlens": [9, 5, 2]}, {"start": [-2, 77]}],
    ids=str,
)
def test_kernels_stay_inside_whatever_lengths_say(wrong: dict[str, list[int]], tier: str, device: torch.device) -> None:
    """On a GPU these values are not checked before the launch, so the kernels must not follow them out of bounds."""
    case = random_case(2, 6, 4, 3, noise=None).to(device)
    tensors = {name: torch.tensor(values, device=device) for name, values in wrong.items()}
    problem = Problem(
        features=case.features.flatten(0, 1) if "cu_seqlens" in wrong else case.features,
        quality=case.quality.flatten(),
        gamma=case.gamma,
        **tensors,
        k=3,
    )
    with forced(tier), poisoned():
        problem = problem._replace(features=problem.features.requires_grad_())
        features, _, indices, counts, *_ = op.select(problem, "triton")
        torch.autograd.grad(features.sum(), problem.features)
    rows = problem.rows if "cu_seqlens" in wrong else 6
    assert ((indices >= -1) & (indices < rows)).all()
    assert ((counts >= 0) & (counts <= 3)).all()
    if "start" in wrong:
        assert counts.tolist() == [0, 0]
