"""Device code for the rows of sets: where they are, loading them, and sums over their columns.

Shapes in comments: n rows of a tile, c columns (C up to the next power of two).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Layout(NamedTuple):
    """How sets lie in memory; pointers are None for what is not given."""

    sets: Any
    lengths: Any  # [B]
    cu_seqlens: Any  # [B + 1]
    stride_set: Any
    stride_row: Any
    N: Any  # rows of a padded set
    R: Any  # rows of all sets


@triton.jit
def locate(set_id, layout):
    """Where a set's rows are, or those of several: (first among the R rows, how many, offset into the features).

    Clamped to the tensors whatever lengths and offsets say, as their values cannot be checked without waiting.
    """
    if layout.cu_seqlens is not None:
        first = tl.load(layout.cu_seqlens + set_id).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), layout.R)
        last = tl.load(layout.cu_seqlens + set_id + 1).to(tl.int64)
        count = tl.maximum(tl.minimum(last, layout.R) - first, 0)
        offset = first * layout.stride_row
    else:
        first = set_id.to(tl.int64) * layout.N
        offset = set_id.to(tl.int64) * layout.stride_set
        count = tl.zeros_like(first) + layout.N
        if layout.lengths is not None:
            count = tl.minimum(tl.maximum(tl.load(layout.lengths + set_id).to(tl.int64), 0), count)
    return first, count.to(tl.int32), offset


@triton.jit
def set_of(program, layout, above, longest, TWICE: tl.constexpr):
    """A program's set, and of how many rows it has to be, (above, longest].

    Of TWICE as many programs as sets, the second half have those of ``above`` rows or fewer: so these are begun last.
    """
    if TWICE:
        first = program < layout.sets
        program = tl.where(first, program, program - layout.sets)
        above, longest = tl.where(first, above, -1), tl.where(first, longest, above)
    return program, above, longest


@triton.jit
def next_set(low, end, above, longest, layout, LOOK: tl.constexpr):
    """The first set of [low, end), which are LOOK at the most, with (above, longest] rows; else ``end``."""
    found = end
    if low < end:
        set_id = low + tl.arange(0, LOOK)
        _, count, _ = locate(tl.minimum(set_id, layout.sets - 1), layout)
        mine = (set_id < end) & (count > above) & (count <= longest)
        found = tl.min(tl.where(mine, set_id, end), axis=0)
    return found


@triton.jit
def load_rows(rows_ptr, rows, inside, stride_row, cols, C):
    """A tile of rows [n, c], as stored."""
    where = rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
    return tl.load(rows_ptr + where, mask=inside[:, None] & (cols < C)[None, :], other=0.0)


@triton.jit
def load_row(rows_ptr, row, there, stride_row, cols, C):
    """One row [c], as stored."""
    return tl.load(rows_ptr + tl.cast(row, tl.int64) * stride_row + cols, mask=(cols < C) & there, other=0.0)
