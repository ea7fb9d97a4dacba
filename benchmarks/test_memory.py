"""Peak memory of a training step, and what it keeps between forward and backward, beyond its inputs.

On a GPU the peak is what PyTorch's allocator had given out (``torch.cuda.max_memory_allocated``). On a CPU it is
summed from the allocations that PyTorch's profiler records, inside the operator too. Kept is the storage of the saved
tensors that are not inputs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.conftest import Bench
from benchmarks.harness import free_memory, reason
from benchmarks.workloads import BOTH, EAGER, FUSED, Case, contender, fused, listing, make_inputs

LENGTHS = {
    "quick": (100, 200),
    "cpu": (1000, 4000, 16_000, 64_000),
    "cuda": (1000, 4000, 16_000, 64_000, 256_000, 1_000_000),
}
SELECT = {FUSED: fused, EAGER: listing}


def rows(size: str) -> list[tuple[Case, str]]:
    """One set that grows."""
    dtype = torch.bfloat16 if size == "cuda" else torch.float32
    return [(Case(1, n, 512, 3, dtype), name) for n in LENGTHS[size] for name in SELECT]


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes in use at the most during a call, beyond those in use before it."""
    if device.type == "cuda":
        free_memory()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    used = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    return peak


def kept_bytes(forward: Callable[[], object], inputs: tuple[Tensor, ...]) -> int:
    """Bytes of storage that a forward pass saves for its backward pass, inputs aside."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive = forward()  # a freed storage's address may be given to another
    for tensor in inputs:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del alive
    return sum(kept.values())


def test_memory(benchmark: Any, bench: Bench, row: tuple[Case, str]) -> None:
    case, name = row
    select = SELECT[name](case.k)
    inputs = make_inputs(case, bench.device)
    call = contender(select, [inputs], BOTH)
    try:
        call(0)
        peak = peak_bytes(lambda: call(0), bench.device)
        kept = kept_bytes(lambda: select(inputs, True), inputs.leaves)
    except torch.OutOfMemoryError as error:
        pytest.skip(reason(error))
    bench.facts(
        benchmark, "memory", implementation=name, work=BOTH, peak_bytes=peak, kept_bytes=kept,
        input_bytes=case.row_bytes, **case.facts,
    )  # fmt: skip
    benchmark.pedantic(call, args=(0,), rounds=1, iterations=1)
