# mypy: ignore-errors
"""Set attention on the device: all queries of a set attend to a tile of its rows at once.

A program works through one of SPLITS equal parts of one set, tile by tile, and through a tile in blocks of columns,
twice: first for the scores, then, with the rows still in L1 or L2, for what the scores are for. So rows are read
from memory once, whatever C is, nothing stays in registers but a tile's scores, and sums over rows grow in the
program's own place in memory. Shapes in comments: n rows of a tile, c columns of a block, h queries.
"""

import math

import triton
import triton.language as tl

from fcn_kernels.attention.inputs import DROPOUT_STREAM
from fcn_kernels.device.noise import philox_word, seed_of
from fcn_kernels.device.rows import load_rows

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
STREAM = tl.constexpr(DROPOUT_STREAM)
TAU = tl.constexpr(2 * math.pi)
SQRT_2 = tl.constexpr(math.sqrt(2))
UNSPECIALIZED = ["seed_value", "threshold", "T", "H", "SPLITS"]  # as in kernels.common


@triton.jit
def cosine(turns):
    """cos(2 pi turns) within 2e-7, |turns| < 2^22. The library's takes angles of any size, and a stack to do so."""
    fraction = turns - ((turns + 12582912.0) - 12582912.0)  # adding 1.5 * 2^23 rounds to an integer
    z = 0.25 - tl.abs(fraction)  # cos(2 pi f) = sin(2 pi z); the minimax polynomial of degree 9 on |z| <= 1/4
    u = z * z
    p = 39.536706762014836 * u - 76.549782387613466
    p = p * u + 81.601004077356553
    p = p * u - 41.341655031479419
    return (p * u + 6.2831851600897227) * z


@triton.jit
def product(a, b, onto, PRECISION: tl.constexpr):
    """onto + a b, summed in float32."""
    if INTERPRETED:
        # whose dot takes bfloat16 for integers; in float32 the products of the same values are the same
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, onto, input_precision=PRECISION)


@triton.jit
def part_of_set(offsets_ptr, lengths_ptr, set_id, split, T, SPLITS, BLOCK_N: tl.constexpr):
    """A program's rows, begin to end within the set; the set's first row, and how many of its rows take part.

    Clamped to the tensor whatever the offsets say, as their values cannot be checked without waiting.
    """
    first = tl.minimum(tl.maximum(tl.load(offsets_ptr + set_id), 0), T)
    owned = tl.maximum(tl.minimum(tl.load(offsets_ptr + set_id + 1), T) - first, 0)
    count = tl.minimum(tl.maximum(tl.load(lengths_ptr + set_id), 0), owned).to(tl.int32)
    owned = owned.to(tl.int32)
    part = tl.cdiv(tl.cdiv(owned, SPLITS), BLOCK_N) * BLOCK_N
    begin = tl.minimum(split * part, owned)
    return begin, tl.minimum(begin + part, owned), first, count


@triton.jit
def load_quality(quality_ptr, rows, inside):
    """Norms [n], 0 for a row that takes no part: NaN or inf would come back from it as 0 * NaN in sums over rows."""
    quality = tl.load(quality_ptr + rows, mask=inside, other=0.0)
    return tl.where((quality > 0) & (quality < float("inf")), quality, 0.0)


@triton.jit
def moments(quality, turns_ptr, C, eps, BLOCK_C: tl.constexpr):
    """Mean of a norm's sinusoid, reciprocal deviation, and the mean's derivative, [n] each.

    sin a + cos a = sqrt(2) cos(a - 1/8 turn), and sin^2 + cos^2 = 1, so the mean square is 1/2.
    """
    mean, slope = tl.zeros_like(quality), tl.zeros_like(quality)
    for begin in range(0, C // 2, BLOCK_C):
        pairs = begin + tl.arange(0, BLOCK_C)
        inside = pairs < C // 2
        turns = tl.load(turns_ptr + pairs, mask=inside, other=0.0)
        angle = quality[:, None] * turns[None, :] - 0.125
        mean += tl.sum(tl.where(inside[None, :], cosine(angle), 0.0), axis=1)
        slope += tl.sum(cosine(angle + 0.25) * turns[None, :], axis=1)  # turns are 0 past the end
    mean *= SQRT_2 / C
    return mean, 1 / tl.sqrt_rn(0.5 + eps - mean * mean), slope * (SQRT_2 * TAU / C)


@triton.jit
def angles(quality, turns_ptr, cols, here):
    """Angle of each channel's cosine, [n, c], and its turns a unit of norm, [c]; sines are a quarter turn late."""
    turns = tl.load(turns_ptr + cols // 2, mask=here, other=0.0)
    return quality[:, None] * turns[None, :] + tl.where(cols % 2 == 0, -0.25, 0.0)[None, :], turns


@triton.jit
def load_block(pointer, head, cols, H, C):
    """A block [h, c] of a set's (H, C)."""
    mask = (head < H)[:, None] & (cols < C)[None, :]
    return tl.load(pointer + (head[:, None] * C + cols[None, :]), mask=mask, other=0.0)


@triton.jit
def accumulate(pointer, where, mask, started, scale, value):
    """Scale what a program has in memory, and add to it; where nothing is started, it is zero."""
    before = tl.load(pointer + where, mask=mask & started, other=0.0)
    tl.debug_barrier()  # who stores an element need not be all who loaded it
    tl.store(pointer + where, before * scale + value, mask=mask)
    tl.debug_barrier()  # the next to read it may be another thread


@triton.jit
def after_dropout(share, rows, head, set_id, seed, threshold, keep_scale, DROPOUT: tl.constexpr):
    """Attention weights [n, h] after dropout, dropped as `fcn_kernels.attention.torch_backend.keep_mask` says."""
    if DROPOUT:
        row = rows[:, None] + tl.zeros_like(head)[None, :]
        word = philox_word(seed, row, head[None, :] // 4, set_id.to(tl.int32), STREAM, head[None, :] % 4)
        share = tl.where(word >= threshold.to(tl.uint32), share * keep_scale, 0.0)
    return share


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward(
    queries_ptr, rows_ptr, quality_ptr, weight_ptr, turns_ptr, offsets_ptr, lengths_ptr, seed_ptr, seed_value: "i64",
    out_ptr, mass_ptr, normalizer_ptr, stride_row, T, C, H, SPLITS, threshold: "i64", keep_scale, eps,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [B, SPLITS, H, C], mass and log-normalisers [B, SPLITS, H], each of its part of the set alone."""
    program = tl.program_id(0).to(tl.int64)
    set_id, split = program // SPLITS, (program % SPLITS).to(tl.int32)
    head, lane = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    there = head < H
    dtype = rows_ptr.dtype.element_ty
    seed = seed_of(seed_ptr, seed_value)
    begin, end, first, count = part_of_set(offsets_ptr, lengths_ptr, set_id, split, T, SPLITS, BLOCK_N)
    quality_ptr += first
    queries_ptr += set_id * H * C
    out_ptr += program * H * C
    top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    mass = tl.zeros((BLOCK_H,), tl.float32)
    stop = tl.maximum(tl.minimum(end, count), begin + 1)  # a part with no rows still has zeros to write
    for at in range(begin, stop, BLOCK_N):
        rows = at + lane
        inside = rows < count
        tile_ptr = rows_ptr + (first + at) * stride_row
        quality = load_quality(quality_ptr, rows, inside)
        mean, rstd, _slope = moments(quality, turns_ptr, C, eps, BLOCK_C)
        score = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        size = tl.zeros((BLOCK_N,), tl.float32)
        for column in range(0, C, BLOCK_C):
            cols = column + tl.arange(0, BLOCK_C)
            here = cols < C
            tile = load_rows(tile_ptr, lane, inside, stride_row, cols, C).to(tl.float32)
            size += tl.sum(tl.abs(tile), axis=1)
            angle, _turns = angles(quality, turns_ptr, cols, here)
            weight = tl.load(weight_ptr + cols, mask=here, other=0.0)
            key = quality[:, None] * tile + (cosine(angle) - mean[:, None]) * rstd[:, None] * weight[None, :]
            query = load_block(queries_ptr, head, cols, H, C)
            score = product(key.to(dtype), tl.trans(query.to(dtype)), score, PRECISION)
        valid = (quality > 0) & (size > 0) & (size < float("inf"))
        score = tl.where(valid[:, None], score, float("-inf"))

        peak = tl.maximum(top, tl.max(score, axis=0))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        share = tl.exp(score - shift[None, :])
        before = total * tl.exp(top - shift)
        total = before + tl.sum(share, axis=0)
        positive = tl.where(total > 0, total, 1.0)  # 0 where no row has taken part yet
        shrink = before / positive
        share = share / positive[None, :]
        share = after_dropout(share, rows, head, set_id, seed, threshold, keep_scale, DROPOUT)
        mass = mass * shrink + tl.sum(share, axis=0)
        top = peak

        pull = tl.trans(tl.where(valid[:, None], share * quality[:, None], 0.0)).to(dtype)  # [h, n]
        for column in range(0, C, BLOCK_C):
            cols = column + tl.arange(0, BLOCK_C)
            tile = load_rows(tile_ptr, lane, inside & valid, stride_row, cols, C)
            gathered = product(pull, tile, None, PRECISION)
            where = head[:, None] * C + cols[None, :]
            mask = there[:, None] & (cols < C)[None, :]
            accumulate(out_ptr, where, mask, at > begin, shrink[:, None], gathered)
    tl.store(mass_ptr + program * H + head, mass, mask=there)
    tl.store(normalizer_ptr + program * H + head, top + tl.log(tl.where(total > 0, total, 1.0)), mask=there)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward(
    queries_ptr, rows_ptr, quality_ptr, weight_ptr, turns_ptr, offsets_ptr, lengths_ptr, seed_ptr, seed_value: "i64",
    normalizer_ptr, grad_ptr, grad_mass_ptr, mean_grad_ptr, dqueries_ptr, drows_ptr, dquality_ptr, dweight_ptr,
    stride_row, T, C, H, SPLITS, threshold: "i64", keep_scale, eps,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of rows [T, C] and norms [T]; of queries [B, SPLITS, H, C] and weight [B, SPLITS, C], a part each."""
    program = tl.program_id(0).to(tl.int64)
    set_id, split = program // SPLITS, (program % SPLITS).to(tl.int32)
    head, lane = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    there = head < H
    dtype = rows_ptr.dtype.element_ty
    seed = seed_of(seed_ptr, seed_value)
    begin, end, first, count = part_of_set(offsets_ptr, lengths_ptr, set_id, split, T, SPLITS, BLOCK_N)
    quality_ptr += first
    queries_ptr += set_id * H * C
    grad_ptr += set_id * H * C
    dquality_ptr += first
    dqueries_ptr += program * H * C
    dweight_ptr += program * C
    of_set = set_id * H + head
    normalizer = tl.load(normalizer_ptr + of_set, mask=there, other=0.0)
    grad_mass = tl.load(grad_mass_ptr + of_set, mask=there, other=0.0)
    mean_grad = tl.load(mean_grad_ptr + of_set, mask=there, other=0.0)
    stop = tl.maximum(end, begin + 1)  # a part with no rows still has zeros to write
    for at in range(begin, stop, BLOCK_N):
        rows = at + lane
        inside = rows < count
        tile_ptr = rows_ptr + (first + at) * stride_row
        quality = load_quality(quality_ptr, rows, inside)
        mean, rstd, slope = moments(quality, turns_ptr, C, eps, BLOCK_C)
        score = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        reach = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        size = tl.zeros((BLOCK_N,), tl.float32)
        for column in range(0, C, BLOCK_C):
            cols = column + tl.arange(0, BLOCK_C)
            here = cols < C
            tile = load_rows(tile_ptr, lane, inside, stride_row, cols, C)
            size += tl.sum(tl.abs(tile.to(tl.float32)), axis=1)
            angle, _turns = angles(quality, turns_ptr, cols, here)
            weight = tl.load(weight_ptr + cols, mask=here, other=0.0)
            unit = (cosine(angle) - mean[:, None]) * rstd[:, None]
            key = quality[:, None] * tile.to(tl.float32) + unit * weight[None, :]
            query = load_block(queries_ptr, head, cols, H, C)
            grad = load_block(grad_ptr, head, cols, H, C)
            score = product(key.to(dtype), tl.trans(query.to(dtype)), score, PRECISION)
            reach = product(tile, tl.trans(grad.to(dtype)), reach, PRECISION)
        valid = (quality > 0) & (size > 0) & (size < float("inf"))
        open_to = valid[:, None] & there[None, :]
        share = tl.exp(tl.where(open_to, score - normalizer[None, :], float("-inf")))
        kept = after_dropout(share, rows, head, set_id, seed, threshold, keep_scale, DROPOUT)
        reach = reach * quality[:, None] + grad_mass[None, :]
        dscore = tl.where(open_to, kept * reach - share * mean_grad[None, :], 0.0).to(dtype)
        kept = kept.to(dtype)

        norm = tl.where(valid, quality, 0.0)
        dquality = tl.zeros((BLOCK_N,), tl.float32)
        for column in range(0, C, BLOCK_C):
            cols = column + tl.arange(0, BLOCK_C)
            here = cols < C
            tile = load_rows(tile_ptr, lane, inside & valid, stride_row, cols, C).to(tl.float32)
            angle, turns = angles(norm, turns_ptr, cols, here)
            weight = tl.load(weight_ptr + cols, mask=here, other=0.0)
            unit = (cosine(angle) - mean[:, None]) * rstd[:, None]
            key = norm[:, None] * tile + unit * weight[None, :]
            query = load_block(queries_ptr, head, cols, H, C)
            grad = load_block(grad_ptr, head, cols, H, C)
            dkey = product(dscore, query.to(dtype), None, PRECISION)  # [n, c]
            drow = product(kept, grad.to(dtype), dkey, PRECISION)  # of x = q f
            # to the norm: of x = q f, and through the standardised sinusoid
            wave_slope = cosine(angle + 0.25) * (turns * TAU)[None, :]
            unit_slope = rstd[:, None] * (wave_slope + (slope * rstd * mean)[:, None] * unit - slope[:, None])
            dquality += tl.sum(drow * tile + dkey * weight[None, :] * unit_slope, axis=1)
            where = lane[:, None] * C + cols[None, :]
            mask = (rows < end)[:, None] & here[None, :]
            tl.store(drows_ptr + (first + at) * C + where, (drow * norm[:, None]).to(dtype), mask=mask)
            # sums over the rows
            dweight = tl.sum(tl.where(valid[:, None], dkey * unit, 0.0), axis=0)
            accumulate(dweight_ptr, cols, here, at > begin, 1.0, dweight)
            dquery = product(tl.trans(dscore), key.to(dtype), None, PRECISION)  # [h, c]
            where = head[:, None] * C + cols[None, :]
            mask = there[:, None] & here[None, :]
            accumulate(dqueries_ptr, where, mask, at > begin, 1.0, dquery)
        tl.store(dquality_ptr + rows, tl.where(valid, dquality, 0.0), mask=rows < end)
