"""Cluster and Aggregate against its plain form: time, memory of a training step, multiply-adds.

The plain form takes one template at a time, as the authors' evaluation does. Styles are made before (64 columns). One
shot, a template's rows all see one another, and cost quadratic; in chunks they cost the same each.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.conftest import Bench
from benchmarks.harness import Contender
from benchmarks.test_memory import kept_bytes, peak_bytes
from benchmarks.workloads import BOTH, FORWARD, FUSED, IJBC_ROWS, IJBC_SETS, LOOPED_SETS, template_lengths
from fcn_kernels import ClusterAggregate
from reference.cluster_aggregate import ReferenceClusterAggregate

PLAIN = "plain, set by set"
BY_FVCORE = "plain, by fvcore"
TIME, MEMORY, COST = "clustering", "clustering memory", "clustering cost"
DIM, CLUSTERS = 512, 4
PLAIN_MOST = 2000
"""Rows of one shot up to which the plain form is run: of 10,000 it makes scores of 3.2 GB a block."""


class Case(NamedTuple):
    """Templates of one shape; rows None: packed, of unequal lengths, ``total`` rows in all."""

    sets: int
    rows: int | None
    chunk: int | None
    total: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each template."""
        return template_lengths(self.sets, self.total) if self.rows is None else (self.rows,) * self.sets

    @property
    def facts(self) -> dict[str, Any]:
        """The case as a result row says it."""
        rows = self.total if self.rows is None else self.sets * self.rows
        return {
            "sets": self.sets,
            "rows": self.rows or "packed",
            "all_rows": rows,
            "dim": DIM,
            "k": CLUSTERS,
            "dtype": "float32",
            "chunk": self.chunk or 0,
        }

    def __str__(self) -> str:
        return f"B={self.sets} N={self.rows or 'packed'} chunk={self.chunk}"


CASES = {
    "quick": (Case(3, 20, None), Case(1, 60, 32), Case(5, None, 32, 90)),
    "cpu": (
        *(Case(sets, 20, None) for sets in (1, 16, 64, 256)),
        *(Case(1, n, None) for n in (250, 500, 1000, 2000, 4000)),
        *(Case(1, n, 512) for n in (1000, 2000, 4000, 10_000)),
        Case(IJBC_SETS, None, 512, IJBC_ROWS),
    ),
    "cuda": (
        *(Case(sets, 20, None) for sets in (1, 64, 1024)),
        *(Case(1, n, None) for n in (1000, 2000, 4000, 10_000)),
        *(Case(1, n, 512) for n in (1000, 10_000, 100_000)),
        Case(IJBC_SETS, None, 512, IJBC_ROWS),
    ),
}
KEPT = {"quick": (60,), "cpu": (1000, 4000), "cuda": (1000, 4000)}


def rows(size: str) -> list[tuple[str, Case, str, str]]:
    """What is measured, of what, the work, and by which implementation."""

    def names(case: Case) -> tuple[str, ...]:
        small = case.chunk is not None or (case.rows or 0) <= PLAIN_MOST
        return (FUSED, PLAIN) if small else (FUSED,)

    timed = [(TIME, case, FORWARD, name) for case in CASES[size] for name in names(case)]
    kept = [Case(1, n, chunk) for n in KEPT[size] for chunk in (None, 512)]
    memory = [(MEMORY, case, BOTH, name) for case in kept for name in names(case)]
    cost = [(COST, Case(1, n, None), FORWARD, name) for n in KEPT[size] for name in (FUSED, PLAIN, BY_FVCORE)]
    return [*memory, *cost, *timed]


class Inputs(NamedTuple):
    """Rows of all templates, one after another."""

    features: Tensor  # (T, C)
    styles: Tensor  # (T, 64)
    cu_seqlens: Tensor
    lengths: tuple[int, ...]


def make(case: Case, device: torch.device) -> tuple[ClusterAggregate, ReferenceClusterAggregate, Inputs]:
    """Both heads with the same weights, in eval(), and rows with norms of about 22."""
    torch.manual_seed(0)
    head = ClusterAggregate(DIM, CLUSTERS, drop_path=0.0).to(device).eval()
    plain = ReferenceClusterAggregate(DIM, CLUSTERS).to(device).eval()
    plain.load_state_dict(head.state_dict())
    total = sum(case.lengths)
    offsets = torch.tensor([0, *case.lengths], device=device).cumsum(0)
    return head, plain, Inputs(torch.randn(total, DIM, device=device), torch.randn(total, 64, device=device), offsets,
                               case.lengths)  # fmt: skip


def fused(case: Case, head: ClusterAggregate, i: Inputs) -> Callable[[], Tensor]:
    """All templates at once."""
    return lambda: head(i.features, i.styles, cu_seqlens=i.cu_seqlens, chunk=case.chunk).descriptor


def plain(case: Case, head: ReferenceClusterAggregate, i: Inputs, most: int) -> Callable[[], Tensor]:
    """One template after another, up to `most` of them."""
    parts = list(zip(i.features.split(i.lengths), i.styles.split(i.lengths), strict=True))
    step = max(1, len(parts) // most)
    chosen = [(x, s, _pieces(len(x), case.chunk)) for x, s in parts[::step][:most]]

    def run() -> Tensor:
        return torch.stack([torch.nn.functional.normalize(head(x, s, p).aggregate, dim=0) for x, s, p in chosen])

    return run


def _pieces(n: int, chunk: int | None) -> list[int]:
    """As numpy.array_split cuts, and as the head does."""
    count = 1 if chunk is None else -(-n // chunk)
    return [n // count + (i < n % count) for i in range(count)]


def _timed(benchmark: Any, bench: Bench, case: Case, work: str, name: str) -> None:
    sampled = min(LOOPED_SETS, case.sets)

    def build() -> tuple[dict[str, Contender], list[Any]]:
        head, other, inputs = make(case, bench.device)
        calls = {FUSED: fused(case, head, inputs)}
        if (TIME, case, work, PLAIN) in rows(bench.size):
            calls[PLAIN] = plain(case, other, inputs, sampled)

        def contender(call: Callable[[], Tensor]) -> Contender:
            def run(turn: int) -> object:
                with torch.inference_mode():
                    return call()

            return run

        return {each: contender(call) for each, call in calls.items()}, []

    race = bench.race((TIME, case), build)
    scale = {"scaled_by": case.sets / sampled} if name == PLAIN else {}
    bench.record(benchmark, race, name, TIME, None, work=work, **case.facts, **scale)


def _memory(benchmark: Any, bench: Bench, case: Case, work: str, name: str) -> None:
    head, other, inputs = make(case, bench.device)
    features = inputs.features.requires_grad_()
    call = fused(case, head, inputs) if name == FUSED else plain(case, other, inputs, case.sets)
    parameters = tuple((head if name == FUSED else other).parameters())
    given = (features, inputs.styles, *parameters)

    def step() -> None:
        torch.autograd.grad(call().sum(), features)

    step()
    bench.facts(
        benchmark, MEMORY, implementation=name, work=work, peak_bytes=peak_bytes(step, bench.device),
        kept_bytes=kept_bytes(call, given), input_bytes=features.nbytes + inputs.styles.nbytes, **case.facts,
    )  # fmt: skip
    benchmark.pedantic(step, rounds=1, iterations=1)


def _cost(benchmark: Any, bench: Bench, case: Case, work: str, name: str) -> None:
    head, other, inputs = make(case, bench.device)
    call = fused(case, head, inputs) if name == FUSED else plain(case, other, inputs, case.sets)
    if name == BY_FVCORE:
        counted = by_fvcore(other, inputs)
    else:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        counted = counter.get_total_flops() // 2
    bench.facts(benchmark, COST, implementation=name, work=work, multiply_adds=counted, **case.facts)
    benchmark.pedantic(call, rounds=1, iterations=1)


class Traced(nn.Module):
    """The plain form as fvcore takes it."""

    def __init__(self, head: ReferenceClusterAggregate) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, styles: Tensor) -> Tensor:
        """The aggregate of one template, in one shot."""
        return self.head(features, styles).aggregate  # type: ignore[no-any-return]


def by_fvcore(head: ReferenceClusterAggregate, i: Inputs) -> int | str:
    """Multiply-adds, or why they are not counted."""
    try:
        fvcore = import_module("fvcore.nn")
    except ImportError:
        return "fvcore is not installed"
    with torch.no_grad():
        counted = fvcore.FlopCountAnalysis(Traced(head), (i.features, i.styles)).unsupported_ops_warnings(False)
        return int(counted.total())


def test_clustering(benchmark: Any, bench: Bench, row: tuple[str, Case, str, str]) -> None:
    kind, case, work, name = row
    {TIME: _timed, MEMORY: _memory, COST: _cost}[kind](benchmark, bench, case, work, name)
