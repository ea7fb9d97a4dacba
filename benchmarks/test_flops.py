"""Multiply-adds by fvcore and counted bytes, of inference, against the number of rows.

fvcore counts a multiply-add as one, and of the listing the matrix products alone. The fused path is one operator to
it, counted by the formula that the operator registered with PyTorch, which counts two for a multiply-add.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.conftest import Bench
from benchmarks.harness import reason
from benchmarks.workloads import (
    EAGER,
    FORWARD,
    FUSED,
    Case,
    Inputs,
    Select,
    contender,
    counted_bytes,
    fused,
    listing,
    make_inputs,
    moved_bytes,
)
from fcn_kernels.selection.op import select_flops

SELECT = {FUSED: fused, EAGER: listing}
LENGTHS = {"quick": (100, 200), "cpu": (1000, 4000, 16_000), "cuda": (1000, 4000, 16_000)}


def rows(size: str) -> list[tuple[Case, str]]:
    """One set that grows."""
    return [(Case(1, n, 512, 3, torch.float32), name) for n in LENGTHS[size] for name in SELECT]


class Traced(nn.Module):
    """An implementation in the form that fvcore takes."""

    def __init__(self, select: Select, inputs: Inputs) -> None:
        super().__init__()
        self.select, self.inputs = select, inputs

    def forward(self, features: Tensor, quality: Tensor) -> Tensor:
        """Inference."""
        return self.select(self.inputs._replace(features=features, quality=quality), False)


def multiply_adds(select: Select, inputs: Inputs) -> int | str:
    """By fvcore, or why not."""
    try:
        fvcore = import_module("fvcore.nn")
    except ImportError:
        return "fvcore is not installed"

    def operator(given: list[Any], out: list[Any]) -> int:
        values = [fvcore.jit_handles.get_shape(v) if i == 0 else v.toIValue() for i, v in enumerate(given)]
        return select_flops(*values) // 2

    features, quality, gamma = (t.detach() for t in inputs.leaves)
    inputs = inputs._replace(features=features, quality=quality, gamma=gamma)
    try:
        counted = fvcore.FlopCountAnalysis(Traced(select, inputs), (inputs.features, inputs.quality))
        counted.unsupported_ops_warnings(False).set_op_handle("fcn_kernels::select", operator)
        return int(counted.total())
    except RuntimeError as error:
        return f"fvcore cannot trace it: {reason(error)}"


def test_flops(benchmark: Any, bench: Bench, row: tuple[Case, str]) -> None:
    case, name = row
    select = SELECT[name](case.k)
    inputs = make_inputs(case, bench.device)
    call = contender(select, [inputs], FORWARD)
    moved = moved_bytes(case, inputs, FORWARD) if name == FUSED else counted_bytes(lambda: call(0))
    bench.facts(
        benchmark, "cost", implementation=name, work=FORWARD, multiply_adds=multiply_adds(select, inputs),
        bytes_moved=moved, input_bytes=case.row_bytes, **case.facts,
    )  # fmt: skip
    benchmark.pedantic(call, args=(0,), rounds=1, iterations=1)
