"""Time against the number of rows N of each of some sets. The report fits the exponent."""

from typing import Any

import torch

from benchmarks.conftest import Bench
from benchmarks.harness import Contender
from benchmarks.workloads import BOTH, EAGER, FORWARD, FUSED, Case, Inputs, cut, implementations, make_inputs

SETS = {"quick": 2, "cpu": 8, "cuda": 8}
"""Several, or what a call costs whatever its size would bend the line: a sixth of the time of one set of 10,000 rows on
two cores. test_selection.py has sets alone."""
LENGTHS = {
    "quick": (100, 200, 400),
    "cpu": (1000, 3000, 10_000, 30_000, 100_000),
    "cuda": (1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000),
}
EAGER_MOST = 30_000
"""On a CPU: of 100,000 rows in each set, 1.6 GB, a training step of the listing makes many copies."""


def cases(size: str, name: str) -> list[Case]:
    """B, C and K stay, N grows."""
    dtype = torch.bfloat16 if size == "cuda" else torch.float32
    most = EAGER_MOST if (size, name) == ("cpu", EAGER) else LENGTHS[size][-1]
    return [Case(SETS[size], n, 512, 3, dtype) for n in LENGTHS[size] if n <= most]


def rows(size: str) -> list[tuple[Case, str, str]]:
    """Lengths together, as they are timed."""
    return [(case, work, name) for work in (FORWARD, BOTH) for name in (FUSED, EAGER) for case in cases(size, name)]


def test_scaling(benchmark: Any, bench: Bench, row: tuple[Case, str, str]) -> None:
    """The lengths take turns, so that what else the machine does slows all of them or none, and their rows from the
    same memory, so that none finds more of them in a cache."""
    case, work, name = row

    def build() -> tuple[dict[str, Contender], list[Inputs]]:
        pool = make_inputs(cases(bench.size, name)[-1], bench.device)
        contenders, inputs = {}, []
        for each in cases(bench.size, name):
            made, of_length = implementations((name,), each, work, bench.device, cut(pool, each))
            contenders[str(each)] = made[name]
            inputs.append(of_length[0])
        return contenders, inputs

    race = bench.race(("scaling", name, work), build)
    inputs = race.inputs[cases(bench.size, name).index(case)]
    bench.selected(benchmark, "scaling", race, case, work, name, inputs, timed_as=str(case))
