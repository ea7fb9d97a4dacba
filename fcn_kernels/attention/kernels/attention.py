# mypy: ignore-errors
"""Set attention on the device: all queries of a set attend to a tile of its rows at once.

A program works through one of `parts` equal parts of one set, tile by tile, and through a tile in blocks of columns,
twice: first for the scores, then, with the rows still in L1 or L2, for what the scores are for. So rows are read
from memory once, whatever C is, nothing stays in registers but a tile's scores, and sums over rows grow in the
program's own place in memory. Shapes in comments: n rows of a tile, c columns of a block, h queries.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fcn_kernels.attention.inputs import DROPOUT_STREAM
from fcn_kernels.device.noise import philox_word, seed_of
from fcn_kernels.device.products import product
from fcn_kernels.device.rows import load_rows

STREAM = tl.constexpr(DROPOUT_STREAM)
TAU = tl.constexpr(2 * math.pi)
SQRT_2 = tl.constexpr(math.sqrt(2))
MAX_TURNS = tl.constexpr(2.0**22)  # float32 has no fraction of a turn beyond, and `cosine` no bound
# Of float32's smallest normal number and infinity. `fcn_kernels.sets.usable` asks the same of a row's norm, which is
# within a factor of sqrt(C) of its largest element.
NORMAL_BITS, INFINITY_BITS = tl.constexpr(0x00800000), tl.constexpr(0x7F800000)
UNSPECIALIZED = ["seed_value", "threshold", "T", "H", "parts"]  # as in the selection's kernels


class Set(NamedTuple):
    """A set and its layer, from the set's first row on."""

    rows: Any  # [N, C] by stride_row
    quality: Any  # [N] float32
    queries: Any  # [H, C] float32
    encoding_weight: Any  # [C] float32
    turns: Any  # [C / 2] float32, turns of each pair of channels per unit of norm
    stride_row: Any
    count: Any  # rows that take part
    C: Any
    H: Any
    eps: Any


class Tile(NamedTuple):
    """Some rows of a set."""

    rows: Any  # the first one's address
    row_mask: Any  # [n], rows of the set
    quality: Any  # [n], 0 for a row that takes no part
    mean: Any  # [n], of the norm's sinusoid,
    rstd: Any  # [n], its reciprocal deviation,
    slope: Any  # [n], and the mean's derivative


class Dropout(NamedTuple):
    """Which weights are dropped."""

    seed: Any
    set_id: Any
    threshold: Any
    keep_scale: Any


@triton.jit
def cosine(turns):
    """cos(2 pi turns) within 2e-7, |turns| <= 2^22. The library's takes angles of any size, and a stack to do so."""
    fraction = turns - ((turns + 12582912.0) - 12582912.0)  # adding 1.5 * 2^23 rounds to an integer
    z = 0.25 - tl.abs(fraction)  # cos(2 pi f) = sin(2 pi z); the minimax polynomial of degree 9 on |z| <= 1/4
    u = z * z
    p = 39.536706762014836 * u - 76.549782387613466
    p = p * u + 81.601004077356553
    p = p * u - 41.341655031479419
    return (p * u + 6.2831851600897227) * z


@triton.jit
def part_of_set(offsets_ptr, lengths_ptr, set_id, part, T, parts, BLOCK_N: tl.constexpr):
    """A program's rows, begin to end within the set; the set's first row, and how many of its rows take part.

    Clamped to the tensor whatever the offsets say, as their values cannot be checked without waiting.
    """
    first = tl.minimum(tl.maximum(tl.load(offsets_ptr + set_id), 0), T)
    owned = tl.maximum(tl.minimum(tl.load(offsets_ptr + set_id + 1), T) - first, 0)
    count = tl.minimum(tl.maximum(tl.load(lengths_ptr + set_id), 0), owned).to(tl.int32)
    owned = owned.to(tl.int32)
    share = tl.cdiv(tl.cdiv(owned, parts), BLOCK_N) * BLOCK_N
    begin = tl.minimum(part * share, owned)
    return begin, tl.minimum(begin + share, owned), first, count


@triton.jit
def angles(quality, turns):
    """Turns [n, c] of norms [n] with `turns` [c] per unit of norm."""
    return tl.minimum(quality[:, None] * turns[None, :], MAX_TURNS)


@triton.jit
def moments(quality, turns_ptr, C, eps, BLOCK_C: tl.constexpr):
    """Mean of a norm's sinusoid, reciprocal deviation, and the mean's derivative, [n] each.

    sin a + cos a = sqrt(2) cos(a - 1/8 turn), and sin^2 + cos^2 = 1, so the mean square is 1/2.
    """
    # [n, c], summed over the columns once: each sum over them has threads meet
    waves = tl.zeros((quality.shape[0], BLOCK_C), tl.float32)
    slopes = tl.zeros_like(waves)
    for begin in range(0, C // 2, BLOCK_C):  # @pairs
        pairs = begin + tl.arange(0, BLOCK_C)
        column_mask = pairs < C // 2
        turns = tl.load(turns_ptr + pairs, mask=column_mask, other=0.0)
        angle = angles(quality, turns) - 0.125
        waves += tl.where(column_mask[None, :], cosine(angle), 0.0)
        slopes += cosine(angle + 0.25) * turns[None, :]  # turns are 0 past the end
    mean = tl.sum(waves, axis=1) * (SQRT_2 / C)
    return mean, 1 / tl.sqrt_rn(0.5 + eps - mean * mean), tl.sum(slopes, axis=1) * (SQRT_2 * TAU / C)


@triton.jit
def load_tile(s, at, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows at, at + 1, ... of a set, but for their columns."""
    rows = at + tl.arange(0, BLOCK_N)
    row_mask = rows < s.count
    quality = tl.load(s.quality + rows, mask=row_mask, other=0.0)
    # NaN or inf would come back from a row that takes no part as 0 * NaN in sums over rows
    quality = tl.where((quality > 0) & (quality < float("inf")), quality, 0.0)
    mean, rstd, slope = moments(quality, s.turns, s.C, s.eps, BLOCK_C)
    return Tile(s.rows + tl.cast(at, tl.int64) * s.stride_row, row_mask, quality, mean, rstd, slope)


@triton.jit
def load_block(pointer, head, cols, H, C):
    """A block [h, c] of a set's (H, C)."""
    mask = (head < H)[:, None] & (cols < C)[None, :]
    return tl.load(pointer + (head[:, None] * C + cols[None, :]), mask=mask, other=0.0)


@triton.jit
def standardized(tile, s, cols):
    """The norms' sinusoids after their LayerNorm but for its weight [n, c]; that weight [c]; their angles and turns.

    A sine is the cosine a quarter turn later.
    """
    column_mask = cols < s.C
    turns = tl.load(s.turns + cols // 2, mask=column_mask, other=0.0)
    angle = angles(tile.quality, turns) + tl.where(cols % 2 == 0, -0.25, 0.0)[None, :]
    unit = (cosine(angle) - tile.mean[:, None]) * tile.rstd[:, None]
    return unit, tl.load(s.encoding_weight + cols, mask=column_mask, other=0.0), angle, turns


@triton.jit
def scores(
    tile, s, grad_ptr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """t_h . key_n [h, n]; g_h . f_n [h, n] for gradients g [H, C] of the outputs, if any; the usable rows [n]."""
    head = tl.arange(0, BLOCK_H)
    score = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
    reach = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
    largest = tl.zeros((BLOCK_N,), tl.int32)
    for column in range(0, s.C, BLOCK_C):  # @scores
        cols = column + tl.arange(0, BLOCK_C)
        stored = load_rows(tile.rows, tl.arange(0, BLOCK_N), tile.row_mask, s.stride_row, cols, s.C)  # [n, c]
        rows = stored.to(tl.float32)
        # bits of magnitudes are in their order, infinity and NaN above all, whatever a sum would lose
        largest = tl.maximum(largest, tl.max(rows.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1))
        unit, weight, _angle, _turns = standardized(tile, s, cols)
        key = tile.quality[:, None] * rows + unit * weight[None, :]
        query = load_block(s.queries, head, cols, s.H, s.C)
        score = product(query, tl.trans(key), score, OPERAND, PRECISION)
        if grad_ptr is not None:
            grad = load_block(grad_ptr, head, cols, s.H, s.C)
            reach = product(grad, tl.trans(stored), reach, OPERAND, PRECISION)
    return score, reach, (tile.quality > 0) & (largest >= NORMAL_BITS) & (largest < INFINITY_BITS)


@triton.jit
def after_dropout(share, rows, head, dropout, DROPOUT: tl.constexpr):
    """Attention weights [h, n] after dropout, dropped as `fcn_kernels.attention.torch_backend.keep_mask` says."""
    if DROPOUT:
        row = rows[None, :] + tl.zeros_like(head)[:, None]
        word = philox_word(
            dropout.seed, row, head[:, None] // 4, dropout.set_id.to(tl.int32), STREAM, head[:, None] % 4
        )
        share = tl.where(word >= dropout.threshold.to(tl.uint32), share * dropout.keep_scale, 0.0)
    return share


@triton.jit
def accumulate(pointer, where, mask, started, scale, value):
    """Add to what a program has in memory, scaled, if it has started; else that is nothing."""
    if started:
        value += tl.load(pointer + where, mask=mask, other=0.0) * scale
        tl.debug_barrier()  # who stores an element need not be all who loaded it
    tl.store(pointer + where, value, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward(
    queries_ptr, rows_ptr, quality_ptr, weight_ptr, turns_ptr, offsets_ptr, lengths_ptr, seed_ptr, seed_value: "i64",
    out_ptr, weight_sum_ptr, lse_ptr, stride_row, T, C, H, parts, threshold: "i64", keep_scale, eps,
    DROPOUT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [B, parts, H, C], weight_sum and lse [B, parts, H], each of its part of the set alone."""
    program = tl.program_id(0).to(tl.int64)
    set_id, part = program // parts, (program % parts).to(tl.int32)
    head, lane = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    valid = head < H
    begin, end, first, count = part_of_set(offsets_ptr, lengths_ptr, set_id, part, T, parts, BLOCK_N)
    s = Set(
        rows_ptr + first * stride_row, quality_ptr + first, queries_ptr + set_id * H * C,
        weight_ptr, turns_ptr, stride_row, count, C, H, eps,
    )  # fmt: skip
    dropout = Dropout(seed_of(seed_ptr, seed_value), set_id, threshold, keep_scale)
    out_ptr += program * H * C
    top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    stop = tl.maximum(tl.minimum(end, count), begin + 1)  # a part with no rows still has zeros to write
    for at in range(begin, stop, BLOCK_N):  # @steps
        tile = load_tile(s, at, BLOCK_N, BLOCK_C)
        score, _reach, usable = scores(tile, s, None, OPERAND, PRECISION, BLOCK_N, BLOCK_H, BLOCK_C)
        score = tl.where(usable[None, :], score, float("-inf"))

        # -- update the running softmax --
        peak = tl.maximum(top, tl.max(score, axis=1))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        share = tl.exp(score - shift[:, None])
        before = total * tl.exp(top - shift)
        total = before + tl.sum(share, axis=1)
        positive = tl.where(total > 0, total, 1.0)  # 0 where no row has taken part yet
        shrink = before / positive
        share = share / positive[:, None]
        share = after_dropout(share, at + lane, head, dropout, DROPOUT)
        top = peak

        # -- gather the rows --
        weight = tl.where(usable[None, :], share * tile.quality[None, :], 0.0)  # [h, n]
        tl.debug_barrier()  # what the last tile added up may be loaded by another thread
        # in memory, too: in registers it was what Triton 3.6 had none left for
        accumulate(weight_sum_ptr + program * H, head, valid, at > begin, shrink, tl.sum(share, axis=1))
        for column in range(0, C, BLOCK_C):  # @gathers
            cols = column + tl.arange(0, BLOCK_C)
            rows = load_rows(tile.rows, lane, tile.row_mask & usable, stride_row, cols, C)
            gathered = product(weight, rows, None, OPERAND, PRECISION)
            where = head[:, None] * C + cols[None, :]
            mask = valid[:, None] & (cols < C)[None, :]
            accumulate(out_ptr, where, mask, at > begin, shrink[:, None], gathered)
    tl.store(lse_ptr + program * H + head, top + tl.log(tl.where(total > 0, total, 1.0)), mask=valid)


@triton.jit
def write_gradients(
    tile, s, usable, kept, dscore, started, grad_ptr, dqueries_ptr, drows_ptr, dweight_ptr, tile_end,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of a tile's rows, and its share of those of queries and weight; returns those of its norms [n]."""
    head, lane = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    kept, dscore = kept.to(OPERAND), dscore.to(OPERAND)  # [h, n]
    dquality = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    tl.debug_barrier()  # what the last tile added up may be loaded by another thread
    for column in range(0, s.C, BLOCK_C):  # @writes
        cols = column + tl.arange(0, BLOCK_C)
        column_mask = cols < s.C
        rows = load_rows(tile.rows, lane, tile.row_mask & usable, s.stride_row, cols, s.C).to(tl.float32)
        unit, weight, angle, turns = standardized(tile, s, cols)
        key = tile.quality[:, None] * rows + unit * weight[None, :]
        query = load_block(s.queries, head, cols, s.H, s.C)
        grad = load_block(grad_ptr, head, cols, s.H, s.C)
        dkey = product(tl.trans(dscore), query, None, OPERAND, PRECISION)  # [n, c]
        drow = product(tl.trans(kept), grad, dkey, OPERAND, PRECISION)  # of x = q f
        # -- to the norm: of x = q f, and through the standardized sinusoid --
        wave_slope = cosine(angle + 0.25) * (turns * TAU)[None, :]
        unit_slope = wave_slope + (tile.slope * tile.rstd * tile.mean)[:, None] * unit - tile.slope[:, None]
        dquality += drow * rows + dkey * weight[None, :] * (tile.rstd[:, None] * unit_slope)
        where = lane[:, None] * s.C + cols[None, :]
        mask = (lane < tile_end)[:, None] & column_mask[None, :]
        tl.store(drows_ptr + where, (drow * tile.quality[:, None]).to(drows_ptr.dtype.element_ty), mask=mask)
        # -- sums over the rows --
        dweight = tl.sum(tl.where(usable[:, None], dkey * unit, 0.0), axis=0)
        accumulate(dweight_ptr, cols, column_mask, started, 1.0, dweight)
        dquery = product(dscore, key, None, OPERAND, PRECISION)  # [h, c]
        where = head[:, None] * s.C + cols[None, :]
        accumulate(dqueries_ptr, where, (head < s.H)[:, None] & column_mask[None, :], started, 1.0, dquery)
    return tl.where(usable, tl.sum(dquality, axis=1), 0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward(
    queries_ptr, rows_ptr, quality_ptr, weight_ptr, turns_ptr, offsets_ptr, lengths_ptr, seed_ptr, seed_value: "i64",
    lse_ptr, grad_ptr, grad_weight_sum_ptr, delta_ptr, dqueries_ptr, drows_ptr, dquality_ptr, dweight_ptr,
    stride_row, T, C, H, parts, threshold: "i64", keep_scale, eps,
    DROPOUT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of rows [T, C] and norms [T]; of queries [B, parts, H, C] and weight [B, parts, C], a part each."""
    program = tl.program_id(0).to(tl.int64)
    set_id, part = program // parts, (program % parts).to(tl.int32)
    head, lane = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    valid = head < H
    begin, end, first, count = part_of_set(offsets_ptr, lengths_ptr, set_id, part, T, parts, BLOCK_N)
    s = Set(
        rows_ptr + first * stride_row, quality_ptr + first, queries_ptr + set_id * H * C,
        weight_ptr, turns_ptr, stride_row, count, C, H, eps,
    )  # fmt: skip
    dropout = Dropout(seed_of(seed_ptr, seed_value), set_id, threshold, keep_scale)
    grad_ptr += set_id * H * C
    dqueries_ptr += program * H * C
    dweight_ptr += program * C
    of_set = set_id * H + head
    lse = tl.load(lse_ptr + of_set, mask=valid, other=0.0)
    grad_weight_sum = tl.load(grad_weight_sum_ptr + of_set, mask=valid, other=0.0)
    delta = tl.load(delta_ptr + of_set, mask=valid, other=0.0)
    stop = tl.maximum(end, begin + 1)  # a part with no rows still has zeros to write
    for at in range(begin, stop, BLOCK_N):  # @steps
        tile = load_tile(s, at, BLOCK_N, BLOCK_C)
        score, reach, usable = scores(tile, s, grad_ptr, OPERAND, PRECISION, BLOCK_N, BLOCK_H, BLOCK_C)
        mask = valid[:, None] & usable[None, :]
        # never above 1, however large a score's rounding is
        share = tl.exp(tl.where(mask, tl.minimum(score - lse[:, None], 0.0), float("-inf")))
        kept = after_dropout(share, at + lane, head, dropout, DROPOUT)
        reach = reach * tile.quality[None, :] + grad_weight_sum[:, None]
        dscore = tl.where(mask, kept * reach - share * delta[:, None], 0.0)
        tile = Tile(tile.rows, tile.row_mask, tl.where(usable, tile.quality, 0.0), tile.mean, tile.rstd, tile.slope)
        dquality = write_gradients(
            tile, s, usable, kept, dscore, at > begin, grad_ptr, dqueries_ptr, drows_ptr + (first + at) * C,
            dweight_ptr, end - at, OPERAND, PRECISION, BLOCK_N, BLOCK_H, BLOCK_C,
        )  # fmt: skip
        tl.store(dquality_ptr + first + at + lane, dquality, mask=at + lane < end)
