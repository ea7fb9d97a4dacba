"""Farthest-point and k-center-greedy samplers in their own metric, Euclidean, where they are installed (extra [peers]).

Everyone starts at the same row. A peer that picks other rows than we do is named as what it is: an approximation
(fpsample's buckets), another question (anomalib's coreset of projected rows), or left out, with where it differs.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Bench
from benchmarks.harness import Contender
from benchmarks.workloads import FORWARD, FUSED, Inputs
from fcn_kernels import coreset_select
from fcn_kernels.integrations.anomalib import KCenterGreedy
from fcn_kernels.integrations.scikit_activeml import k_greedy_center

Pick = Callable[[Tensor, int], Any]
"""Rows (B, N, C) and K: the indices (B, K) of K picks, the first of them row 0 but for labelled rows."""

LABELLED = 100
"""Rows at the beginning that have a label, for active learning."""
ANCHORS = 1000
SEED = 0
"""Of everything random: with it anomalib's class and ours begin at the same row."""


class Job(NamedTuple):
    """Sets of one shape, and what is asked of them."""

    name: str
    sets: int
    rows: int
    dim: int
    k: int

    @property
    def facts(self) -> dict[str, Any]:
        """As a result row says it."""
        return {"sets": self.sets, "rows": self.rows, "all_rows": self.sets * self.rows, "dim": self.dim, "k": self.k,
                "dtype": "float32"}  # fmt: skip

    def __str__(self) -> str:
        return f"{self.name} B={self.sets} N={self.rows} C={self.dim} K={self.k}"


POINTS, BANK, STEP, QUERY = "points", "memory bank", "PatchCore's coreset step", "active learning"
RESUMED, EACH, ANCHORED = "resumed", "K per set", "anchors"


def ours(rows: Tensor, k: int, **options: Any) -> Tensor:
    """This package."""
    return coreset_select(rows, k, metric="sqeuclidean", **options).indices


def resumed(rows: Tensor, k: int) -> Tensor:
    """In two calls, the second from the state of the first."""
    first = coreset_select(rows, k // 2, metric="sqeuclidean", return_min_distances=True)
    more = ours(rows, k - k // 2, min_distances=first.min_distances)
    return torch.cat([first.indices, more], 1)


def each_its_own(rows: Tensor, k: int) -> Tensor:
    """From an eighth of k to k picks."""
    return ours(rows, torch.linspace(k / 8, k, len(rows)).long())


def torch_fps(rows: Tensor, k: int) -> Tensor:
    """Without its checks, which wait for the device."""
    everything = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    sampler = import_module("torch_fps").farthest_point_sampling
    return sampler(rows, everything, k, random_start=False, validate=False, assume_finite=True)


def torch_quickfps(rows: Tensor, k: int, call: str = "sample_idx") -> Tensor:
    """With the bucket height that it takes by itself."""
    return getattr(import_module("torch_quickfps"), call)(rows, k, start_idx=0)


def torch_cluster(rows: Tensor, k: int) -> Tensor:
    """It takes a ratio, and rounds ratio * N up."""
    sets, n, dim = rows.shape
    ends = torch.arange(0, sets * n + 1, n, device=rows.device)
    sampler = import_module("torch_cluster").fps
    picks: Tensor = sampler(rows.reshape(-1, dim), ptr=ends, ratio=(k - 0.5) / n, random_start=False)
    return picks.view(sets, k) - ends[:-1, None]


def fpsample(rows: Tensor, k: int, call: str = "fps_sampling", *height: int) -> Tensor:
    """Set by set: it takes one."""
    sampler = getattr(import_module("fpsample"), call)
    return torch.stack(
        [torch.from_numpy(sampler(one, k, *height, start_idx=0).astype("int64")) for one in rows.numpy()]
    )


@cache
def anomalib_loop() -> Any:
    """anomalib's module with the loop alone, by its path: the package would load all models and what they need."""
    (folder,) = find_spec("anomalib").submodule_search_locations
    components = Path(folder) / "models" / "components"

    def load(path: Path) -> Any:
        spec = importlib.util.spec_from_file_location(f"anomalib_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    names = ["anomalib", "anomalib.models", "anomalib.models.components"]
    names.append(f"{names[-1]}.dimensionality_reduction")
    before = {name: sys.modules.get(name) for name in names}
    sys.modules |= {name: ModuleType(name) for name in names}
    try:
        vars(sys.modules[names[-1]])["SparseRandomProjection"] = load(
            components / "dimensionality_reduction" / "random_projection.py"
        ).SparseRandomProjection
        loop = load(components / "sampling" / "k_center_greedy.py")
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    loop.tqdm = lambda steps, **_: steps  # no progress bar among the results
    return loop


def anomalib(rows: Tensor, k: int, projected: bool) -> Tensor:
    """It projects what has two dimensions, and not what has three."""
    torch.manual_seed(SEED)
    (bank,) = rows
    sampler = anomalib_loop().KCenterGreedy(bank if projected else bank[..., None], (k + 0.5) / len(bank))
    return torch.tensor([sampler.select_coreset_idxs()])


def adapted(rows: Tensor, k: int) -> Tensor:
    """Our class in anomalib's place, with the start that its loop draws."""
    torch.manual_seed(SEED)
    return torch.tensor([KCenterGreedy(rows[0], (k + 0.5) / rows.shape[1]).select_coreset_idxs()])


def labels(rows: Tensor) -> Any:
    """Of the first rows, as NumPy's."""
    known = torch.full((rows.shape[1],), torch.nan)
    known[:LABELLED] = 1
    return known.numpy()


def scikit_activeml(rows: Tensor, k: int) -> Tensor:
    """Its query, without utilities."""
    strategy = import_module("skactiveml.pool").CoreSet(random_state=SEED)
    return torch.from_numpy(strategy.query(rows[0].numpy(), labels(rows), batch_size=k))[None]


def queried(rows: Tensor, k: int) -> Tensor:
    """The function under our CoreSet, without utilities."""
    picks, _ = k_greedy_center(rows[0].numpy(), labels(rows), k, random_state=SEED, return_utilities=False)
    return torch.from_numpy(picks)[None]


def anchored(rows: Tensor, k: int, count: int) -> Tensor:
    """The first rows as anchors."""
    return ours(rows, k, anchors=rows[:, :count], distinct=True)


SAMPLERS: dict[str, Pick] = {
    FUSED: ours,
    "torch_fps": torch_fps,
    "torch_quickfps": torch_quickfps,
    "torch_quickfps, baseline": partial(torch_quickfps, call="sample_idx_baseline"),
    "torch_cluster": torch_cluster,
    "fpsample": fpsample,
    "fpsample, buckets of kdtree": partial(fpsample, call="bucket_fps_kdtree_sampling"),
    "fpsample, buckets of kdline": lambda rows, k: fpsample(rows, k, "bucket_fps_kdline_sampling", 7),
}
PICKERS: dict[str, dict[str, Pick]] = {
    POINTS: SAMPLERS,
    BANK: {
        FUSED: adapted,
        "anomalib's loop": partial(anomalib, projected=False),
        "anomalib's loop, projected": partial(anomalib, projected=True),
    },
    QUERY: {FUSED: queried, "coreset_select": partial(anchored, count=LABELLED), "skactiveml": scikit_activeml},
    RESUMED: {FUSED: resumed, "one call": ours},
    EACH: {FUSED: each_its_own, "the largest for all": ours},
    ANCHORED: {FUSED: partial(anchored, count=ANCHORS), "none": ours},
}
PICKERS[STEP] = PICKERS[BANK]
OTHERS = ("fpsample, buckets", "anomalib's loop, projected", "the largest for all", "none")
"""These answer another question, or the same one nearly."""
JOBS = {
    "quick": [
        Job(POINTS, 2, 128, 3, 6),
        Job(BANK, 1, 100, 20, 5),
        Job(QUERY, 1, 150, 8, 5),
        Job(RESUMED, 2, 50, 8, 6),
        Job(EACH, 4, 50, 3, 8),
        Job(ANCHORED, 1, 1100, 8, 4),
    ],
    "cpu": [
        Job(POINTS, 8, 1024, 3, 256),
        Job(POINTS, 4, 16_384, 3, 1024),
        Job(EACH, 8, 1024, 3, 256),
        Job(QUERY, 1, 4900, 128, 100),
        Job(RESUMED, 1, 20_000, 384, 200),
        Job(ANCHORED, 1, 20_000, 384, 100),
        Job(STEP, 1, 20_000, 384, 200),
        Job(BANK, 1, 20_000, 1536, 200),
    ],
    "cuda": [
        Job(POINTS, 8, 1024, 3, 256),
        Job(POINTS, 4, 16_384, 3, 1024),
        Job(POINTS, 32, 4096, 3, 1024),
        Job(STEP, 1, 200_000, 384, 2000),
        Job(RESUMED, 1, 200_000, 384, 2000),
        Job(EACH, 64, 1024, 3, 256),
        Job(ANCHORED, 1, 200_000, 384, 200),
    ],
}
PACKAGES = {"anomalib's loop": "anomalib", "skactiveml": "skactiveml"} | {
    name: name.partition(",")[0] for name in SAMPLERS if name != FUSED
}
PACKAGES["anomalib's loop, projected"] = "anomalib"


def missing(name: str, device: torch.device) -> str:
    """Why a peer is left out, or ""."""
    package = PACKAGES.get(name, "torch")
    if not find_spec(package):
        how = "pip install --no-deps anomalib" if package == "anomalib" else 'pip install "fcn_kernels[peers]"'
        return f"{package} is not installed: {how}"
    if device.type == "cuda" and package in ("fpsample", "skactiveml"):
        return f"{package} runs on CPUs alone"
    return ""


def rows(size: str) -> list[tuple[Job, str]]:
    """All of a size."""
    return [(job, name) for job in JOBS[size] for name in PICKERS[job.name]]


def draw(job: Job, device: torch.device) -> Tensor:
    """Rows in the unit cube, or about a thousand centers."""
    generator = torch.Generator(device).manual_seed(SEED)
    if job.dim <= 8:
        return torch.rand(job.sets, job.rows, job.dim, generator=generator, device=device)
    centers = torch.randn(1000, job.dim, generator=generator, device=device)
    kinds = torch.randint(1000, (job.sets, job.rows), generator=generator, device=device)
    noise = torch.randn(job.sets, job.rows, job.dim, generator=generator, device=device)
    return centers[kinds].add_(noise, alpha=0.3)


def build(job: Job, device: torch.device) -> tuple[dict[str, Contender], list[Inputs]]:
    """Whoever is installed, over the same rows."""
    drawn = draw(job, device)

    def contender(pick: Pick) -> Contender:
        return lambda turn: pick(drawn, job.k)

    return {name: contender(pick) for name, pick in PICKERS[job.name].items() if not missing(name, device)}, []


def test_samplers(benchmark: Any, bench: Bench, row: tuple[Job, str]) -> None:
    job, name = row
    if why := missing(name, bench.device):
        pytest.skip(why)
    race = bench.race(("samplers", job), lambda: build(job, bench.device))
    if name in race.timings and not name.startswith((FUSED, *OTHERS)):
        theirs, own = race.contenders[name](0), race.contenders[FUSED](0)
        differs = (theirs != own).any(0).nonzero()
        if len(differs):
            pytest.skip(f"it picks other rows, from pick {int(differs[0])} on")
    bench.record(benchmark, race, name, job.name, None, work=FORWARD, **job.facts)
