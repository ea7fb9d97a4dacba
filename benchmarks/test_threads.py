"""Selection on one thread and on all, while other processes want the cores too.

Whoever loads data in worker processes, or runs tests side by side, selects on such a machine. A thread that has been
taken from its core must not hold up the others for longer than they save.
"""

import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.conftest import Bench
from benchmarks.harness import Timing
from benchmarks.workloads import BOTH, FORWARD, Case, contender, fused, make_inputs

BUSY = "while True: pass"
PAUSE = 0.02  # seconds between turns: OpenMP's threads spin for some milliseconds after their work
TURNS, TURN_SECONDS = {"quick": 2, "cpu": 8, "cuda": 8}, {"quick": 0.0, "cpu": 0.1, "cuda": 0.1}

_timed: dict[tuple[Case, str, int], dict[int, Timing]] = {}


def rows(size: str) -> list[tuple[Case, str, int, int]]:
    """Cases with no other busy process, one, and one for each core."""
    most = max(2, torch.get_num_threads())
    if size == "quick":
        cases = [(Case(1, 2000, 64, 3, torch.float32), FORWARD)]
    else:
        many = Case(1, 200_000, 64, 50, torch.float32)
        cases = [(many, FORWARD), (Case(1, 8000, 512, 3, torch.float32), BOTH)]
        cases += [(Case(64, 20, 512, 3, torch.float32), work) for work in (FORWARD, BOTH)]
    return [(*case, busy, threads) for case in cases for busy in (0, 1, most) for threads in (1, most)]


def timings(case: Case, work: str, busy: int, size: str) -> dict[int, Timing]:
    """Times on one thread and on all, in turns, beside busy processes of our own."""
    before = torch.get_num_threads()
    inputs = make_inputs(case, torch.device("cpu"))
    call = contender(fused(case.k), [inputs], work)
    samples: dict[int, list[float]] = {1: [], max(2, before): []}
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        for turn in range(TURNS[size]):
            for threads, times in samples.items():
                torch.set_num_threads(threads)
                time.sleep(PAUSE)
                call(turn)
                end = time.perf_counter() + TURN_SECONDS[size]
                while True:
                    begin = time.perf_counter()
                    call(turn)
                    times.append(time.perf_counter() - begin)
                    if time.perf_counter() > end:
                        break
    finally:
        torch.set_num_threads(before)
        for process in others:
            process.kill()
            process.wait()
    return {threads: Timing.of(times) for threads, times in samples.items()}


def test_threads(benchmark: Any, bench: Bench, row: tuple[Case, str, int, int]) -> None:
    case, work, busy, threads = row
    key = (case, work, busy)
    if key not in _timed:
        _timed[key] = timings(case, work, busy, bench.size)
    timing = _timed[key][threads]
    bench.facts(
        benchmark, "threads", implementation=f"{threads} threads, {busy} other busy processes", work=work,
        clock="wall clock", median_s=timing.median, q1_s=timing.q1, q3_s=timing.q3, samples=timing.samples,
        **case.facts,
    )  # fmt: skip
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
