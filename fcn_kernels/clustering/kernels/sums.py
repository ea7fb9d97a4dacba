# mypy: ignore-errors
"""Shares of rows among centers, and the sums weighted by them, a piece of a set to a program.

A program first shares out its rows, a tile at a time, and leaves the shares in memory; then it makes the sums, a block
of columns at a time over all its rows, which by then are in L2. So rows come from memory once, whatever C is, and sums
are never read back to be added to. Any number of centers goes through in blocks: what a softmax needs of all of them,
its peak and total, is kept up as in flash attention.

Shapes in comments: n rows of a tile, c columns of a block, m centers of a block.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fcn_kernels.clustering.kernels.pieces import find_piece
from fcn_kernels.device.rows import load_rows

INFINITY_BITS = tl.constexpr(0x7F800000)
UNSPECIALIZED = ["T", "sets", "fewest"]


class Constants(NamedTuple):
    """What a kernel is built for, handed on as one constant, ``BUILD``."""

    CHECK: tl.constexpr  # rows may have elements that are not finite, and then take no part
    BLOCK_N: tl.constexpr  # rows of a tile
    BLOCK_M: tl.constexpr  # centers at a time
    BLOCK_C: tl.constexpr  # columns at a time
    PIECE: tl.constexpr  # rows of a program


class Rows(NamedTuple):
    """A set's rows, from its first; pointers are None for what is not given. Keys of one set are followed by KEY_GAP
    others, then by those of the next. (Made where it is used: Triton 3.6 returns no None from a function.)"""

    value: Any  # [count, C] by stride
    key: Any  # [count, D] by stride; None: the values
    scale: Any  # [count] float32
    valid: Any  # [count] bool
    value_stride: Any
    key_stride: Any
    C: Any
    D: Any
    count: Any  # rows that take part


class Centers(NamedTuple):
    """What rows are shared out among, and a set's gradients."""

    weight: Any  # [every, D] float32
    bias: Any  # [every] float32
    every: Any  # M, and the ghosts behind them
    M: Any
    sums: Any  # [M, C] float32, gradients of the set's sums; None in the forward pass
    key_sums: Any  # [M, D]
    masses: Any  # [M]


class Softmax(NamedTuple):
    """Over the centers seen so far, of each row of a tile [n]."""

    top: Any
    total: Any
    arriving: Any  # sum of the shares' gradients, weighted
    reach: Any  # and of values . gradients of the sums


@triton.jit
def load_block(pointer, row, rows, cols, C):
    """A block [m, c] of (rows, C)."""
    mask = (row < rows)[:, None] & (cols < C)[None, :]
    return tl.load(pointer + row.to(tl.int64)[:, None] * C + cols[None, :], mask=mask, other=0.0)


@triton.jit
def magnitude_bits(rows):
    """Of each row's largest element [n]; bits are in the order of magnitudes, infinity and NaN above all."""
    return tl.max(rows.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def times_centers(
    pointer, stride, C, lane, inside, first, first_rows, second, second_rows, center, BUILD: tl.constexpr
):
    """rows . first and rows . second [n, m] for (.., C) of centers, None: zeros; bits of the largest element [n]."""
    product = tl.zeros((BUILD.BLOCK_N, BUILD.BLOCK_M), tl.float32)
    other = tl.zeros((BUILD.BLOCK_N, BUILD.BLOCK_M), tl.float32)
    largest = tl.zeros((BUILD.BLOCK_N,), tl.int32)
    for column in range(0, C, BUILD.BLOCK_C):
        cols = column + tl.arange(0, BUILD.BLOCK_C)
        rows = load_rows(pointer, lane, inside, stride, cols, C).to(tl.float32)  # [n, c]
        if BUILD.CHECK:
            largest = tl.maximum(largest, magnitude_bits(rows))
        if first is not None:
            block = load_block(first, center, first_rows, cols, C)  # [m, c]
            product = tl.dot(rows, tl.trans(block), product, input_precision="ieee")
        if second is not None:
            block = load_block(second, center, second_rows, cols, C)
            other = tl.dot(rows, tl.trans(block), other, input_precision="ieee")
    return product, other, largest


@triton.jit
def scores(rows, centers, lane, inside, scale, start, BUILD: tl.constexpr):
    """Logits [n, m] of centers from `start` on; gradients of their shares; values . gradients of the sums; bits of
    each row's largest element [n]. Without gradients these two are zeros."""
    center = start + tl.arange(0, BUILD.BLOCK_M)
    if rows.key is None:
        logit, reach, largest = times_centers(
            rows.value, rows.value_stride, rows.C, lane, inside, centers.weight, centers.every, centers.sums, centers.M,
            center, BUILD,
        )  # fmt: skip
        arriving = reach * scale[:, None]
    else:
        logit, arriving, largest = times_centers(
            rows.key, rows.key_stride, rows.D, lane, inside, centers.weight, centers.every, centers.key_sums, centers.M,
            center, BUILD,
        )  # fmt: skip
        reach = tl.zeros_like(arriving)
        if BUILD.CHECK or centers.sums is not None:
            reach, _none, of_values = times_centers(
                rows.value, rows.value_stride, rows.C, lane, inside, centers.sums, centers.M, None, 0, center, BUILD
            )
            largest = tl.maximum(largest, of_values)
            arriving += reach * scale[:, None]
    bias = tl.load(centers.bias + center, mask=center < centers.every, other=0.0)
    logit = tl.where((center < centers.every)[None, :], logit + bias[None, :], float("-inf"))
    if centers.masses is not None:
        arriving += tl.load(centers.masses + center, mask=center < centers.M, other=0.0)[None, :]
    return logit, arriving, reach, largest


@triton.jit
def load_scale(rows, lane, inside):
    """Scales [n], 1 where none are given."""
    if rows.scale is None:
        scale = tl.full(lane.shape, 1.0, tl.float32)
    else:
        scale = tl.load(rows.scale + lane, mask=inside, other=0.0)
    return scale


@triton.jit
def share_out(rows, centers, at, shares_ptr, through_ptr, stride, BUILD: tl.constexpr):
    """Shares [n, m] of a tile's rows to memory, by `stride`; in the backward pass the logits' gradients, too.

    Returns the rows that take part, their scale, and the gradient of that [n] each.
    """
    lane = at + tl.arange(0, BUILD.BLOCK_N)
    inside = lane < rows.count
    scale = load_scale(rows, lane, inside)
    zero = tl.zeros((BUILD.BLOCK_N,), tl.float32)
    s = Softmax(tl.full((BUILD.BLOCK_N,), float("-inf"), tl.float32), zero, zero, zero)
    largest = tl.zeros((BUILD.BLOCK_N,), tl.int32)
    # -- logits, and what the softmax needs of all of them --
    for start in range(0, centers.every, BUILD.BLOCK_M):
        logit, arriving, reach, of_block = scores(rows, centers, lane, inside, scale, start, BUILD)
        largest = tl.maximum(largest, of_block)
        top = tl.maximum(s.top, tl.max(logit, axis=1))
        shrink, weight = tl.exp(s.top - top), tl.exp(logit - top[:, None])
        s = Softmax(
            top,
            s.total * shrink + tl.sum(weight, axis=1),
            s.arriving * shrink + tl.sum(weight * arriving, axis=1),
            s.reach * shrink + tl.sum(weight * reach, axis=1),
        )
        center = start + tl.arange(0, BUILD.BLOCK_M)
        where = lane.to(tl.int64)[:, None] * stride + center[None, :]
        mask = inside[:, None] & (center < stride)[None, :]
        tl.store(shares_ptr + where, logit, mask=mask)
        if through_ptr is not None:
            tl.store(through_ptr + where, arriving, mask=mask)
    usable = inside
    if rows.valid is not None:
        usable = usable & (tl.load(rows.valid + lane, mask=inside, other=0) != 0)
    if BUILD.CHECK:
        if rows.scale is not None:
            largest = tl.maximum(largest, scale.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        usable = usable & (largest < INFINITY_BITS)
    tl.debug_barrier()  # logits change hands between threads
    # -- shares --
    for start in range(0, stride, BUILD.BLOCK_M):
        center = start + tl.arange(0, BUILD.BLOCK_M)
        where = lane.to(tl.int64)[:, None] * stride + center[None, :]
        mask = inside[:, None] & (center < stride)[None, :]
        share = tl.exp(tl.load(shares_ptr + where, mask=mask, other=0.0) - s.top[:, None]) / s.total[:, None]
        share = tl.where(usable[:, None], share, 0.0)
        if through_ptr is not None:
            arriving = tl.load(through_ptr + where, mask=mask, other=0.0)
            through = share * (arriving - (s.arriving / s.total)[:, None])
            tl.debug_barrier()
            tl.store(through_ptr + where, tl.where(usable[:, None], through, 0.0), mask=mask)
        else:
            tl.debug_barrier()
        tl.store(shares_ptr + where, share, mask=mask)
    tl.debug_barrier()
    return usable, tl.where(usable, scale, 0.0), tl.where(usable, s.reach / s.total, 0.0)


@triton.jit
def gather(
    shares_ptr, stride, start, rows_ptr, row_stride, C, scale_ptr, begin, stop, out_ptr, out_rows, BUILD: tl.constexpr
):
    """out [m, C] from row `start` on = sum over rows [begin, stop) of shares [n, m] by `stride`, scaled, and rows.

    Returns the bits of its largest element.
    """
    center, largest = start + tl.arange(0, BUILD.BLOCK_M), tl.zeros((BUILD.BLOCK_M,), tl.int32)
    for column in range(0, C, BUILD.BLOCK_C):
        cols = column + tl.arange(0, BUILD.BLOCK_C)
        total = tl.zeros((BUILD.BLOCK_M, BUILD.BLOCK_C), tl.float32)
        for at in range(begin, stop, BUILD.BLOCK_N):
            lane = at + tl.arange(0, BUILD.BLOCK_N)
            share = load_rows(
                shares_ptr + start, lane, lane < stop, stride, tl.arange(0, BUILD.BLOCK_M), stride - start
            )
            # NaN or inf would come back from a row that takes no part as 0 * NaN
            taking = tl.max((share != 0).to(tl.int32), axis=1) > 0
            rows = load_rows(rows_ptr, lane, taking, row_stride, cols, C).to(tl.float32)
            if scale_ptr is not None:
                share *= tl.load(scale_ptr + lane, mask=taking, other=0.0)[:, None]
            total = tl.dot(tl.trans(share), rows, total, input_precision="ieee")
        largest = tl.maximum(largest, magnitude_bits(total))
        mask = (center < out_rows)[:, None] & (cols < C)[None, :]
        tl.store(out_ptr + center.to(tl.int64)[:, None] * C + cols[None, :], total, mask=mask)
    return tl.max(largest, axis=0)


@triton.jit
def add_up(shares_ptr, stride, start, begin, stop, out_ptr, BUILD: tl.constexpr):
    """out [m] from `start` on = sum over rows [begin, stop) of shares [n, m]."""
    center = tl.arange(0, BUILD.BLOCK_M)
    total = tl.zeros((BUILD.BLOCK_M,), tl.float32)
    for at in range(begin, stop, BUILD.BLOCK_N):
        lane = at + tl.arange(0, BUILD.BLOCK_N)
        total += tl.sum(load_rows(shares_ptr + start, lane, lane < stop, stride, center, stride - start), axis=0)
    tl.store(out_ptr + start + center, total, mask=start + center < stride)


@triton.jit
def share_piece(
    rows, centers, begin, stop, shares_ptr, sums_ptr, key_sums_ptr, masses_ptr, BUILD: tl.constexpr
):  # fmt: skip
    """Shares [count, M] of rows [begin, stop), and their sums [M, C], key sums [M, D] and masses [M].

    Returns the bits of the sums' largest element.
    """
    M, largest = centers.M, tl.full((), 0, tl.int32)
    for at in range(begin, stop, BUILD.BLOCK_N):
        share_out(rows, centers, at, shares_ptr, None, M, BUILD)
    for start in range(0, M, BUILD.BLOCK_M):
        add_up(shares_ptr, M, start, begin, stop, masses_ptr, BUILD)
        found = gather(
            shares_ptr, M, start, rows.value, rows.value_stride, rows.C, rows.scale, begin, stop, sums_ptr, M, BUILD
        )
        largest = tl.maximum(largest, found)
        if rows.key is not None:
            gather(
                shares_ptr, M, start, rows.key, rows.key_stride, rows.D, None, begin, stop, key_sums_ptr, M, BUILD
            )  # fmt: skip
    return largest


@triton.jit(do_not_specialize=UNSPECIALIZED)
def share_forward(
    values_ptr, keys_ptr, scale_ptr, valid_ptr, weight_ptr, bias_ptr, offsets_ptr, lengths_ptr, shares_ptr, sums_ptr,
    key_sums_ptr, masses_ptr, sums_partial_ptr, key_sums_partial_ptr, masses_partial_ptr,
    value_stride, key_stride, T, C, D, every, M, sets, fewest, KEY_GAP: tl.constexpr,
    BUILD: tl.constexpr,
):  # fmt: skip
    """Shares [T, M]; sums [B, M, C], key_sums [B, M, D] and masses [B, M] of sets of one piece, and of each piece
    [slots, ...] of the others. Of sets with at least `fewest` rows and others in the gap."""
    slot = tl.program_id(0).to(tl.int64)
    p = find_piece(offsets_ptr, lengths_ptr, slot, sets, T, BUILD.PIECE)
    if ((p.begin >= p.count) & (p.index > 0)) | (p.count + KEY_GAP < fewest):
        return
    values_ptr += p.first * value_stride
    if keys_ptr is not None:
        keys_ptr += (p.first + p.set_id * KEY_GAP) * key_stride
    if scale_ptr is not None:
        scale_ptr += p.first
    if valid_ptr is not None:
        valid_ptr += p.first
    rows = Rows(values_ptr, keys_ptr, scale_ptr, valid_ptr, value_stride, key_stride, C, D, p.count)
    centers = Centers(weight_ptr, bias_ptr, every, M, None, None, None)
    shares_ptr += p.first * M
    place = tl.cast(p.set_id, tl.int64)
    if p.count > BUILD.PIECE:
        place, sums_ptr, masses_ptr = slot, sums_partial_ptr, masses_partial_ptr
        if keys_ptr is not None:
            key_sums_ptr = key_sums_partial_ptr
    share_piece(
        rows, centers, p.begin, tl.minimum(p.end, p.count), shares_ptr, sums_ptr + place * M * C,
        key_sums_ptr + place * M * D, masses_ptr + place * M, BUILD,
    )  # fmt: skip


@triton.jit
def spread(shares_ptr, through_ptr, centers, lane, inside, first, second, C, cols, scale, BUILD: tl.constexpr):
    """scale shares first + through second [n, c], for first [M, C] and second [every, C], either None for nothing."""
    out = tl.zeros((BUILD.BLOCK_N, BUILD.BLOCK_C), tl.float32)
    for start in range(0, centers.every, BUILD.BLOCK_M):
        lanes = tl.arange(0, BUILD.BLOCK_M)
        if first is not None:
            share = load_rows(shares_ptr + start, lane, inside, centers.every, lanes, centers.every - start)
            block = load_block(first, start + lanes, centers.M, cols, C)  # [m, c]
            out = tl.dot(share * scale[:, None], block, out, input_precision="ieee")
        if second is not None:
            through = load_rows(through_ptr + start, lane, inside, centers.every, lanes, centers.every - start)
            block = load_block(second, start + lanes, centers.every, cols, C)
            out = tl.dot(through, block, out, input_precision="ieee")
    return out


@triton.jit
def write_rows(
    rows, centers, at, end, usable, scale, along, shares_ptr, through_ptr, dvalues_ptr, dkeys_ptr, BUILD: tl.constexpr
):
    """Gradients of a tile's values and keys; `along` [n] is that of the scaled values along themselves, or None."""
    lane = at + tl.arange(0, BUILD.BLOCK_N)
    if dvalues_ptr is not None:
        for column in range(0, rows.C, BUILD.BLOCK_C):
            cols = column + tl.arange(0, BUILD.BLOCK_C)
            second = centers.weight if rows.key is None else None
            out = spread(
                shares_ptr, through_ptr, centers, lane, usable, centers.sums, second, rows.C, cols, scale, BUILD
            )
            if along is not None:
                value = load_rows(rows.value, lane, usable, rows.value_stride, cols, rows.C).to(tl.float32)
                out -= value * scale[:, None] * along[:, None]
            where = lane.to(tl.int64)[:, None] * rows.C + cols[None, :]
            mask = (lane < end)[:, None] & (cols < rows.C)[None, :]
            tl.store(dvalues_ptr + where, out.to(dvalues_ptr.dtype.element_ty), mask=mask)
    if rows.key is not None:
        one = tl.full((BUILD.BLOCK_N,), 1.0, tl.float32)
        for column in range(0, rows.D, BUILD.BLOCK_C):
            cols = column + tl.arange(0, BUILD.BLOCK_C)
            out = spread(
                shares_ptr, through_ptr, centers, lane, usable, centers.key_sums, centers.weight, rows.D, cols, one,
                BUILD,
            )  # fmt: skip
            where = lane.to(tl.int64)[:, None] * rows.D + cols[None, :]
            tl.store(dkeys_ptr + where, out, mask=(lane < end)[:, None] & (cols < rows.D)[None, :])


@triton.jit
def clear_outside(pointer, row, rows, C, BUILD: tl.constexpr):
    """Zeros to rows [n] of (.., C), of those before `rows[0]` and from `rows[1]` up to `rows[2]`."""
    outside = (row < rows[0]) | ((row >= rows[1]) & (row < rows[2]))
    for column in range(0, C, BUILD.BLOCK_C):
        cols = column + tl.arange(0, BUILD.BLOCK_C)
        zero = tl.zeros((BUILD.BLOCK_N, BUILD.BLOCK_C), pointer.dtype.element_ty)
        tl.store(pointer + row[:, None] * C + cols[None, :], zero, mask=outside[:, None] & (cols < C)[None, :])


@triton.jit
def clear_rows_of_no_set(slot, offsets_ptr, dvalues_ptr, dkeys_ptr, dscale_ptr, T, C, D, sets, BUILD: tl.constexpr):
    """Zeros to the gradients of rows before the first set and behind the last, of those that a slot has of all T."""
    first = tl.minimum(tl.maximum(tl.load(offsets_ptr), 0), T)
    last = tl.minimum(tl.maximum(tl.load(offsets_ptr + sets), first), T)
    begin = slot * BUILD.PIECE
    if (begin < first) | ((last < T) & (begin + BUILD.PIECE > last)):
        for at in range(0, BUILD.PIECE, BUILD.BLOCK_N):
            row = begin + at + tl.arange(0, BUILD.BLOCK_N)
            if dvalues_ptr is not None:
                clear_outside(dvalues_ptr, row, (first, last, T), C, BUILD)
            if dkeys_ptr is not None:
                clear_outside(dkeys_ptr, row, (first, last, T), D, BUILD)
            if dscale_ptr is not None:
                clear_outside(dscale_ptr, row, (first, last, T), 1, BUILD)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def share_backward(
    values_ptr, keys_ptr, scale_ptr, valid_ptr, norms_ptr, weight_ptr, bias_ptr, offsets_ptr, lengths_ptr,
    grad_sums_ptr, grad_key_sums_ptr, grad_masses_ptr, shares_ptr, through_ptr, dvalues_ptr, dkeys_ptr, dscale_ptr,
    dweight_ptr, dbias_ptr, value_stride, key_stride, T, C, D, every, M, sets, KEY_GAP: tl.constexpr,
    BUILD: tl.constexpr,
):  # fmt: skip
    """Gradients of values [T, C], keys [T, D] and scale [T]; of weight and bias each piece's part [slots, every, ..].

    Shares [T, every] and through [T, every], the gradients of the logits, stand in memory meanwhile. With norms [T] the
    scale is 1 / (norm + 1e-5), and its gradient goes on to the values. Keys' gradients stand as the keys do.
    """
    slot = tl.program_id(0).to(tl.int64)
    p = find_piece(offsets_ptr, lengths_ptr, slot, sets, T, BUILD.PIECE)
    values_ptr += p.first * value_stride
    if keys_ptr is not None:
        keys_ptr += (p.first + p.set_id * KEY_GAP) * key_stride
    if scale_ptr is not None:
        scale_ptr += p.first
    if valid_ptr is not None:
        valid_ptr += p.first
    rows = Rows(values_ptr, keys_ptr, scale_ptr, valid_ptr, value_stride, key_stride, C, D, p.count)
    clear_rows_of_no_set(
        slot, offsets_ptr, dvalues_ptr, None if KEY_GAP else dkeys_ptr, dscale_ptr, T, C, D, sets, BUILD
    )
    place = tl.cast(p.set_id, tl.int64)
    centers = Centers(
        weight_ptr, bias_ptr, every, M, grad_sums_ptr + place * M * C,
        None if keys_ptr is None else grad_key_sums_ptr + place * M * D, grad_masses_ptr + place * M,
    )  # fmt: skip
    shares_ptr += p.first * every
    through_ptr += p.first * every
    if dvalues_ptr is not None:
        dvalues_ptr += p.first * C
    if keys_ptr is not None:
        dkeys_ptr += (p.first + p.set_id * KEY_GAP) * D
    for at in range(p.begin, p.end, BUILD.BLOCK_N):
        usable, scale, dscale = share_out(rows, centers, at, shares_ptr, through_ptr, every, BUILD)
        lane = at + tl.arange(0, BUILD.BLOCK_N)
        along = None
        if norms_ptr is not None:
            norm = tl.load(norms_ptr + p.first + lane, mask=usable, other=0.0)
            along = dscale * scale / tl.where(norm > 0, norm, 1.0)  # times the scale again, it may leave the range
        if dscale_ptr is not None:
            tl.store(dscale_ptr + p.first + lane, dscale, mask=lane < p.end)
        write_rows(
            rows, centers, at, p.end, usable, scale, along, shares_ptr, through_ptr, dvalues_ptr, dkeys_ptr, BUILD
        )
    stop = tl.minimum(p.end, p.count)
    dweight_ptr += slot * every * D
    for start in range(0, every, BUILD.BLOCK_M):
        add_up(through_ptr, every, start, p.begin, stop, dbias_ptr + slot * every, BUILD)
        if keys_ptr is None:
            gather(
                through_ptr, every, start, rows.value, value_stride, C, None, p.begin, stop, dweight_ptr, every, BUILD
            )
        else:
            gather(through_ptr, every, start, rows.key, key_stride, D, None, p.begin, stop, dweight_ptr, every, BUILD)
