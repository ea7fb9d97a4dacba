"""Selection, forward and forward + backward: this package, the listing in eager PyTorch, and the listing compiled."""

from typing import Any

import torch

from benchmarks.conftest import Bench
from benchmarks.workloads import BOTH, COMPILED, EAGER, FORWARD, FUSED, IJBC_ROWS, IJBC_SETS, LOOP, Case
from fcn_kernels import coreset_select
from reference.listing import coreset_listing

SHAPES = [(1, 8000), (256, 20), (64, 256), (1, 100_000)]


def rows(size: str) -> list[tuple[Case, str, str]]:
    """The targets' shapes first: torch.compile's time may run out, and so may the whole run's."""
    f32, bf16 = torch.float32, torch.bfloat16
    if size == "quick":
        cases = [Case(4, 20, 64, 3, f32), Case(6, None, 64, 3, f32, total=30)]
    elif size == "cpu":
        shapes = [(64, 20), *SHAPES]
        cases = [Case(b, n, 512, 3, f32) for b, n in shapes]
        cases.append(Case(IJBC_SETS // 10, None, 512, 3, f32, total=IJBC_ROWS // 10))
        cases += [Case(b, n, 512, 16, f32) for b, n in shapes]
    else:
        shapes = [*SHAPES, (1, 1_000_000)]
        cases = [Case(b, n, 512, 3, bf16) for b, n in shapes]
        cases.append(Case(IJBC_SETS, None, 512, 3, bf16, total=IJBC_ROWS))
        cases += [Case(b, n, 512, 16, bf16) for b, n in shapes]
        cases += [Case(b, n, 512, 3, f32) for b, n in SHAPES[:2]]
    listed = []
    for case in cases:
        # on a CPU the listing takes 5 s for one training step with 16 picks of 100,000 rows
        slow = size == "cpu" and case.k * case.all_rows > 10**6
        listed += [
            (case, work, name) for work in ((FORWARD,) if slow else (FORWARD, BOTH)) for name in contenders(case)
        ]
    return listed


def contenders(case: Case) -> tuple[str, ...]:
    """The listing has no packed form, and is compiled for one shape at a time."""
    return (FUSED, LOOP) if case.rows is None else (FUSED, EAGER, COMPILED)


def test_selection(benchmark: Any, bench: Bench, row: tuple[Case, str, str]) -> None:
    case, work, name = row
    race = bench.selection(benchmark, "selection", case, work, name, contenders(case))
    if name == EAGER and work == FORWARD and case.dtype == torch.float32:
        # the listing sums half precision in half precision, and so may pick others
        i = race.inputs[0]
        with torch.no_grad():
            ours = coreset_select(i.features, case.k, i.quality, i.gamma).indices
            theirs = coreset_listing(i.features, i.quality, case.k, i.gamma).indices
        assert torch.equal(ours, theirs)
