"""Numbers at the ends of their range, and values that are none, in every place where they can be handed in.

Each kind on every backend of a CPU, the Triton kernels in their interpreter among them. What is right is said by
float64, by the same call without the bad values, or by the definition.
"""

from __future__ import annotations

import math
import resource
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fcn_kernels import Coreset, coreset_select
from fcn_kernels.selection.cpp import launch as cpp

NAN, INF = math.nan, math.inf
CPP = pytest.param("cpp", marks=pytest.mark.skipif(bool(cpp.unavailable(torch.float32)), reason="there is no C++"))
BACKENDS = ["torch", CPP, "triton"]
anywhere = pytest.mark.parametrize("backend", BACKENDS)


def drawn(test: Any) -> Any:
    """Run a test of a backend on drawn data, fewer in the interpreter."""

    def on(backend: str) -> None:
        examples = settings(max_examples=2 if backend == "triton" else 15)
        examples(given(st.data())(lambda data: test(backend, data)))()

    on.__name__, on.__doc__ = test.__name__, test.__doc__
    return on


def train(features: Tensor, k: int, quality: Tensor | None = None, gamma: Any = 0.5, **options: Any) -> Any:
    """A call, and the gradients to features, quality and gamma."""
    leaves = [features.detach().clone().requires_grad_()]
    if quality is not None:
        leaves.append(quality.detach().clone().requires_grad_())
    gamma = torch.as_tensor(gamma, dtype=torch.float32).requires_grad_()
    coreset = coreset_select(leaves[0], k, *leaves[1:], gamma=gamma, **options)
    arriving = torch.linspace(-1, 1, coreset.features.numel()).view(coreset.features.shape)
    (coreset.features.float() * arriving).sum().backward()
    return coreset, [leaf.grad for leaf in leaves], gamma.grad


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(found: Coreset, wanted: Coreset) -> None:
    for name, a, b in zip(Coreset._fields, found, wanted, strict=True):
        assert torch.equal(a, b), name


# --- what may not be read changes nothing -------------------------------------------------------------------------


@anywhere
@drawn
def test_bad_rows_change_no_bit_of_the_others(backend: str, data: st.DataObject) -> None:
    """NaN and infinities in features and quality of rows that take no part, in every form of a batch."""
    seed, sample = data.draw(st.integers(0, 10**6)), data.draw(st.booleans())
    n = 12
    x, q = rows(2, n, 6, seed=seed), rows(2, n, seed=seed + 1).abs() + 0.1
    kind = data.draw(st.sampled_from(["mask", "lengths", "packed"]))
    keep = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) < 0.6
    options: dict[str, Any] = {"distinct": data.draw(st.booleans()), "backend": backend}
    if kind == "lengths":
        lengths = data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2))
        keep = torch.arange(n) < torch.tensor(lengths)[:, None]
        options["lengths"] = torch.tensor(lengths)
    elif kind == "mask":
        options["mask"] = keep
    else:  # bad rows inside packed sets
        options["cu_seqlens"] = torch.tensor([0, n, 2 * n])
        x, q, keep = x.flatten(0, 1), q.flatten(), keep.flatten()
    bad, bad_q = x.clone(), q.clone()
    bad[~keep] = data.draw(st.sampled_from([NAN, INF, -INF]))
    bad_q[~keep] = data.draw(st.sampled_from([NAN, INF, -INF, -1.0, 0.0]))
    zero = x.masked_fill(~keep[..., None], 0)

    def run(features: Tensor, quality: Tensor) -> Any:
        seeded = {"sample": True, "generator": torch.Generator().manual_seed(seed)} if sample else {}
        return train(features, 4, quality, **options, **seeded)

    found, grads, dgamma = run(bad, bad_q)
    wanted, wanted_grads, wanted_dgamma = run(zero, q)
    same(found, wanted)
    for grad, right in zip(grads, wanted_grads, strict=True):
        assert torch.equal(grad[keep], right[keep])
        assert not grad[~keep].any()  # and no NaN
    assert torch.equal(dgamma, wanted_dgamma)


@anywhere
def test_a_bad_last_row_of_a_packed_batch_leaves_the_other_sets_their_gradients(backend: str) -> None:
    x = rows(21, 4)
    x[20] = NAN
    _, (grad,), _ = train(x, 3, cu_seqlens=torch.tensor([0, 10, 19, 21]), backend=backend)
    assert grad.isfinite().all()
    assert grad[10:19].any()


# --- only rows that may be picked, whatever the scores ------------------------------------------------------------


@anywhere
@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("gamma", [NAN, INF, -INF])
def test_a_gamma_that_is_no_number_picks_the_lowest_rows_that_may_be_picked(
    backend: str, gamma: float, distinct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not be looked at on a device; there the lowest allowed row is picked."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    mask = torch.tensor([[False, True, True, False, True, True]])
    q = torch.tensor([[9.0, 1.0, 1.0, 8.0, 2.0, 1.0]])
    coreset, grads, dgamma = train(rows(1, 6, 5), 4, q, gamma, mask=mask, distinct=distinct, backend=backend)
    assert coreset.indices.tolist() == [[4, 1, 2, 5] if distinct else [4, 1, 1, 1]]
    assert coreset.distances[0, 1:].tolist() == [0, 0, 0]
    assert all(grad.isfinite().all() for grad in [*grads, dgamma])


@anywhere
def test_noise_of_minus_infinity_everywhere_picks_the_lowest_rows(backend: str) -> None:
    mask = torch.tensor([[False, True, True, True]])
    noise = torch.full((3, 1, 4), -INF)
    coreset, grads, _ = train(
        rows(1, 4, 5), 3, rows(1, 4).abs(), mask=mask, noise=noise, distinct=True, backend=backend
    )
    assert coreset.indices.tolist() == [[1, 2, 3]]
    assert all(grad.isfinite().all() for grad in grads)


# --- ranges -------------------------------------------------------------------------------------------------------


@anywhere
@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    gamma=st.sampled_from([-40.0, -20.0, 15.0, 20.0, 60.0]),
    spread=st.floats(1.1, 30),
    scale=st.sampled_from([1.0, 1e-30, 1e30]),
)
def test_weights_outside_the_range_pick_what_float64_picks(
    backend: str, seed: int, gamma: float, spread: float, scale: float
) -> None:
    x = rows(1, 12, 8, seed=seed)
    q = 100 * spread ** rows(1, 12, seed=seed + 1).clamp(-1, 1)
    found = coreset_select(x, 4, q, gamma, distance_scale=scale, backend=backend)
    logits = gamma * q.double().log() + math.log(scale)
    unit = torch.nn.functional.normalize(x.double(), dim=-1)[0]
    picks, nearest = [int(q.argmax())], torch.full((12,), INF, dtype=torch.float64)
    for _ in range(3):
        nearest = torch.minimum(nearest, 1 - unit @ unit[picks[-1]])
        nearest[picks] = 0
        score = logits[0] + nearest.log()
        if score.amax() - score.topk(2).values[1] < 1e-4 or score.amax() < logits.amax() - 80:
            return  # a near tie, or beside the largest weight nothing is left of the others
        picks.append(int(score.argmax()))
        assert found.indices[0, len(picks) - 1] == picks[-1]
        largest = torch.finfo(torch.float32).max
        distance = min(float(score.amax().exp()), largest)
        assert float(found.distances[0, len(picks) - 1]) == pytest.approx(distance, rel=1e-3, abs=1e-37)


@anywhere
def test_a_scale_that_brings_weights_back_into_the_range(backend: str) -> None:
    q = torch.tensor([[116.0, 146, 155, 49, 98]])
    found = coreset_select(rows(1, 5, 33), 4, q, 20.0, distance_scale=1e-30, backend=backend)
    assert found.indices.tolist() == [[2, 1, 0, 4]]  # q^20 alone is up to 2^145
    assert (found.distances[0, 1:] < 1e15).all()


@anywhere
def test_the_example_of_qualities_of_images(backend: str) -> None:
    x = rows(4, 8)
    coreset, grads, dgamma = train(x, 4, torch.tensor([50.0, 120, 200, 90]), 20.0, backend=backend)
    wanted = coreset_select(x.double(), 4, torch.tensor([50.0, 120, 200, 90]).double(), 20.0, backend="torch")
    assert torch.equal(coreset.indices, wanted.indices)
    assert coreset.distances.isfinite()[1:].all()
    assert all(grad.isfinite().all() for grad in [*grads, dgamma])


@anywhere
def test_a_row_that_cannot_be_picked_has_no_say_in_the_scale(backend: str) -> None:
    x, q = rows(1, 6, 5), torch.tensor([[50.0, 120, 200, 90, 70, 1e38]])
    x[0, 5] = NAN
    whole = coreset_select(x, 4, q, 20.0, backend=backend)
    same(whole, coreset_select(x[:, :5], 4, q[:, :5], 20.0, backend=backend))


@anywhere
def test_a_picked_row_is_not_picked_again_for_what_its_distance_rounds_to(backend: str) -> None:
    for seed in range(20):
        x = torch.nn.functional.normalize(rows(1, 5, 8, seed=seed), dim=-1)
        x = x * torch.tensor([1e6, 1, 2, 3, 4])[:, None]
        assert sorted(coreset_select(x, 5, None, 2.0, backend=backend).indices[0].tolist()) == [0, 1, 2, 3, 4]


@anywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_duplicates_of_rows_that_are_unit_but_for_rounding_are_0_apart(backend: str, dtype: torch.dtype) -> None:
    x = torch.nn.functional.normalize(rows(1, 8, 17), dim=-1).to(dtype)[:, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]]
    found = coreset_select(x, 6, torch.ones(1, 10), normalized=True, backend=backend)
    assert sorted(found.indices[0, :4].tolist()) == [0, 1, 2, 3]
    assert not found.distances[0, 4:].any()


@anywhere
@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-25, 1e25, 1e30, 1e37])
@pytest.mark.parametrize("given_quality", [False, True])
def test_norms_at_the_ends_of_the_range(backend: str, size: float, given_quality: bool) -> None:
    """Rows of any length point somewhere: the picks are those of the rows made unit, and gradients are finite."""
    unit = torch.nn.functional.normalize(rows(2, 15, 9), dim=-1)
    lengths = rows(2, 15, seed=3).abs() + 0.5
    q = lengths if given_quality else None
    x = unit * size * lengths[..., None]
    coreset, grads, dgamma = train(x, 4, q, backend=backend)
    wanted = coreset_select(x.double(), 4, None if q is None else q.double(), 0.5, backend="torch")
    assert torch.equal(coreset.indices, wanted.indices)
    assert coreset.counts.tolist() == [4, 4]
    assert all(grad.isfinite().all() for grad in [*grads, dgamma])


@anywhere
@pytest.mark.parametrize(("size", "gamma"), [(1e20, 0.5), (1e-20, 0.5), (1.0, 60.0), (1e20, 20.0)])
def test_sets_that_are_split_keep_what_their_first_pass_found(backend: str, size: float, gamma: float) -> None:
    x = rows(1, 80, 8) * size  # two parts of the Triton kernels, which meet between launches in the interpreter
    coreset, (grad,), dgamma = train(x, 4, gamma=gamma, backend=backend)
    norms = x[0].double().norm(dim=-1)
    unit, log_weight = x[0].double() / norms[:, None], gamma * norms.log()
    picks, nearest = [int(log_weight.argmax())], torch.full((80,), INF, dtype=torch.float64)
    for _ in range(3):
        nearest = torch.minimum(nearest, 1 - unit @ unit[picks[-1]])
        nearest[picks] = 0
        picks.append(int((nearest.log() + log_weight).argmax()))
    assert coreset.indices[0].tolist() == picks
    assert grad.isfinite().all()
    assert dgamma.isfinite()


@anywhere
def test_rows_of_denormal_or_infinite_norm_are_not_usable(backend: str) -> None:
    x = rows(1, 4, 300)
    x[0, 1], x[0, 2] = 1e-42, 3e38
    assert sorted(coreset_select(x, 4, torch.ones(1, 4), backend=backend).indices[0].tolist()) == [-1, -1, 0, 3]
    with pytest.raises(ValueError, match="row 1 of set 0 cannot be picked: its norm is"):
        coreset_select(x, 4, torch.ones(1, 4), strict=True, backend=backend)


@anywhere
def test_of_equal_rows_the_lowest_is_picked(backend: str) -> None:
    for seed in range(0, 60, 12 if backend == "triton" else 1):
        n = 3 + seed
        x = rows(1, n, (512, 131, 5)[seed % 5 % 3], seed=seed)  # also where a row begins between words of a vector
        far = int(coreset_select(x, 2, torch.ones(1, n), start=0, backend=backend).indices[0, 1])
        twice = torch.cat((x, x[:, [far]]), 1)
        assert int(coreset_select(twice, 2, torch.ones(1, n + 1), start=0, backend=backend).indices[0, 1]) == far


# --- layouts ------------------------------------------------------------------------------------------------------


@anywhere
@drawn
def test_memory_is_laid_out_as_the_caller_likes(backend: str, data: st.DataObject) -> None:
    wide = [] if backend == "triton" else [torch.float64]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, *wide]))
    sets, n, c = (data.draw(st.integers(1, most)) for most in (2 if backend == "triton" else 7, 7, 7))
    plain = rows(sets, n, c, seed=data.draw(st.integers(0, 1000))).to(dtype)
    order = data.draw(st.permutations(range(3)))
    inverse = [order.index(i) for i in range(3)]
    step = data.draw(st.integers(1, 2))
    stored = plain.permute(*order).repeat_interleave(step, -1)[..., ::step]
    laid = stored.permute(*inverse)
    assert torch.equal(laid, plain)
    found, wanted = (train(x, 3, backend=backend) for x in (laid, plain))
    same(found[0], wanted[0])
    leaf = laid.detach().requires_grad_()
    coreset_select(leaf, 3, backend=backend).features.float().sum().backward()
    again = plain.clone().requires_grad_()
    coreset_select(again, 3, backend=backend).features.float().sum().backward()
    assert torch.equal(leaf.grad, again.grad)


# --- memory -------------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = """
import resource, sys
import torch
from fcn_kernels import coreset_select
x = torch.randn(1, 2_000_000, 2, requires_grad=True)
coreset_select(torch.randn(1, 9, 64), 3, backend="cpp")  # compiled, and threads started
coreset_select(torch.randn(1, 9, 64, requires_grad=True), 3, backend="cpp").features.sum().backward()
k = int(sys.argv[1])
if sys.argv[2] == "backward":
    y = coreset_select(x, k, sample=True, backend="cpp").features.sum()
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[3]), used + int(sys.argv[3])))
try:
    if sys.argv[2] == "backward":
        y.backward()
    else:
        coreset_select(x, k, sample=True, backend="cpp")
    print("done")
except (MemoryError, RuntimeError) as error:
    print("raised", type(error).__name__)
"""


@pytest.mark.skipif(bool(cpp.unavailable(torch.float32)), reason="there is no C++")
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS") or sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("room", [0, 60 << 20, 110 << 20])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_running_out_of_memory_raises(direction: str, room: int) -> None:
    command = [sys.executable, "-c", OUT_OF_MEMORY, "4", direction, str(room)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(("raised", "done"))
    if room == 0:
        assert ran.stdout.startswith("raised")


@pytest.mark.parametrize("backend", ["torch", CPP])  # a step takes the interpreter a millisecond
def test_more_picks_than_memory_for_them_in_sets_of_few_rows(backend: str) -> None:
    assert coreset_select(rows(3, 2), 10**6, backend=backend).counts.tolist() == 3


def test_offsets_at_the_ends_of_int64_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # values are not looked at
    for low, high in ((-(2**63), 2**63 - 1), (2**63 - 1, -(2**63)), (5, -(2**63))):
        offsets = torch.tensor([0, low, high, 10])
        for backend in ("torch", "cpp"):
            coreset = coreset_select(rows(10, 4), 2, cu_seqlens=offsets, backend=backend)
            assert coreset.indices.shape == (3, 2)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("quality", [0.0239, 17.3])
def test_equal_rows_and_sets_are_equally_far_wherever_they_lie(backend: str, quality: float) -> None:
    """Where weights leave the range, too: vectors of elements would round otherwise than those that are left over."""
    dtype, generator = torch.float64, torch.Generator().manual_seed(0)
    for count in range(2, 40):
        x = torch.randn(8, generator=generator, dtype=dtype).expand(count, count, 8).clone()
        q = torch.full((count, count), quality, dtype=dtype)
        x[:, 0], q[:, 0] = 1, quality / 0.9
        found = coreset_select(x, 1, q, 30.0, return_min_distances=True, backend=backend).min_distances
        assert len(found[:, 1:].unique()) == 1


@anywhere
@pytest.mark.parametrize("dim", [4, 12])
@pytest.mark.parametrize(("gamma", "scale"), [(-1.0, 1.0), (0.0, 1e9)])
def test_weights_of_squared_distances_do_not_take_them_beyond_the_largest_number(
    backend: str, dim: int, gamma: float, scale: float
) -> None:
    x = torch.randn(6, dim, generator=torch.Generator().manual_seed(0)) * (1e20 if gamma else 1e17)
    options = {"metric": "sqeuclidean", "distance_scale": scale, "return_min_distances": True, "return_nearest": True}
    found = coreset_select(x, 3, torch.linspace(0.9, 0.2, 6), gamma, backend=backend, **options)
    largest = torch.finfo(torch.float32).max
    assert found.indices.tolist() == [0, 1, 2]
    assert found.distances.tolist() == [math.inf, largest, largest]
    assert found.min_distances.tolist() == [0, 0, 0, largest, largest, largest]
    assert found.nearest.tolist() == [0, 1, 2, 0, 0, 0]
