"""Farthest-point samplers that people use today, where they are installed (extra [peers]).

They know Euclidean distance alone. Of unit rows |u - v|^2 = 2 - 2 cos, so with gamma = 0 and the same start all
must pick the same rows; a peer that does not is left out, with where it differed as the reason.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Bench
from benchmarks.harness import Contender
from benchmarks.workloads import FORWARD, FUSED, Case, Inputs, least_bytes, moved_bytes, rotated, tiers
from fcn_kernels import coreset_select

Pick = Callable[[Tensor, int], Tensor]
"""Unit rows (B, N, C) and K: the indices (B, K) of K picks, the first of them row 0."""


def ours(unit: Tensor, k: int) -> Tensor:
    """This package."""
    return coreset_select(unit, k, unit.new_ones(unit.shape[:2]), start=0, normalized=True).indices


def torch_fps(unit: Tensor, k: int) -> Tensor:
    """Its checks wait for the device, and are left out. Its kernel is unrolled over the columns: see ``missing``."""
    everything = torch.ones(unit.shape[:2], dtype=torch.bool, device=unit.device)
    sampler = import_module("torch_fps").farthest_point_sampling
    picks: Tensor = sampler(unit, everything, k, random_start=False, validate=False, assume_finite=True)
    return picks


def torch_quickfps(unit: Tensor, k: int) -> Tensor:
    """With the bucket height that it takes by itself."""
    picks: Tensor = import_module("torch_quickfps").sample_idx(unit, k, start_idx=0)
    return picks


def torch_cluster(unit: Tensor, k: int) -> Tensor:
    """It takes a ratio, and rounds ratio * N up."""
    sets, n = unit.shape[:2]
    ends = torch.arange(0, sets * n + 1, n, device=unit.device)
    sampler = import_module("torch_cluster").fps
    picks: Tensor = sampler(unit.flatten(0, 1), ptr=ends, ratio=(k - 0.5) / n, random_start=False)
    return picks.view(sets, k) - ends[:-1, None]


PICKERS: dict[str, Pick] = {
    FUSED: ours,
    "torch_fps": torch_fps,
    "torch_quickfps": torch_quickfps,
    "torch_cluster": torch_cluster,
}
SHAPES = {
    "quick": [(2, 30, 16, 4)],
    "cpu": [(64, 256, 512, 8), (1, 8000, 512, 16)],
    "cuda": [(64, 256, 64, 8), (64, 256, 512, 8), (1, 8000, 512, 64), (1, 100_000, 512, 64)],
}
TORCH_FPS_COLUMNS = 64
"""torch-fps's Triton kernel takes 2.4 s to compile for 64 columns, 13 for 128, 95 for 256 and over 200 for 512."""
PACKAGES = {
    "torch_fps": 'pip install "fcn_kernels[peers]"',
    "torch_quickfps": 'pip install "fcn_kernels[peers]"; on a GPU its torch-quickfps-cu128 or torch-quickfps-cu130',
    "torch_cluster": 'pip install "fcn_kernels[peers]"',
}
"""How to have each of them. The default wheel of torch-quickfps has no device code."""


def missing(name: str, case: Case, device: torch.device) -> str:
    """Why a peer is left out, or "" if it is not."""
    if name == FUSED:
        return ""
    if not find_spec(name):
        return f"{name} is not installed: {PACKAGES[name]}"
    if name == "torch_fps" and device.type == "cuda" and case.dim > TORCH_FPS_COLUMNS:
        return f"its kernel takes minutes to compile for {case.dim} columns, so it runs with up to {TORCH_FPS_COLUMNS}"
    return ""


def rows(size: str) -> list[tuple[Case, str]]:
    """float32, which all of them take."""
    return [(Case(*shape, torch.float32), name) for shape in SHAPES[size] for name in PICKERS]


def build(case: Case, device: torch.device) -> tuple[dict[str, Contender], list[Inputs]]:
    """Whoever is installed, over the same unit rows."""
    inputs = [
        i._replace(features=torch.nn.functional.normalize(i.features.detach(), dim=-1)) for i in rotated(case, device)
    ]

    def contender(pick: Pick) -> Contender:
        return lambda turn: pick(inputs[turn % len(inputs)].features, case.k)

    return {name: contender(pick) for name, pick in PICKERS.items() if not missing(name, case, device)}, inputs


def test_peers(benchmark: Any, bench: Bench, row: tuple[Case, str]) -> None:
    case, name = row
    if why := missing(name, case, bench.device):
        pytest.skip(why)
    race = bench.race(("peers", case), lambda: build(case, bench.device))
    facts: dict[str, Any] = {"work": FORWARD, "least_bytes": least_bytes(case, FORWARD), **case.facts}
    moved = None
    if name == FUSED:
        moved = moved_bytes(case, race.inputs[0], FORWARD)
        facts["tiers"] = tiers(case, race.inputs[0])[:1]
    elif name in race.timings:
        unit = race.inputs[0].features
        differs = (PICKERS[name](unit, case.k) != ours(unit, case.k)).any(0).nonzero()
        if len(differs):
            pytest.skip(f"it picks other rows, from pick {int(differs[0])} on")
    bench.record(benchmark, race, name, "peers", moved, **facts)
