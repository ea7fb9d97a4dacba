"""k-center-greedy, the coreset of patch features in anomaly detection: one large set and many picks, no gradient."""

from typing import Any

import torch

from benchmarks.conftest import Bench
from benchmarks.workloads import EAGER, FORWARD, FUSED, Case

NAMES = (FUSED, EAGER)
CASES = {
    "quick": Case(1, 300, 64, 10, torch.float32),
    "cpu": Case(1, 8000, 384, 100, torch.float32),
    "cuda": Case(1, 200_000, 1536, 2000, torch.bfloat16),
}


def rows(size: str) -> list[tuple[Case, str, str]]:
    """One case a device."""
    return [(CASES[size], FORWARD, name) for name in NAMES]


def test_kcenter(benchmark: Any, bench: Bench, row: tuple[Case, str, str]) -> None:
    case, work, name = row
    bench.selection(benchmark, "k-center-greedy", case, work, name, NAMES)
