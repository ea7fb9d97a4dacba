"""Time against the number of rows of one set. The report fits the exponent."""

from typing import Any

import torch

from benchmarks.conftest import Bench
from benchmarks.workloads import BOTH, EAGER, FORWARD, FUSED, Case

NAMES = (FUSED, EAGER)
LENGTHS = {
    "quick": (100, 200, 400),
    "cpu": (1000, 3000, 10_000, 30_000, 100_000),
    "cuda": (1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000),
}


def rows(size: str) -> list[tuple[Case, str, str]]:
    """B, C and K stay, N grows."""
    dtype = torch.bfloat16 if size == "cuda" else torch.float32
    cases = [Case(1, n, 512, 3, dtype) for n in LENGTHS[size]]
    return [(case, work, name) for work in (FORWARD, BOTH) for case in cases for name in NAMES]


def test_scaling(benchmark: Any, bench: Bench, row: tuple[Case, str, str]) -> None:
    case, work, name = row
    bench.selection(benchmark, "scaling", case, work, name, NAMES)
