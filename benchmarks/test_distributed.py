"""Selection from one set whose rows are spread over processes, a thread each, by the number of these and of rows.

The share of collectives is what rank 0 spends in them, waiting for others too. More processes than cores wait for one
another's turns, which says nothing of machines of their own.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.conftest import Bench
from benchmarks.harness import Timing
from benchmarks.workloads import BOTH, FORWARD, Case
from fcn_kernels import coreset_select, distributed

RANKS = {"quick": (1, 2), "cpu": (1, 2, 4), "cuda": (1, 2, 4)}
LENGTHS = {"quick": (2000,), "cpu": (20_000, 200_000), "cuda": (20_000, 200_000)}
PICKS = {"quick": 5, "cpu": 50, "cuda": 50}
SAMPLES = {"quick": 2, "cpu": 5, "cuda": 5}
ALONE = 0
"""Ranks of a call without a group."""

Measured = dict[tuple[str, str, int], tuple[list[float], float]]
_measured: Measured = {}


def rows(size: str) -> list[tuple[Case, str, int]]:
    """One process without a group, then groups of more and more, on CPUs with gloo whatever the machine has."""
    cases = [Case(1, n, 64, PICKS[size], torch.float32) for n in LENGTHS[size]]
    jobs = [*((case, FORWARD) for case in cases), (cases[0], BOTH)]
    return [(*job, ranks) for job in jobs for ranks in (ALONE, *RANKS[size])]


def _run(case: Case, work: str, group: Any, rank: int, ranks: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    share = case.rows // max(ranks, 1)
    local = torch.randn(case.rows, case.dim, generator=generator)[rank * share : (rank + 1) * share]
    local.requires_grad_(work == BOTH)
    call = coreset_select if ranks == ALONE else distributed.coreset_select
    options = {} if ranks == ALONE else {"group": group}

    def once() -> None:
        picks = call(local, case.k, gamma=0.5, **options)
        if work == BOTH:
            picks.features.sum().backward()

    return once


def _process(rank: int, size: str, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=max(RANKS[size]))
    spent, gather = [0.0], dist.all_gather

    def timed(*args: Any, **options: Any) -> None:
        begin = time.perf_counter()
        gather(*args, **options)
        spent[0] += time.perf_counter() - begin

    dist.all_gather = timed
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in RANKS[size]} | {ALONE: None}
    measured: Measured = {}
    for case, work, ranks in rows(size):
        dist.barrier()
        if rank >= max(ranks, 1):
            continue
        once = _run(case, work, groups[ranks], rank, ranks)
        once()
        spent[0], times = 0.0, []
        for _ in range(SAMPLES[size]):
            begin = time.perf_counter()
            once()
            times.append(time.perf_counter() - begin)
        measured[str(case), work, ranks] = times, spent[0] / sum(times)
    if rank == 0:
        torch.save(measured, out)
    dist.barrier()
    os._exit(0)  # gloo's threads need not be waited for


def test_distributed(benchmark: Any, bench: Bench, row: tuple[Case, str, int]) -> None:
    case, work, ranks = row
    if not _measured:
        with tempfile.TemporaryDirectory() as folder:
            store, out = Path(folder) / "store", Path(folder) / "measured.pt"
            mp.spawn(_process, (bench.size, str(store), str(out)), nprocs=max(RANKS[bench.size]))
            _measured.update(torch.load(out))
    times, share = _measured[str(case), work, ranks]
    timing = Timing.of(times)
    name = "one process" if ranks == ALONE else f"{ranks} rank{'s' * (ranks > 1)}, gloo"
    bench.facts(
        benchmark, "distributed", implementation=name, work=work, clock="wall clock", median_s=timing.median,
        q1_s=timing.q1, q3_s=timing.q3, samples=timing.samples, ranks=ranks, collective_share=share, **case.facts,
    )  # fmt: skip
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)


pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
