"""The training loop: steps, validation, early stopping, and a state to go on from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fcn_kernels.evaluation.verification import roc
from fcn_kernels.heads.adaface import AdaFace
from fcn_kernels.heads.cluster_aggregate import ClusterAggregate
from fcn_kernels.heads.facecoresetnet import CoresetAggregator
from fcn_kernels.training.draw import Recipe, Rows, Sets, draw

WARM_UP = 0.1  # share of the steps in which the learning rate rises
GAMMA_RATE = 10  # gamma is one number of the order of 1, the weights are small and many


Head = CoresetAggregator | ClusterAggregate


class Plan(NamedTuple):
    """What the numbers of a run follow from, besides the rows."""

    steps: int
    batch: int
    """Sets a step, over all processes."""
    rate: float
    every: int
    """Steps between validations."""
    patience: int
    """Validations without a better TAR before the run ends."""
    far: float
    seed: int
    recipe: Recipe


class Trial(NamedTuple):
    """Sets to verify: every probe is compared with every set of the gallery."""

    gallery: Sets
    probes: Sets


class Training(nn.Module):
    """Head and classifier as one module, whose output is the loss: what DistributedDataParallel wraps."""

    def __init__(self, head: Head, classifier: AdaFace) -> None:
        super().__init__()
        self.head, self.classifier = head, classifier

    def forward(self, sets: Sets) -> Tensor:
        """Mean cross entropy of the sets' identities."""
        descriptor, norm = describe(self.head, sets)
        return F.cross_entropy(self.classifier(descriptor, norm, sets.labels), sets.labels)


def describe(head: Head, sets: Sets) -> tuple[Tensor, Tensor]:
    """Descriptors (B, C) of sets, and their norms (B,)."""
    found = head(sets.unit, quality=sets.quality, cu_seqlens=sets.cu_seqlens)
    return found.descriptor, found.norm


def tar(pool: Callable[[Sets], Tensor], trial: Trial, far: float) -> float:
    """TAR at `far` of the descriptors (B, C) that `pool` gives, over all pairs of a probe and a gallery's set."""
    with torch.no_grad():
        gallery, probes = (pool(side).cpu() for side in trial)
    genuine = trial.probes.labels[:, None] == trial.gallery.labels
    return roc((probes @ gallery.T).flatten(), genuine.flatten().cpu()).tar_at([far])[0]


def train(
    training: Training,
    rows: Rows,
    trial: Trial,
    plan: Plan,
    state: dict[str, Any] | None,
    save: Callable[[dict[str, Any]], None],
    show: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Train; returns the last state, of which "best" is the state dict of the head with the best validation TAR.

    The random numbers of a step follow from seed, step and process alone, so that a run which goes on from a saved
    state has the same numbers as one that was never interrupted.

    Args:
        training: what is trained, on its device. rows: to draw sets from. trial: for validation, on that device.
        plan: the numbers. state: one that `save` was given, to go on from.
        save: called with the state after each validation, in the first process. show: called after each step.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = training.classifier.weight.device
    optimizer = _optimizer(training, plan)
    if state is None:
        state = {"step": 0, "losses": [], "tars": [], "gammas": [], "stale": 0}
        _validate(training.head, trial, plan, state)
    else:
        training.load_state_dict(state["training"])
        optimizer.load_state_dict(state["optimizer"])
    module: nn.Module = DistributedDataParallel(training) if world > 1 else training
    identities = len(rows.offsets) - 1
    while state["step"] < plan.steps and state["stale"] < plan.patience:
        step = state["step"]
        torch.manual_seed(_seed(plan.seed, step, 0))  # the same sets in every process
        sets = draw(rows, torch.randint(identities, (plan.batch,)), plan.recipe).share(rank, world)
        torch.manual_seed(_seed(plan.seed, step, 1 + rank))  # picks and dropout of its own
        for entry in optimizer.param_groups:
            entry["lr"] = entry["top"] * _schedule(step, plan.steps)
        training.train()
        # processes are averaged, where shares may differ by a set
        loss = module(sets.to(device)) * (len(sets.labels) * world / plan.batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(training.parameters(), 1.0)
        optimizer.step()
        state["step"] = step + 1
        state["losses"].append(_mean_over_processes(loss.detach(), world))
        if (step + 1) % plan.every == 0 or step + 1 == plan.steps:
            _validate(training.head, trial, plan, state)
            if rank == 0:
                save(state | {"training": training.state_dict(), "optimizer": optimizer.state_dict()})
        show(state)
    return state


def _validate(head: Head, trial: Trial, plan: Plan, state: dict[str, Any]) -> None:
    """Append the TAR, and keep the head if there is none better; the first process decides for all."""
    head.eval()
    measured = torch.tensor(
        tar(lambda sets: describe(head, sets)[0], trial, plan.far),
        dtype=torch.float64,
        device=trial.probes.unit.device,
    )
    if dist.is_initialized():
        dist.broadcast(measured, 0)
    better = all(measured.item() > earlier for _, earlier in state["tars"])
    state["stale"] = 0 if better else state["stale"] + 1
    if better:
        state["best"] = {name: value.detach().cpu().clone() for name, value in head.state_dict().items()}
    state["tars"].append((state["step"], measured.item()))
    if isinstance(head, CoresetAggregator):
        state["gammas"].append(head.gamma.item())


def _optimizer(training: Training, plan: Plan) -> torch.optim.Optimizer:
    named = dict(training.named_parameters())
    gamma = named.pop("head.gamma", None)
    groups: list[dict[str, Any]] = [{"params": list(named.values()), "weight_decay": 1e-3, "top": plan.rate}]
    if gamma is not None:
        groups.append({"params": [gamma], "weight_decay": 0.0, "top": plan.rate * GAMMA_RATE})
    return torch.optim.AdamW(groups)


def _schedule(step: int, steps: int) -> float:
    """Up in a line, then down along a cosine; of the step alone, so that there is no state to save."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _seed(seed: int, step: int, stream: int) -> int:
    return ((seed * 1_000_003 + step) * 4099 + stream) % 2**64


def _mean_over_processes(value: Tensor, world: int) -> float:
    if world > 1:
        dist.all_reduce(value)
    return value.item() / world
