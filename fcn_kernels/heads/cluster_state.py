"""What is known of sets after some of their rows: sums that add up, in any order, to the same bits."""

from __future__ import annotations

import numbers
import operator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SUM_BITS, STYLE_BITS = 30, 26
"""Fractions of sums and masses, and of styles. With |u| <= 1 and |k| <= 16 (a LayerNorm over 128 channels gives up to
11.3, times its weight) the sums of fewer than 2^23 rows are exact in float64."""


@dataclass(frozen=True, eq=False)
class ClusterState:
    """Sums over the rows seen so far of B sets, by center: what :meth:`fcn_kernels.ClusterAggregate.update` returns.

    With a chunk's sums S, K and masses w (see :class:`fcn_kernels.ClusterAggregate`)::

        sums += (w / max(w, 1)) S,   styles += (w / max(w, 1)) K,   masses += w

    In ``eval()`` each chunk's addend is rounded to a multiple of 2^-30 (styles: 2^-26) and added in float64, which is
    exact while a set has fewer than 2^23 rows: chunks give the same bits in any order, and however states are merged.
    In ``train()`` states are float32 (float64 in a float64 head), and carry their graph.

    ``a + b`` merges what two cameras or machines saw of the same sets; ``state[2:5]`` and ``state[mask]`` pick sets;
    ``state.to(...)`` moves it; ``torch.save`` keeps it, ``torch.load(weights_only=True)`` brings it back.
    ``vars(state)`` is a dict of its tensors, of which ``ClusterState(**tensors)`` is the state again.

    Raises:
        TypeError, ValueError: the tensors do not make a state.

    Example:
        >>> state = ClusterState(*(torch.zeros(3, 4, n, dtype=torch.float64) for n in (512, 128)),
        ...                      torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.int64))
        >>> (state + state)[:2].counts
        tensor([0, 0])
    """

    sums: Tensor
    """(B, M, C), of unit rows by their shares."""
    styles: Tensor
    """(B, M, d), of the rows' tokens, likewise."""
    masses: Tensor
    """(B, M), of the shares."""
    counts: Tensor
    """(B,) int64, rows that took part."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Tensor):
                raise TypeError(f"expected {field.name} to be a Tensor, got {type(value).__name__}")
        if self.masses.ndim != 2:
            raise ValueError(f"expected masses of shape (B, M), got {tuple(self.masses.shape)}")
        sets, centers = self.masses.shape
        for name, value, shape in (("sums", self.sums, "C"), ("styles", self.styles, "d")):
            if value.ndim != 3 or tuple(value.shape[:2]) != (sets, centers):
                raise ValueError(f"expected {name} of shape ({sets}, {centers}, {shape}), got {tuple(value.shape)}")
        if tuple(self.counts.shape) != (sets,):
            raise ValueError(f"expected counts of shape ({sets},), got {tuple(self.counts.shape)}")
        dtype, device = self.masses.dtype, self.masses.device
        if dtype not in (torch.float32, torch.float64) or {self.sums.dtype, self.styles.dtype} != {dtype}:
            got = ", ".join(str(value.dtype) for value in (self.sums, self.styles, self.masses))
            raise TypeError(f"expected sums, styles and masses of float64, or all of float32, got {got}")
        if self.counts.dtype != torch.int64:
            raise TypeError(f"expected counts of int64, got {self.counts.dtype}")
        if any(value.device != device for value in (self.sums, self.styles, self.counts)):
            raise ValueError(f"expected the tensors of a state on one device, {device} as masses")

    def __len__(self) -> int:
        return self.counts.shape[0]

    def __add__(self, other: ClusterState) -> ClusterState:
        if not isinstance(other, ClusterState):
            return NotImplemented
        ours, theirs = (
            [(tuple(t.shape), t.dtype, t.device) for t in (s.sums, s.styles, s.masses)] for s in (self, other)
        )
        if ours != theirs:
            raise ValueError(f"expected states of the same shapes, dtypes and devices, got {ours} and {theirs}")
        return self._map(lambda name, value: value + getattr(other, name))

    def __getitem__(self, sets: int | slice | Tensor) -> ClusterState:
        """The sets of a slice, of indices or of a mask; of an integer, one set, which stays a batch of one."""
        if isinstance(sets, numbers.Integral) or (isinstance(sets, Tensor) and sets.ndim == 0):
            sets = operator.index(sets)
            if not -len(self) <= sets < len(self):
                raise IndexError(f"expected a set in [0, {len(self)}), got {sets}")
            sets = slice(sets, sets + 1 or None)
        return self._map(lambda _, value: value[sets])

    def to(self, device: str | torch.device) -> ClusterState:
        """The same on a device. Its dtype is what keeps it exact, and stays."""
        return self._map(lambda _, value: value.to(device))

    def detach(self) -> ClusterState:
        """Without its graph."""
        return self._map(lambda _, value: value.detach())

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> ClusterState:
        """The sum of the states of all processes of a group, in each of them; without its graph.

        Every process has to hold the same sets, in the same order. States of ``eval()`` add up to the same bits in any
        number of processes.
        """

        def reduce(_: str, value: Tensor) -> Tensor:
            total = value.detach().clone()
            dist.all_reduce(total, group=group)
            return total

        return self._map(reduce)

    def _map(self, fn: Any) -> ClusterState:
        return ClusterState(**{field.name: fn(field.name, getattr(self, field.name)) for field in fields(self)})


def on_grid(values: Tensor, bits: int) -> Tensor:
    """Rounded to multiples of 2^-bits, in float64; the gradient passes as if it were not."""
    rounded = (values.detach().double() * 2.0**bits).round_().mul_(2.0**-bits)
    return rounded + (values - values.detach()) if values.requires_grad else rounded


torch.serialization.add_safe_globals([ClusterState])
torch.export.register_dataclass(ClusterState)
