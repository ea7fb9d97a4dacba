"""context_statistics against products and topk, in time, memory and FLOPs; faiss beside it where it is installed.

All find, for unit rows (N, C) and a bank (M, C), the mean and deviation of each row's k best cosines. Own identities
are left out by all but faiss, which cannot do that for each row; with them every row has ten rows in the bank.

    pytest benchmarks/test_neighbors.py --benchmark-only --time-limit 900 --benchmark-json=RESULTS.json
    python -m benchmarks.report RESULTS.json --out FOLDER

takes about ten minutes on two cores, and 10 GB.
"""

import ctypes
import re
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.conftest import Bench
from benchmarks.harness import Contender, free_memory
from benchmarks.workloads import BOTH, FORWARD, FUSED, Inputs
from fcn_kernels import context_statistics
from fcn_kernels.neighbors.cpp import launch
from fcn_kernels.neighbors.op import statistics_flops

WHOLE, BLOCKS, FAISS = "matmul + topk", "blocks of 256 rows + topk", "faiss"
UNFILTERED = "fused, float32 alone"
ALL = "fused, all rows"
COUNTED = "counted by fvcore"
EACH = 10  # rows of an identity in the bank
IJBC = (23_124, 206_000)  # templates, and a bank of as many people as public training sets have


class Search(NamedTuple):
    """Of N rows in a bank of M."""

    rows: int
    bank: int
    dim: int
    k: int
    of: int = 0
    """These rows are a sample of so many, by which the time is scaled; 0: they are all."""
    alone: bool = False
    """Others take too long."""

    @property
    def facts(self) -> dict[str, Any]:
        """As a result row says it."""
        made = {"sets": 1, "rows": self.of or self.rows, "all_rows": self.of or self.rows, "bank": self.bank}
        scale = {"scaled_by": self.of / self.rows} if self.of else {}
        return made | {"dim": self.dim, "k": self.k, "dtype": "float32"} | scale

    def __str__(self) -> str:
        sample = f" by {self.rows}" if self.of else ""
        return f"N={self.of or self.rows}{sample} M={self.bank} K={self.k}"


class Drawn(NamedTuple):
    """What is searched."""

    x: Tensor
    bank: Tensor
    ids: Tensor
    bank_ids: Tensor


SEARCHES = {
    "quick": [Search(20, 500, 64, 10)],
    "cpu": [
        *(Search(n, 50_000, 512, 50) for n in (1, 4, 15)),
        *(Search(1000, m, 512, 50) for m in (1_000, 10_000, 100_000)),
        Search(4000, 50_000, 512, 50),
        Search(4000, 50_000, 512, 300),
        Search(250, 1_000_000, 512, 50, of=1000),
        Search(1024, IJBC[1], 512, 50, of=IJBC[0]),
        Search(*IJBC, 512, 50, alone=True),
    ],
    "cuda": [
        *(Search(4000, m, 512, 50) for m in (1_000, 10_000, 100_000, 1_000_000)),
        *(Search(n, 50_000, 512, 50) for n in (1, 15)),
        Search(4000, 50_000, 512, 300),
        Search(*IJBC, 512, 50),
    ],
}
COUNTED_ROWS = (20, 1000)
TRAINED = {"quick": 10, "cpu": 50, "cuda": 50}  # k of the searches whose gradient is timed, too


def draw(search: Search, device: torch.device) -> Drawn:
    """Identities with rows about them, as an embedder gives them."""
    generator = torch.Generator(device).manual_seed(0)
    people = max(1, search.bank // EACH)
    centers = F.normalize(torch.randn(people, search.dim, generator=generator, device=device), dim=1)
    sides = []
    for n in (search.rows, search.bank):
        ids = torch.randint(people, (n,), generator=generator, device=device)
        rows = torch.randn(n, search.dim, generator=generator, device=device).mul_(0.04)  # in place, as it may be 2 GB
        for at in range(0, n, 4096):
            rows[at : at + 4096] += centers[ids[at : at + 4096]]
        sides.append((F.normalize(rows, dim=1, out=rows), ids))
    (x, ids), (bank, bank_ids) = sides
    return Drawn(x, bank, ids, bank_ids)


def ours(d: Drawn, k: int) -> tuple[Tensor, Tensor]:
    """This package."""
    context = context_statistics(d.x, d.bank, k, ids=d.ids, bank_ids=d.bank_ids, normalized=True)
    return context.mean, context.std


def unfiltered(d: Drawn, k: int) -> tuple[Tensor, Tensor]:
    """This package where a processor has no faster integers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "FILTER", 0)
        return ours(d, k)


def whole(d: Drawn, k: int) -> tuple[Tensor, Tensor]:
    """All scores at once."""
    scores = (d.x @ d.bank.T).masked_fill_(d.ids[:, None] == d.bank_ids, -torch.inf).topk(k).values
    return scores.mean(1), scores.std(1, correction=0)


def blocks(d: Drawn, k: int) -> tuple[Tensor, Tensor]:
    """The same for some rows at a time."""
    each = [whole(d._replace(x=d.x[at : at + 256], ids=d.ids[at : at + 256]), k) for at in range(0, len(d.x), 256)]
    mean, std = (torch.cat(column) for column in zip(*each, strict=True))
    return mean, std


def with_faiss(d: Drawn, k: int) -> tuple[Tensor, Tensor]:
    """An exact index of inner products; own identities are not left out."""
    scores = torch.from_numpy(_faiss_index(d.bank).search(d.x.numpy(), k)[0])
    return scores.mean(1), scores.std(1, correction=0)


@lru_cache(1)
def _faiss_index(bank: Tensor) -> Any:
    """Made once, in the untimed first call."""
    index = import_module("faiss").IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    return index


FIND: dict[str, Callable[[Drawn, int], tuple[Tensor, Tensor]]] = {
    FUSED: ours,
    ALL: ours,
    UNFILTERED: unfiltered,
    WHOLE: whole,
    BLOCKS: blocks,
    FAISS: with_faiss,
}
MOST_SCORES = 1 << 30  # 4 GB, of which eager operations make several


def missing(name: str, search: Search, device: torch.device) -> str:
    """Why an implementation is left out, or ""."""
    if name == WHOLE and search.rows * search.bank > MOST_SCORES:
        return f"{search.rows:,} x {search.bank:,} scores are too many at once"
    if name == FAISS and device.type == "cuda":
        return "faiss is timed on CPUs"
    if name == FAISS and not find_spec("faiss"):
        return "faiss is not installed: pip install faiss-cpu"
    return ""


def names(search: Search, work: str, size: str) -> list[str]:
    """What is timed, or counted, side by side."""
    if search.alone:
        return [ALL]
    if work != FORWARD:
        return [FUSED, WHOLE]
    long = size == "cpu" and search.rows >= 4000
    return [FUSED, *([UNFILTERED] if long else []), WHOLE, BLOCKS, FAISS]


def rows(size: str) -> list[tuple[Search, str, str]]:
    """Inference of all; training where a gradient is to be had; FLOPs against the bank's size."""
    whole = [s for s in SEARCHES[size] if not s.of and not s.alone]
    found = [(s, FORWARD) for s in whole]
    found += [(s, BOTH) for s in whole if s.k == TRAINED[size]][-1:]
    found += [(s, COUNTED) for s in whole if s.rows in COUNTED_ROWS]
    found += [(s, FORWARD) for s in SEARCHES[size] if s not in whole]  # the longest, should time run out
    return [(search, work, name) for search, work in found for name in names(search, work, size)]


def contender(name: str, d: Drawn, k: int, work: str) -> Contender:
    """One call."""

    def run(turn: int) -> object:
        if work == FORWARD:
            with torch.inference_mode():
                return FIND[name](d, k)
        x = d.x.detach().requires_grad_()
        mean, std = FIND[name](d._replace(x=x), k)
        (mean.sum() + std.sum()).backward()
        return x.grad

    return run


def peak_resident(call: Callable[[], object]) -> int:
    """Bytes by which a process's memory grows at the most during a call; 0 where Linux does not tell.

    PyTorch's own count does not see what C++ takes.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and reset.exists()):
        return 0

    def kilobytes(name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        return int(found[1]) if found else 0

    free_memory()
    if hasattr(trim := ctypes.CDLL(None), "malloc_trim"):
        trim.malloc_trim(0)  # or what was freed before would be used again, and not be seen
    reset.write_text("5")  # the peak is forgotten
    before = kilobytes("VmRSS")
    call()
    return 1024 * max(0, kilobytes("VmHWM") - before)


class Traced(nn.Module):
    """An implementation in the form that fvcore takes."""

    def __init__(self, name: str, d: Drawn, k: int) -> None:
        super().__init__()
        self.find, self.d, self.k = FIND[name], d, k

    def forward(self, x: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        """Inference."""
        return self.find(self.d._replace(x=x, bank=bank), self.k)


def by_fvcore(name: str, d: Drawn, k: int) -> int | str:
    """Multiply-adds, the operator's by its formula, or why they are not counted."""
    try:
        fvcore = import_module("fvcore.nn")
    except ImportError:
        return "fvcore is not installed"

    def operator(given: list[Any], out: list[Any]) -> int:
        return statistics_flops(*map(fvcore.jit_handles.get_shape, given[:2])) // 2

    counted = fvcore.FlopCountAnalysis(Traced(name, d, k), (d.x, d.bank)).unsupported_ops_warnings(False)
    return int(counted.set_op_handle("fcn_kernels::context_statistics", operator).total())


def test_neighbors(benchmark: Any, bench: Bench, row: tuple[Search, str, str]) -> None:
    search, work, name = row
    if why := missing(name, search, bench.device):
        pytest.skip(why)
    if work == COUNTED:
        d = draw(search, bench.device)
        facts = search.facts | {"work": work, "multiply_adds": by_fvcore(name, d, search.k)}
        bench.facts(benchmark, "neighbors cost", implementation=name, **facts)
        benchmark.pedantic(contender(name, d, search.k, FORWARD), args=(0,), rounds=1, iterations=1)
        return

    def build() -> tuple[dict[str, Contender], list[Inputs]]:
        d = draw(search, bench.device)
        side_by_side = [n for n in names(search, work, bench.size) if not missing(n, search, bench.device)]
        return {n: contender(n, d, search.k, work) for n in side_by_side}, []

    race = bench.race(("neighbors", search, work), build)
    flops = statistics_flops((search.rows, search.dim), (search.bank, search.dim))
    peak = peak_resident(partial(race.contenders[name], 0)) if bench.device.type == "cpu" else 0
    counted = {"multiply_adds": flops // 2} if work == FORWARD else {}
    facts = search.facts | counted | {"work": work, "peak_bytes": peak}
    bench.record(benchmark, race, name, "neighbors", None, **facts)
