"""What the processes of a group tell one another when each has some rows of the same sets.

Rows are numbered in the order of the ranks. A step is one exchange: each rank's best row, of which all take the best.
The backends call this; see :mod:`fcn_kernels.distributed` for the function that users call.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fcn_kernels.group import Group, gather, total

NO_ROW = 2**63 - 1  # above all rows


class Ballot(NamedTuple):
    """The best row of each of G sets that a rank has, or the best of all ranks. 16 + 4 C bytes for float32 rows."""

    score: Tensor  # (G,), of the dtype in which rows are summed
    distance: Tensor  # (G,)
    row: Tensor  # (G,) int64, number in the set; -1: none
    features: Tensor  # (G, C), of the rows' dtype


class Pool(NamedTuple):
    """What has to be known of all rows of G sets that can be picked; float64."""

    usable: Tensor  # (G,), how many there are
    least: Tensor  # (G,), their least and greatest quality
    greatest: Tensor
    given: Tensor  # (G,), 1 where the given start is one of them, on one rank

    @classmethod
    def of(cls, quality: Tensor, usable: Tensor, given: Tensor) -> Pool:
        """Of one rank's rows (G, n)."""
        count = usable.sum(-1)
        least = torch.where(usable, quality, math.inf).amin(-1)
        greatest = torch.where(usable, quality, 0).amax(-1)
        return cls(*(values.double() for values in (count, least, greatest, given)))


class Ranks:
    """A rank's view of its group, for one call on B sets.

    Args:
        group: a torch.distributed group; None: the default one.
        rows: (B,) int64, rows that this rank has of each set, on the device where the group exchanges tensors.
    """

    def __init__(self, group: Group, rows: Tensor) -> None:
        self.group, self.rows = group, rows
        everyone = gather(rows, group)
        self.first = everyone[: dist.get_rank(group)].sum(0)
        """(B,), rows of each set that are before this rank's."""
        self.all_rows = everyone.sum(0)
        """(B,), rows of each set."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks."""
        return total(values, self.group)

    def places(self, rows: Tensor) -> Tensor:
        """Where rows (B, K) of the sets are among this rank's own, -1 for those of others."""
        places = rows - self.first[:, None]
        return torch.where((rows >= 0) & (places >= 0) & (places < self.rows[:, None]), places, -1)

    def pool(self, ours: Pool) -> Pool:
        """Of all ranks' rows."""
        usable, least, greatest, given = gather(torch.stack(ours), self.group).unbind(1)
        return Pool(usable.sum(0), least.amin(0), greatest.amax(0), given.sum(0))

    def agree(self, ours: Ballot) -> Ballot:
        """The ballot of the highest score, of equal ones that of the lowest row."""
        parts = [_read(part.view(len(part), -1), torch.uint8) for part in ours]
        everyone = gather(torch.cat(parts, 1), self.group).split([part.shape[1] for part in parts], -1)
        theirs = Ballot(*(_read(b, part.dtype).view(-1, *part.shape) for b, part in zip(everyone, ours, strict=True)))
        there = theirs.row >= 0  # (W, G)
        highest = torch.where(there, theirs.score, -math.inf).amax(0)
        rank = torch.where(there & (theirs.score == highest), theirs.row, NO_ROW).argmin(0)
        return Ballot(*(values[rank, torch.arange(len(rank), device=rank.device)] for values in theirs))


def _read(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes (..., n) as another dtype, or back. A copy, as bytes in the middle of others need not be aligned."""
    return values.clone(memory_format=torch.contiguous_format).view(dtype)
