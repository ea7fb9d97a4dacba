"""What the processes of a torch.distributed group tell one another: values, sums of them, and how they were called.

Every sum is made in the order of the ranks, from values that all ranks gather, so that all have the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    Group = dist.ProcessGroup | None
else:  # PyTorch may be built without
    Group = Any


def check_member(group: Group) -> None:
    """Raise unless this process is one of the group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("expected a process group, call torch.distributed.init_process_group first")
    if dist.get_rank(group) < 0:
        raise ValueError("expected a group that this process is in")


def gather(values: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
    """Every rank's values, (W, ...), of the same shape on each. Calls over ranks have no other collective."""
    world = dist.get_world_size(group)
    everyone = values.new_empty((world, *values.shape)) if out is None else out
    if world == 1:
        everyone[0] = values
    elif values.numel():
        dist.all_gather(list(everyone.unbind(0)), values.contiguous(), group=group)
    return everyone


def total(values: Tensor, group: Group) -> Tensor:
    """The sum over the ranks."""
    return gather(values, group).double().sum(0).to(values.dtype)


def agree(said: Mapping[str, object], error: Exception | None, seed: int, device: torch.device, group: Group) -> int:
    """Raise on all ranks if one has an ``error``, or if they do not say the same; returns the seed of the first.

    Args:
        said: what a rank was called with, by name; values are compared as they print.
        error: why it cannot go on.
        seed: 0 to 2^63 - 1.
        device: where the group exchanges tensors.

    Raises:
        RuntimeError: another rank has an error.
        ValueError: ranks were called with different values.
    """
    ours = {"an error": f"{type(error).__name__}: {error}"} if error else {n: str(v) for n, v in said.items()}
    digest = hashlib.sha256(repr(ours).encode()).digest() + seed.to_bytes(8, "little")
    everyone = gather(torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(device), group).cpu()
    if error is not None or bool((everyone[:, :32] != everyone[0, :32]).any()):
        _refuse(ours, error, group)
    return int.from_bytes(bytes(everyone[0, 32:].tolist()), "little")


def _refuse(ours: dict[str, str], error: Exception | None, group: Group) -> None:
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, ours, group=group)
    if error is not None:
        raise error
    for rank, said in enumerate(everyone):
        if "an error" in said:
            raise RuntimeError(f"rank {rank} cannot take part: {said['an error']}")
    first = everyone[0]
    rank, name = next((r, n) for r, said in enumerate(everyone) for n in first if said[n] != first[n])
    raise ValueError(
        f"expected the same {name} on all ranks, got {first[name]} on rank 0 and {everyone[rank][name]} on rank {rank}"
    )
