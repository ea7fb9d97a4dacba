"""What a call on tiny sets costs the host: checks, dispatch and launch. A bare operator shows what PyTorch takes of it.

Times are of the wall clock until a call returns. On a GPU the work is queued by then and not waited for.
"""

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.conftest import Bench
from benchmarks.harness import Timing
from benchmarks.workloads import BOTH, FORWARD, Case, Inputs, contender, fused, make_inputs
from fcn_kernels.backends import resolve_backend
from fcn_kernels.selection import op
from fcn_kernels.selection.cpp import launch as cpp
from fcn_kernels.selection.problem import Problem

PUBLIC, OPERATOR, BARE = "coreset_select", "its operator", "an operator that does nothing"
CALLS = {"quick": 5, "cpu": 50, "cuda": 200}
ROUNDS = 11

_library = torch.library.Library("fcn_benchmarks", "DEF")
_library.define("bare(Tensor features, Tensor quality, Tensor gamma, int k) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define("bare_backward(Tensor features, Tensor quality, Tensor gamma, Tensor grad) -> (Tensor, Tensor, Tensor)")


def _bare(features: Tensor, quality: Tensor, gamma: Tensor, k: int) -> tuple[Tensor, ...]:
    new, sets = features.new_empty, features.shape[0]
    return (
        new(sets, k, features.shape[-1]),
        new(sets, k),
        new(sets, k, dtype=torch.int64),
        new(sets, dtype=torch.int64),
    )


def _bare_backward(features: Tensor, quality: Tensor, gamma: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.empty_like(features), torch.empty_like(quality), torch.empty_like(gamma)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return (*torch.ops.fcn_benchmarks.bare_backward.default(*ctx.saved_tensors, grad), None)


_library.impl("bare", _bare, "CompositeExplicitAutograd")
_library.impl("bare_backward", _bare_backward, "CompositeExplicitAutograd")
torch.library.register_autograd("fcn_benchmarks::bare", _gradient, setup_context=_setup_context, lib=_library)


def operator(i: Inputs, sample: bool) -> Tensor:
    """The registered operator, without the public function around it."""
    seed = torch.tensor(1) if sample else None
    p = Problem(i.features, i.quality.reshape(-1), i.gamma, seed=seed, k=i.grad.shape[1])
    picked: Tensor = op.select(p, resolve_backend(None, i.features, cpp.unavailable))[0]
    return picked


def bare(i: Inputs, sample: bool) -> Tensor:
    """Four outputs, three inputs with gradients."""
    picked: Tensor = torch.ops.fcn_benchmarks.bare.default(*i.leaves, i.grad.shape[1])[0]
    return picked


def rows(size: str) -> list[tuple[Case, str, str]]:
    """Four sets of eight rows."""
    case = Case(4, 8, 64, 3, torch.float32)
    return [(case, work, name) for work in (FORWARD, BOTH) for name in (PUBLIC, OPERATOR, BARE)]


def test_host(benchmark: Any, bench: Bench, row: tuple[Case, str, str]) -> None:
    case, work, name = row
    select = {PUBLIC: fused(case.k), OPERATOR: operator, BARE: bare}[name]
    call = contender(select, [make_inputs(case, bench.device)], work)
    calls = CALLS[bench.size]
    samples = []
    for _ in range(ROUNDS):
        bench.clock.wait()
        begin = time.perf_counter()
        for turn in range(calls):
            call(turn)
        samples.append((time.perf_counter() - begin) / calls)
    timing = Timing.of(samples[1:])
    bench.facts(
        benchmark, "host", implementation=name, work=work, clock="wall clock, without waiting for the device",
        median_s=timing.median, q1_s=timing.q1, q3_s=timing.q3, samples=timing.samples, **case.facts,
    )  # fmt: skip
    benchmark.pedantic(call, args=(0,), rounds=1, iterations=1)
