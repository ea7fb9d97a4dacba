"""Gradients of rows and bank from the k bank rows of each row, in a fixed order: a program has all of its sum.

Shapes in comments: c columns, C up to the next power of two.
"""

import triton
import triton.language as tl


@triton.jit
def unit_row(rows_ptr, scale_ptr, row, there, stride, cols, C):
    """A row [c] times its scale, float32; 0 where it is not usable or not there."""
    scale = tl.load(scale_ptr + row, there, 0.0)
    elements = tl.load(rows_ptr + tl.cast(row, tl.int64) * stride + cols, cols < C, 0.0).to(tl.float32)
    scales = tl.where(cols < C, scale, 0.0)  # a mask of them would have the elements loaded one by one
    return tl.where(scales > 0, elements * scales, 0.0)


@triton.jit
def through_norm(gradient, unit, inverse):
    """(I - u u^T) / |x| of a unit row's gradient; the gradient itself without an inverse."""
    return (gradient - tl.sum(gradient * unit, 0) * unit) * inverse


@triton.jit(do_not_specialize=["k"])
def gather_rows(
    rows_ptr, bank_ptr, row_scale_ptr, bank_scale_ptr, inverse_ptr, indices_ptr, weight_ptr, slope_ptr, mean_ptr,
    pair_ptr, drows_ptr, C, stride_rows, stride_bank, k, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """ds (N, k) = weight + slope (s - mean) of each row's bank rows; drows (N, C) where it is wanted."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    u = unit_row(rows_ptr, row_scale_ptr, row, row >= 0, stride_rows, cols, C)  # [c]
    weight, slope, mean = tl.load(weight_ptr + row), tl.load(slope_ptr + row), tl.load(mean_ptr + row)
    du = tl.zeros([BLOCK_C], tl.float32)
    for t in range(0, k):
        place = tl.load(indices_ptr + row * k + t)
        there = place >= 0
        v = unit_row(bank_ptr, bank_scale_ptr, tl.maximum(place, 0), there, stride_bank, cols, C)
        ds = tl.where(there, weight + slope * (tl.sum(u * v, 0) - mean), 0.0)
        tl.store(pair_ptr + row * k + t, ds)
        du += ds * v
    if drows_ptr is not None:
        if inverse_ptr is not None:
            du = through_norm(du, u, tl.load(inverse_ptr + row))
        tl.store(drows_ptr + row * C + cols, du, cols < C)


@triton.jit(do_not_specialize=["k"])
def gather_bank(
    rows_ptr, bank_ptr, row_scale_ptr, bank_scale_ptr, inverse_ptr, order_ptr, starts_ptr, pair_ptr, dbank_ptr,
    C, stride_rows, stride_bank, k, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dbank (M, C): of each bank row the sum of ds u over its pairs, in the order of i: from starts (M + 1,) on."""
    place = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    dv = tl.zeros([BLOCK_C], tl.float32)
    for at in range(tl.load(starts_ptr + place), tl.load(starts_ptr + place + 1)):
        pair = tl.load(order_ptr + at)
        dv += tl.load(pair_ptr + pair) * unit_row(rows_ptr, row_scale_ptr, pair // k, pair >= 0, stride_rows, cols, C)
    if inverse_ptr is not None:
        v = unit_row(bank_ptr, bank_scale_ptr, place, place >= 0, stride_bank, cols, C)
        dv = through_norm(dv, v, tl.load(inverse_ptr + place))
    tl.store(dbank_ptr + place * C + cols, dv, cols < C)
