# mypy: ignore-errors
"""Sets in pieces of a fixed number of rows, a program each, and the sums that pieces leave.

A piece is counted from its set's first row, so that a set's sums do not depend on what else is in the batch. Lengths
are on the device, and the host launches for the most pieces that there can be: set b has the slots from
offsets[b] // PIECE + b to the next set's, which are enough for its rows, and at least one.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Piece(NamedTuple):
    """A program's rows [begin, end) of a set, of which those below `count` take part."""

    set_id: Any
    first: Any  # the set's first row, int64
    begin: Any
    end: Any
    count: Any  # of the set
    index: Any  # which of the set's pieces


@triton.jit
def bounds(offsets_ptr, lengths_ptr, set_id, T):
    """A set's first row, how many it owns, and how many of them take part.

    Clamped to the tensor whatever the offsets say, as their values cannot be checked without waiting.
    """
    first = tl.minimum(tl.maximum(tl.load(offsets_ptr + set_id), 0), T)
    owned = tl.maximum(tl.minimum(tl.load(offsets_ptr + set_id + 1), T) - first, 0)
    count = tl.minimum(tl.maximum(tl.load(lengths_ptr + set_id), 0), owned)
    return first, owned.to(tl.int32), count.to(tl.int32)


@triton.jit
def first_slot(offsets_ptr, set_id, T, PIECE: tl.constexpr):
    """Of a set's pieces, among all."""
    return tl.minimum(tl.maximum(tl.load(offsets_ptr + set_id), 0), T) // PIECE + set_id


@triton.jit
def find_piece(offsets_ptr, lengths_ptr, slot, sets, T, PIECE: tl.constexpr):
    """The piece of a slot; slots behind a set's last piece have no rows."""
    low, high = 0, sets
    while high - low > 1:  # the last set that starts at or before the slot
        middle = (low + high) // 2
        before = first_slot(offsets_ptr, middle, T, PIECE) <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    first, owned, count = bounds(offsets_ptr, lengths_ptr, low, T)
    index = tl.maximum(slot - first_slot(offsets_ptr, low, T, PIECE), 0).to(tl.int32)
    begin = tl.minimum(index * PIECE, owned)
    return Piece(low, first, begin, tl.minimum(begin + PIECE, owned), count, index)


@triton.jit
def add_block(partial_ptr, out_ptr, set_id, slot, pieces, block, size, BLOCK: tl.constexpr):
    """out [B, size], a block of one set, from partial [slots, size], piece by piece."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    partial_ptr += slot.to(tl.int64) * size
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(pieces):
        total += tl.load(partial_ptr + at, mask=inside, other=0.0)
        partial_ptr += size
    tl.store(out_ptr + tl.cast(set_id, tl.int64) * size + at, total, mask=inside)


@triton.jit(do_not_specialize=["T"])
def add_pieces(
    offsets_ptr, lengths_ptr, sums_ptr, key_sums_ptr, masses_ptr, sums_partial_ptr, key_sums_partial_ptr,
    masses_partial_ptr, T, C, D, M, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums [B, M, C], key sums [B, M, D] and masses [B, M] of the sets that have more pieces than one.

    A program adds a block of one of the three.
    """
    set_id, block = tl.program_id(0), tl.program_id(1)
    _first, _owned, count = bounds(offsets_ptr, lengths_ptr, set_id, T)
    pieces = tl.cdiv(count, PIECE)
    if pieces > 1:
        slot = first_slot(offsets_ptr, set_id, T, PIECE)
        of_sums, of_keys = tl.cdiv(M * C, BLOCK), tl.cdiv(M * D, BLOCK)
        if block < of_sums:
            add_block(sums_partial_ptr, sums_ptr, set_id, slot, pieces, block, M * C, BLOCK)
        elif block < of_sums + of_keys:
            add_block(key_sums_partial_ptr, key_sums_ptr, set_id, slot, pieces, block - of_sums, M * D, BLOCK)
        else:
            add_block(masses_partial_ptr, masses_ptr, set_id, slot, pieces, block - of_sums - of_keys, M, BLOCK)
