"""Device code for the rows of sets: where they are, loading them, and sums over their columns.

Shapes in comments: n rows of a tile, c columns (C up to the next power of two).
"""

import triton
import triton.language as tl


@triton.jit
def locate(set_id, lengths_ptr, cu_seqlens_ptr, stride_set, stride_row, N, R):
    """Where a set's rows are: (first among the R rows, how many, offset into the features).

    Clamped to the tensors whatever lengths and offsets say, as their values cannot be checked without waiting.
    """
    if cu_seqlens_ptr is not None:
        first = tl.load(cu_seqlens_ptr + set_id).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), R)
        last = tl.load(cu_seqlens_ptr + set_id + 1).to(tl.int64)
        count = tl.maximum(tl.minimum(last, R) - first, 0)
        offset = first * stride_row
    else:
        first = set_id.to(tl.int64) * N
        offset = set_id.to(tl.int64) * stride_set
        count = tl.zeros_like(first) + N
        if lengths_ptr is not None:
            count = tl.minimum(tl.maximum(tl.load(lengths_ptr + set_id).to(tl.int64), 0), count)
    return first, count.to(tl.int32), offset


@triton.jit
def load_rows(rows_ptr, rows, inside, stride_row, cols, C):
    """A tile of rows [n, c], as stored."""
    where = rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
    return tl.load(rows_ptr + where, mask=inside[:, None] & (cols < C)[None, :], other=0.0)


@triton.jit
def load_row(rows_ptr, row, there, stride_row, cols, C):
    """One row [c], as stored."""
    return tl.load(rows_ptr + tl.cast(row, tl.int64) * stride_row + cols, mask=(cols < C) & there, other=0.0)
