"""Norms of rows, whatever their size, without a wait for what they are."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def measure_rows(rows_ptr, norms_ptr, N, C, stride, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """|x| (N,) float32 of rows (N, C), as hypot: of the rows over a power of two near their largest element."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = rows.to(tl.int64)[:, None] * stride
    largest = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        x = tl.load(rows_ptr + begin + c[None, :], (rows < N)[:, None] & (c < C)[None, :], 0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 252)
    down = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    up = (exponent << 23).to(tl.float32, bitcast=True)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        x = tl.load(rows_ptr + begin + c[None, :], (rows < N)[:, None] & (c < C)[None, :], 0.0).to(tl.float32)
        part = x * down[:, None]
        squares += tl.sum(part * part, 1)
    tl.store(norms_ptr + rows, tl.sqrt(squares) * up, rows < N)
