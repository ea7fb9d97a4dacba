"""Sets of embeddings drawn per identity, clean or corrupted, for training and for verification."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MILDEST = 0.5  # corruption replaces at least this share of a row by noise
JITTER = 0.05  # |noise| that tells a near-duplicate of a unit row from it


class Rows(NamedTuple):
    """Unit rows (T, C) of N identities, each of whose rows lie together."""

    unit: Tensor
    quality: Tensor
    """(T,), above 0."""
    offsets: Tensor
    """(N + 1,) int64: identity n has the rows offsets[n] to offsets[n + 1] - 1."""

    @property
    def identity(self) -> Tensor:
        """(T,) int64, that of each row."""
        return torch.arange(len(self.offsets) - 1).repeat_interleave(self.offsets.diff())


class Sets(NamedTuple):
    """B sets of T rows in all, packed."""

    unit: Tensor
    """(T, C)."""
    quality: Tensor
    """(T,)."""
    cu_seqlens: Tensor
    """(B + 1,) int32."""
    labels: Tensor
    """(B,) int64, the identity of each set."""

    def to(self, device: str | torch.device) -> Sets:
        """The same sets on `device`."""
        return Sets(*(part.to(device) for part in self))

    def share(self, rank: int, world: int) -> Sets:
        """The sets `rank`, `rank + world`, ... alone."""
        lengths = self.cu_seqlens.diff().long()
        mine = torch.arange(len(lengths)) % world == rank
        rows = mine.repeat_interleave(lengths)
        return Sets(self.unit[rows], self.quality[rows], offsets_of(lengths[mine]).int(), self.labels[mine])


class Recipe(NamedTuple):
    """How sets are drawn."""

    longest: int = 20
    """A set has 1 to this many rows, each number as often."""
    corrupt: float = 0.0
    """Chance of a row to be corrupted."""
    duplicates: float = 0.0
    """Chance of a row to be a near-copy of the one before it, as the next frame of a clip is."""


def offsets_of(lengths: Tensor) -> Tensor:
    """(B + 1,) offsets of sets with these lengths (B,)."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def group(unit: Tensor, quality: Tensor, identity: Tensor, identities: int) -> Rows:
    """Rows brought into the order of their identity (T,), 0 to identities - 1."""
    order = identity.argsort(stable=True)
    return Rows(unit[order], quality[order], offsets_of(torch.bincount(identity, minlength=identities)))


def draw(rows: Rows, labels: Tensor, recipe: Recipe) -> Sets:
    r"""A set of rows of each of the identities labels (B,), drawn with replacement, from torch's global generator.

    A corrupted row u of quality q becomes, with s uniform in [1/2, 1) and a normally distributed unit row n,

        u' = ((1 - s) u + s n) / |(1 - s) u + s n|,   q' = (1 - s) q

    so that what a row has lost shows in its quality, as it does in the norms of a backbone trained with AdaFace.

    Raises ValueError for an identity without rows.
    """
    lengths = torch.randint(1, recipe.longest + 1, labels.shape)
    offsets = offsets_of(lengths)
    count, width = int(offsets[-1]), rows.unit.shape[1]
    identity = labels.repeat_interleave(lengths)
    first, available = rows.offsets[identity], rows.offsets.diff()[identity]
    if not available.all():  # the next identity's would be taken
        raise ValueError(f"expected identities with rows, got none of identity {int(identity[available.argmin()])}")
    # float64: the product must not round up to the number of rows
    picked = first + (torch.rand(count, dtype=torch.float64) * available).long()
    severity = torch.empty(count).uniform_(MILDEST, 1) * (torch.rand(count) < recipe.corrupt)
    noise = _unit(torch.randn(count, width))
    again = torch.rand(count) < recipe.duplicates
    again[offsets[:-1]] = False
    source = torch.where(again, 0, torch.arange(count)).cummax(0).values
    picked, severity, noise = picked[source], severity[source].to(rows.unit.dtype), noise[source]
    jitter = again[:, None] * JITTER * _unit(torch.randn(count, width))
    unit = _unit((1 - severity)[:, None] * rows.unit[picked] + severity[:, None] * noise + jitter)
    quality = (1 - severity) * rows.quality[picked]
    return Sets(unit, quality, offsets.int(), labels)


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return unit
