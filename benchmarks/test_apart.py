"""A training step on tiny sets by each implementation in processes of its own, as in a training script, which has one.

In a process that it shares, a step is as fast as what others left in the allocator lets it be: of the listing's step on
64 sets of 20 rows, a third is for memory that the allocator gives back to the system and asks for again, or not.
"""

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from benchmarks.conftest import Bench
from benchmarks.harness import Timing, reason
from benchmarks.workloads import BOTH, COMPILED, FUSED, Case, implementations

PROCESSES = {"quick": 2, "cpu": 5}
"""Of each implementation, which take turns."""
WARM_UP, STEPS = {"quick": 1, "cpu": 50}, {"quick": 3, "cpu": 600}

_timed: dict[Case, dict[str, list[float]]] = {}
_failed: dict[str, str] = {}


def rows(size: str) -> list[tuple[Case, str, str]]:
    """On a CPU, where memory comes from the system; torch.compile, which takes seconds, not in a short run."""
    if size == "cuda":
        return []
    case = Case(4, 20, 64, 3, torch.float32) if size == "quick" else Case(64, 20, 512, 3, torch.float32)
    return [(case, BOTH, name) for name in _contenders(size)]


def _contenders(size: str) -> tuple[str, ...]:
    return (FUSED,) if size == "quick" else (FUSED, COMPILED)


def seconds(case: Case, work: str, name: str, warm_up: int, steps: int) -> float:
    """The median step of this process."""
    made, _ = implementations((name,), case, work, torch.device("cpu"))
    step = made[name]
    times = []
    for turn in range(-warm_up, steps):
        begin = time.perf_counter()
        step(turn)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[warm_up:])


def of_processes(case: Case, work: str, size: str) -> dict[str, list[float]]:
    """What each process of each implementation measured; one that fails has no further one."""
    samples: dict[str, list[float]] = {name: [] for name in _contenders(size)}
    spawn = multiprocessing.get_context("spawn")
    for _ in range(PROCESSES[size]):
        for name in samples:
            if name in _failed:
                continue
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                measured = process.submit(seconds, case, work, name, WARM_UP[size], STEPS[size])
                try:
                    samples[name].append(measured.result())
                except Exception as error:
                    _failed[name] = reason(error)
    return samples


def test_apart(benchmark: Any, bench: Bench, row: tuple[Case, str, str]) -> None:
    case, work, name = row
    if case not in _timed:
        _timed[case] = of_processes(case, work, bench.size)
    if name in _failed:
        (pytest.fail if name == FUSED else pytest.skip)(_failed[name])
    timing = Timing.of(_timed[case][name])
    bench.facts(
        benchmark, "apart", implementation=name, work=work, clock="wall clock", median_s=timing.median,
        q1_s=timing.q1, q3_s=timing.q3, samples=timing.samples, **case.facts,
    )  # fmt: skip
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
