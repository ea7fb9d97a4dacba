"""What memory does, and one large set alone: what a prediction is to be held against before all else."""

from typing import Any

import torch

from benchmarks.conftest import Bench
from benchmarks.harness import Contender
from benchmarks.workloads import BOTH, FORWARD, FUSED, Case, Inputs

COPY, ADD = "a plain copy", "a sum of two vectors"
BANDWIDTH, LARGE = "bandwidth", "one large set"
CASES = {
    "quick": Case(1, 100, 64, 3, torch.float32),
    "cpu": Case(1, 100_000, 512, 3, torch.float32),
    "cuda": Case(1, 1_000_000, 512, 3, torch.bfloat16),
}


def rows(size: str) -> list[tuple[str, Case, str, str]]:
    """Memory first."""
    case = CASES[size]
    memory = [(BANDWIDTH, case, FORWARD, name) for name in (COPY, ADD)]
    return memory + [(LARGE, case, work, FUSED) for work in (FORWARD, BOTH)]


def build(case: Case, device: torch.device) -> tuple[dict[str, Contender], list[Inputs]]:
    """Over tensors as large as the set."""
    one, other, to = (torch.ones(case.all_rows, case.dim, dtype=case.dtype, device=device) for _ in range(3))
    return {COPY: lambda _: to.copy_(one), ADD: lambda _: torch.add(one, other, out=to)}, []


def test_bandwidth(benchmark: Any, bench: Bench, row: tuple[str, Case, str, str]) -> None:
    group, case, work, name = row
    if group == LARGE:
        bench.selection(benchmark, group, case, work, name, (FUSED,))
        return
    race = bench.race((group, case), lambda: build(case, bench.device))
    moved = case.row_bytes * (2 if name == COPY else 3)
    bench.record(benchmark, race, name, group, moved, work=work, least_bytes=moved, **case.facts)
