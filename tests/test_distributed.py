"""Sets whose rows are on several ranks: the picks of one process, to the bit, its gradients, and faults all see."""

from __future__ import annotations

import math
import os
import random
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from fcn_kernels import CoresetAggregator, CoresetSelect, coreset_select, distributed
from fcn_kernels.distributed import dtensor  # noqa: F401  (it registers the rule)
from fcn_kernels.selection.cpp import launch as cpp

RANKS = 4
TIMEOUT = 20  # seconds
PROBLEMS = 50
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
BACKENDS = ["torch"] if any([cpp.unavailable(dtype) for dtype in DTYPES]) else ["torch", "cpp"]  # compiled now
pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]


# --- problems, and what a rank has of them ---------------------------------------------------------------------------


def random_problem(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The arguments of a call: one set or three, all options by turns."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    sets, rows, dim = draw.choice((1, 1, 3)), draw.choice((1, 7, 40, 300)), draw.choice((1, 3, 17, 64))
    shape, k = (sets, rows), draw.choice((1, 3, 8))

    def uniform() -> Tensor:
        return torch.rand(shape, generator=generator, dtype=dtype)

    call: dict[str, Any] = {
        "features": torch.randn(*shape, dim, generator=generator, dtype=dtype),
        "k": draw.choice((k, k, [draw.randrange(k + 1) for _ in range(sets)])),
        "gamma": draw.choice((0.0, 0.7, -1.5, 40.0)),
        "distinct": draw.random() < 0.4,
        "distance_scale": draw.choice((1.0, 0.5)),
        "metric": draw.choice(("cosine", "sqeuclidean")),
        "return_nearest": draw.random() < 0.5,
    }
    features = call["features"]
    if draw.random() < 0.6:
        call["quality"] = uniform() * 3 + 0.2
    if draw.random() < 0.4:  # copies, which tie
        features[:, 1::2] = features[:, : rows // 2 * 2 : 2]
    if draw.random() < 0.3:
        features[uniform() < 0.3] = draw.choice((math.nan, math.inf, 0.0))
    noise = draw.choice(("none", "none", "given", "drawn"))
    if noise == "given":
        call["noise"] = -torch.empty(k, *shape, dtype=dtype).exponential_(generator=generator).log()
        call["k"] = k
    call["sample"] = noise == "drawn"
    if draw.random() < 0.3:
        call["start"] = torch.tensor([draw.randrange(rows) for _ in range(sets)])
    elif draw.random() < 0.3:
        call["min_distances"] = torch.where(uniform() < 0.1, -math.inf, 2 * uniform())
    elif draw.random() < 0.2:
        call["anchors"] = torch.randn(2, dim, generator=generator, dtype=dtype)
    if draw.random() < 0.3:
        call["mask"] = uniform() < 0.7
    if call["metric"] == "cosine" and draw.random() < 0.2:
        call["features"], call["normalized"] = torch.nn.functional.normalize(features, dim=-1), True
    return call


def cuts(rows: int, world: int, seed: int) -> list[int]:
    """Where the rows of a set are cut: unevenly, and often to nothing."""
    draw = random.Random(seed)
    return [0, *sorted(draw.randint(0, rows) for _ in range(world - 1)), rows]


ROW_VALUES = {"features": 1, "quality": 1, "noise": 2, "min_distances": 1, "mask": 1}
"""Arguments that have values for each row, and the axis of these."""


def share_of(call: dict[str, Any], rank: int, world: int, seed: int) -> tuple[dict[str, Any], slice]:
    """A rank's part of a call, and which rows that is."""
    bounds = cuts(call["features"].shape[1], world, seed)
    mine = slice(bounds[rank], bounds[rank + 1])
    local = {n: v[(slice(None),) * ROW_VALUES[n] + (mine,)] if n in ROW_VALUES else v for n, v in call.items()}
    return {"local_rows": local.pop("features"), **local}, mine


def packed(local: dict[str, Any]) -> dict[str, Any]:
    """The same, with the sets one after another."""
    rows = local["local_rows"]
    flat = {n: local[n].flatten(*((1, 2) if n == "noise" else (0, 1))) for n in ROW_VALUES if n in local}
    offsets = torch.arange(len(rows) + 1) * rows.shape[1]
    return local | flat | {"local_rows": rows.flatten(0, 1), "cu_seqlens": offsets}


def one_process(call: dict[str, Any], backend: str) -> Any:
    torch.manual_seed(5)
    return coreset_select(**call, backend=backend)


# --- what the ranks do; each returns what is wrong -------------------------------------------------------------------


def pick_alike(rank: int, groups: dict[int, Any]) -> list[str]:
    """Random problems, cut among 1, 2, 3 and 4 ranks."""
    wrong = []
    for seed in range(PROBLEMS):
        call = random_problem(seed)
        for backend in BACKENDS:
            expected = one_process(call, backend)
            for world, group in groups.items():
                if backend != BACKENDS[-1] and world != 1 + seed % RANKS:
                    continue  # one is enough of the slower
                local, mine = share_of(call, rank, world, seed)
                local = packed(local) if seed % 3 == 1 and "mask" not in local else local
                torch.manual_seed(5 + rank)  # rank 0's seed is the one that counts
                found = distributed.coreset_select(**local, backend=backend, group=group)
                same = [torch.equal(a, b) for a, b in zip(found[:4], expected[:4], strict=True)]
                for ours, whole in zip(found[4:], expected[4:], strict=True):
                    same.append(torch.equal(ours.reshape(whole[:, mine].shape), whole[:, mine]))
                if not all(same):
                    wrong.append(f"problem {seed} on {world} ranks, {backend}: {same}")
    return wrong


def pick_many(rank: int, groups: dict[int, Any]) -> list[str]:
    """50 of 200,000 rows of 64."""
    wrong = []
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(1000, 64, generator=generator)
    rows = centers[torch.randint(1000, (200_000,), generator=generator)]
    rows = rows + 0.5 * torch.randn(rows.shape, generator=generator)
    for sample in (False, True):
        call = {"features": rows[None], "k": 50, "gamma": 0.5, "sample": sample}
        expected = one_process(call, BACKENDS[-1])
        for world, group in groups.items():
            local, _ = share_of(call, rank, world, 3)
            torch.manual_seed(5)
            found = distributed.coreset_select(**local, group=group)
            if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
                wrong.append(f"{world} ranks, sample {sample}")
    return wrong


LEAVES = ("features", "quality", "gamma")


def gradients(call: dict[str, Any], select: Callable[..., Any], weight: Tensor) -> dict[str, Tensor]:
    leaves = {n: v.detach().clone().requires_grad_() for n, v in call.items() if n in ("local_rows", *LEAVES)}
    picks = select(**(call | leaves))
    (picks.features * weight).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def differentiate_alike(rank: int, groups: dict[int, Any]) -> list[str]:
    """In float64, also where copies of a row tie."""
    wrong = []
    for seed in range(PROBLEMS):
        call = random_problem(seed, torch.float64)
        call["gamma"] = torch.tensor(min(call["gamma"], 2.0), dtype=torch.float64)
        call["tau"] = 0.5
        weight = torch.randn(call["features"].shape[-1], generator=torch.Generator().manual_seed(seed)).double()
        torch.manual_seed(5)
        expected = gradients(call, coreset_select, weight)
        for world, group in groups.items():
            if world != 1 + seed % RANKS:
                continue
            local, mine = share_of(call, rank, world, seed)
            torch.manual_seed(5)
            found = gradients(
                local, lambda group=group, **rest: distributed.coreset_select(**rest, group=group), weight
            )
            for name, ours in found.items():
                whole = expected["features" if name == "local_rows" else name]
                whole = whole if name == "gamma" else whole[:, mine]
                if not torch.allclose(ours, whole, rtol=1e-10, atol=1e-10):
                    wrong.append(f"problem {seed} on {world} ranks: {name} {(ours - whole).abs().max():.1e}")
    return wrong


def pick_too_many(rank: int, groups: dict[int, Any]) -> list[str]:
    """More picks than rows; ranks without rows; no rows at all."""
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    expected = coreset_select(rows, 9)
    found = distributed.coreset_select(rows if rank == 2 else rows[:0], 9)
    none = distributed.coreset_select(rows[:0], 3)
    right = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return [] if right and none.indices.tolist() == [-1] * 3 and int(none.counts) == 0 else [f"{found} {none}"]


def resume(rank: int, groups: dict[int, Any]) -> list[str]:
    """3 picks and 4 more from their state are 7 of one call; of bfloat16 rows, too, and of those within lengths."""
    wrong = []
    ends = cuts(60, RANKS, 2)
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.randn(60, 17, generator=torch.Generator().manual_seed(1)).to(dtype)
        local = rows[ends[rank] : ends[rank + 1]]
        first = distributed.coreset_select(local, 3, gamma=0.5, return_min_distances=True)
        more = distributed.coreset_select(local, 4, gamma=0.5, min_distances=first.min_distances)
        padded, length = torch.cat([local, local[:1], local[:1]]), torch.tensor(len(local))
        within = distributed.coreset_select(padded, 7, gamma=0.5, lengths=length)
        whole = coreset_select(rows, 7, gamma=0.5)
        if not torch.equal(torch.cat([first.indices, more.indices]), whole.indices):
            wrong.append(f"{dtype}: {first} {more}")
        if not all(torch.equal(a, b) for a, b in zip(within, whole, strict=True)):
            wrong.append(f"{dtype}: {within}")
    return wrong


def disagree(rank: int, groups: dict[int, Any]) -> list[str]:
    """Every rank raises, at once, and the group goes on working."""
    rows, odd = torch.randn(6, 8), rank == 1
    calls = {
        "same k on": lambda: distributed.coreset_select(rows, 3 if odd else 2),
        "same number of columns": lambda: distributed.coreset_select(rows[:, :7] if odd else rows, 2),
        "same dtype": lambda: distributed.coreset_select(rows.double() if odd else rows, 2),
        "same gamma": lambda: distributed.coreset_select(rows, 2, gamma=0.5 if odd else 0.25),
        "same choice of gradient": lambda: distributed.coreset_select(rows.clone().requires_grad_(odd), 2),
        "start of set 0 in [0, 24)": lambda: distributed.coreset_select(rows, 2, start=24),
        "expected quality of shape" if odd else "rank 1 cannot take part: ValueError: expected quality of shape": (
            lambda: distributed.coreset_select(rows, 2, rows[: 2 if odd else 6, 0].abs())
        ),
        "to be a Tensor" if odd else "rank 1 cannot take part: TypeError": (
            lambda: distributed.coreset_select([1] if odd else rows, 2)
        ),
    }
    wrong = []
    for message, call in calls.items():
        begin = time.monotonic()
        try:
            call()
            wrong.append(f"no error: {message}")
        except (ValueError, TypeError, RuntimeError) as error:
            if message not in str(error) or time.monotonic() - begin > 5:
                wrong.append(f"{message}: {error}")
    if distributed.coreset_select(rows, 2).indices.shape != (2,):
        wrong.append("afterwards")
    return wrong


def lose_a_rank(rank: int, groups: dict[int, Any]) -> list[str]:
    """The last one ends in the middle of a selection; the others raise within the group's timeout."""
    rows = torch.randn(50, 8)
    if rank == RANKS - 1:
        threading.Timer(0.3, os._exit, [0]).start()
    begin = time.monotonic()
    try:
        for _ in range(10**6):
            distributed.coreset_select(rows, 5)
    except RuntimeError:
        return [] if time.monotonic() - begin < TIMEOUT + 5 else ["too late"]
    return ["no error"]


def run_head(head: torch.nn.Module, call: dict[str, Tensor], mine: slice, **group: Any) -> dict[str, Tensor]:
    """Descriptors, and the gradients of a loss on them."""
    head.zero_grad()
    leaves = {n: call[n][:, mine].clone().requires_grad_() for n in ("features", "quality")}
    out = head(**leaves, noise=call["noise"][:, :, mine], **group)
    (out.descriptor.cumsum(-1).mean() + out.norm.log().sum()).backward()
    grads = {name: p.grad for name, p in head.named_parameters()} | {name: v.grad for name, v in leaves.items()}
    return {"descriptor": out.descriptor.detach(), **grads}


def aggregate_alike(rank: int, groups: dict[int, Any]) -> list[str]:
    """A head whose sets have rows on all ranks, in float64; with dropout, the same descriptor on all ranks."""
    torch.manual_seed(0)
    head = CoresetAggregator(16, num_heads=4, dropout=0.0).double()
    features, quality = torch.randn(2, 30, 16, dtype=torch.float64), torch.rand(2, 30, dtype=torch.float64) + 2
    noise = -torch.empty(3, 2, 30, dtype=torch.float64).exponential_().log()
    call = {"features": torch.nn.functional.normalize(features, dim=-1), "quality": quality, "noise": noise}
    expected = run_head(head, call, slice(None))
    bounds = [0, 11, 11, 29, 30]  # one rank has no row, one a single one
    mine = slice(bounds[rank], bounds[rank + 1])
    found = run_head(head, call, mine, group=dist.group.WORLD)
    wrong = []
    for name, ours in found.items():
        whole = expected[name][:, mine] if name in call else expected[name]
        if not torch.allclose(ours, whole, rtol=1e-10, atol=1e-10):
            wrong.append(f"{name} {(ours - whole).abs().max():.1e}")
    head = CoresetAggregator(16, num_heads=4, dropout=0.3).double()
    for parameter in head.parameters():
        dist.broadcast(parameter.data, 0)
    torch.manual_seed(rank)
    dropped = head(call["features"][:, mine], quality[:, mine], group=dist.group.WORLD).descriptor.detach()
    first = dropped.clone()
    dist.broadcast(first, 0)
    head.eval()
    plain = head(call["features"][:, mine], quality[:, mine], group=dist.group.WORLD)
    alone = head(call["features"], quality)
    if not torch.equal(first, dropped) or torch.allclose(dropped, plain.descriptor):
        wrong.append("dropout")
    if not torch.allclose(plain.descriptor, alone.descriptor) or not torch.equal(plain.coreset[0], alone.coreset[0]):
        wrong.append("in eval")
    module = CoresetSelect(3).eval()
    if not torch.equal(module(features[:, mine], group=dist.group.WORLD).indices, module(features).indices):
        wrong.append("CoresetSelect")
    return wrong


def train_alike(rank: int, groups: dict[int, Any]) -> list[str]:
    """Sets on two pairs of ranks, rows on the two of a pair; DistributedDataParallel over the sets."""
    rows = dist.new_subgroups(group_size=2)[0]
    sets, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    torch.manual_seed(0)
    head = CoresetAggregator(16, num_heads=4, dropout=0.0).double()
    features = torch.nn.functional.normalize(torch.randn(4, 20, 16, dtype=torch.float64), dim=-1)
    quality = torch.rand(4, 20, dtype=torch.float64) + 2
    noise = -torch.empty(3, 4, 20, dtype=torch.float64).exponential_().log()

    def loss(out: Any) -> Tensor:
        return out.descriptor.cumsum(-1).mean() + out.norm.log().mean()

    loss(head(features, quality, noise=noise)).backward()
    expected = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    model = DistributedDataParallel(head, process_group=sets)
    mine = slice(rank // 2 * 2, rank // 2 * 2 + 2), slice(rank % 2 * 7, 7 + rank % 2 * 13)
    loss(model(features[mine], quality[mine], noise=noise[:, *mine], group=rows)).backward()
    grads = [p.grad for p in head.parameters()]
    same = all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(grads, expected, strict=True))
    return [] if same else ["gradients"]


def shard_sets(rank: int, groups: dict[int, Any]) -> list[str]:
    """DTensors that are sharded over sets, evenly and not; gradients too."""
    mesh = init_device_mesh("cpu", (RANKS,))
    wrong = []
    for sets, options in (
        (8, {"sample": True, "return_nearest": True}),
        (8, {"anchors": torch.ones(1, 5, dtype=torch.float64)}),
        (6, {"sample": True}),
    ):
        torch.manual_seed(0)
        rows, quality = torch.randn(sets, 12, 5, dtype=torch.float64), torch.rand(sets, 12, dtype=torch.float64) + 0.1
        found, grads = [], []
        for whole in (True, False):
            leaves = [v if whole else distribute_tensor(v, mesh, [Shard(0)]) for v in (rows, quality)]
            features, q, gamma = leaves = [*(v.detach().requires_grad_() for v in leaves), torch.tensor(0.5).double()]
            gamma.requires_grad_()
            torch.manual_seed(1)
            picks = coreset_select(features, 3, None if sets == 6 else q, gamma, **options)
            picks.features.pow(2).sum().backward()
            found.append([v.full_tensor() if isinstance(v, DTensor) else v for v in picks])
            some = [leaf.grad for leaf in leaves if leaf.grad is not None]
            grads.append([g.full_tensor() if isinstance(g, DTensor) else g for g in some])
        if not all(torch.equal(a, b) for a, b in zip(*found, strict=True)):
            wrong.append(f"{sets} sets, {options}")
        bound = 1e-5 if options.get("sample") else 1e-10  # C++ rounds its noise in float32 on its own
        if not all(torch.allclose(a, b, rtol=bound, atol=bound) for a, b in zip(*grads, strict=True)):
            wrong.append(f"gradients of {sets} sets, {options}")
    try:
        coreset_select(distribute_tensor(rows, mesh, [Shard(1)]), 3)
        wrong.append("rows of a set on several ranks")
    except NotImplementedError as error:
        wrong += [] if "placements (Shard(0),)" in str(error) else [str(error)]
    return wrong


JOBS = [
    pick_alike,
    pick_many,
    differentiate_alike,
    aggregate_alike,
    train_alike,
    shard_sets,
    pick_too_many,
    resume,
    disagree,
    lose_a_rank,
]


def _process(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=TIMEOUT)
    )
    groups = {world: dist.new_group(list(range(world))) for world in range(1, RANKS + 1)}
    for job in JOBS:
        begin = time.monotonic()
        mine = {world: group for world, group in groups.items() if rank < world}
        wrong = job(rank, mine)
        torch.save((wrong, time.monotonic() - begin), Path(folder) / f"{job.__name__} {rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes found."""
    path = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # of the server that processes are forked from
        mp.get_context("forkserver").set_forkserver_preload(
            ["fcn_kernels.distributed.dtensor"]
        )  # which takes seconds, once
        context = mp.start_processes(
            _process, args=(str(path / "store"), str(path)), nprocs=RANKS, join=False, start_method="forkserver"
        )
        begin = time.monotonic()
        try:
            while not context.join(5):
                assert time.monotonic() - begin < 300
        finally:
            for process in context.processes:
                process.kill()
    return path


@pytest.mark.parametrize("job", [job.__name__ for job in JOBS])
def test_ranks(folder, job):
    for rank in range(RANKS - (job == "lose_a_rank")):
        wrong, seconds = torch.load(folder / f"{job} {rank}.pt", weights_only=True)
        print(f"rank {rank}: {seconds:.1f} s")
        assert wrong == []
