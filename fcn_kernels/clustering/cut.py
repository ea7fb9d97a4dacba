"""How sets are cut in chunks, and what chunks give is added up over their sets."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_kernels.clustering.sums import Layout


class Cut(NamedTuple):
    """Chunks of sets, in the order of the rows."""

    offsets: Tensor  # (P + 1,) int64, first rows
    lengths: Tensor  # (P,) int64, rows to the last that takes part
    pieces: Tensor | None  # (B,) int64, chunks of each set; None: one

    def per_set(self, values: Tensor) -> Tensor:
        """Sums of floating-point values (P, ...) over the chunks of each set, in their order: (B, ...)."""
        if self.pieces is None:
            return values
        sums: Tensor = torch.segment_reduce(values, "sum", lengths=self.pieces, axis=0, unsafe=True, initial=0.0)
        return sums

    def alone(self) -> Tensor:
        """Which chunks (P,) are the only one with rows of their set."""
        if self.pieces is None:
            return torch.ones_like(self.lengths, dtype=torch.bool)
        several = self.per_set((self.lengths > 0).double()) > 1
        return ~several.repeat_interleave(self.pieces, output_size=self.lengths.shape[0])


def inside(layout: Layout, rows: int) -> Tensor:
    """Which of T flat rows belong to a set: (T,) bool."""
    row = torch.arange(rows, device=layout.sets.offsets.device)
    if layout.sets.lengths.shape[0] == 0:
        return row < 0
    owner = owners(layout, rows)
    found = row - layout.sets.offsets[owner] < layout.sets.lengths[owner]
    return found if layout.valid is None else found & layout.valid


def owners(layout: Layout, rows: int) -> Tensor:
    """The set (T,) that each flat row lies in, or in whose padding; there has to be one."""
    row = torch.arange(rows, device=layout.sets.offsets.device)
    last = layout.sets.lengths.shape[0] - 1
    return (torch.searchsorted(layout.sets.offsets, row, right=True) - 1).clamp(max=last)


def uncut(layout: Layout) -> Cut:
    """A chunk a set."""
    return Cut(layout.sets.offsets, layout.sets.lengths, None)


def cut(layout: Layout, taking: Tensor, chunk: int) -> Cut:
    """Cut a set of which n rows take part in ceil(n / chunk) pieces; their sizes differ by one at most, longer first.

    Args:
        layout: where the sets lie.
        taking: (T,) bool, rows inside a set that take part.
        chunk: the most rows of a piece.

    There are as many chunks as the shapes allow, so that nothing waits for the device; those left over are empty.
    """
    offsets, lengths = layout.sets
    sets, rows = lengths.shape[0], taking.shape[0]
    if sets == 0 or rows == 0:
        return uncut(layout)
    padded = len(layout.shape) == 2
    room = sets * -(-layout.shape[1] // chunk) if padded else (rows + sets * (chunk - 1)) // chunk
    before = F.pad(taking.cumsum(0), (1, 0))  # (T + 1,), rows that take part before each row
    first = before[offsets[:-1]]
    n = before[(offsets[:-1] + lengths).clamp(max=rows)] - first
    pieces = (n + chunk - 1) // chunk
    ends = pieces.cumsum(0)
    place = torch.arange(room, device=taking.device)
    owner = torch.searchsorted(ends, place, right=True)
    left_over = owner == sets
    owner = owner.clamp(max=sets - 1)
    index, parts = place - (ends - pieces)[owner], pieces[owner].clamp(min=1)
    size, longer = n[owner] // parts, n[owner] % parts
    rank = first[owner] + index * size + index.clamp(max=longer)
    size = torch.where(left_over, 0, size + (index < longer))
    start = torch.searchsorted(before[1:], torch.where(left_over, offsets[-1], rank) + 1)  # T for those left over
    stop = torch.searchsorted(before[1:], rank + size) + 1
    pieces = torch.where(torch.arange(sets, device=taking.device) == sets - 1, pieces + left_over.sum(), pieces)
    return Cut(torch.cat([start, offsets[-1:]]), torch.where(size > 0, stop - start, 0), pieces)
