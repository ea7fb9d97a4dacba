# mypy: ignore-errors
"""Chunks' tokens: what a row's norm and style, and the centers, bring to the first block.

A chunk's tokens are the rows that it owns, then the M centers. Shapes in comments: n tokens of a tile, c columns.
"""

import triton
import triton.language as tl

from fcn_kernels.clustering.kernels.pieces import bounds, find_piece
from fcn_kernels.clustering.kernels.sums import EPS, INFINITY_BITS, magnitude_bits
from fcn_kernels.device.rows import load_rows

EDGES = tl.constexpr(60)
# The squares of norms outside leave float32's range, or lose what they should hold.
LEAST_NORM, MOST_NORM = tl.constexpr(1e-15), tl.constexpr(1e15)
LEAST_FLOAT = tl.constexpr(1.1754943508222875e-38)  # the smallest normal number


@triton.jit
def norms_of(pointer, lane, inside, stride, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Norms [n], as hypot has them, infinite or NaN for a row with such an element; bits of the largest element [n]."""
    total, largest = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.int32)
    for column in range(0, C, BLOCK_C):
        rows = load_rows(pointer, lane, inside, stride, column + tl.arange(0, BLOCK_C), C).to(tl.float32)  # [n, c]
        total += tl.sum(rows * rows, axis=1)
        largest = tl.maximum(largest, magnitude_bits(rows))
    norm = tl.sqrt_rn(total)
    extreme = (largest > 0) & (largest < INFINITY_BITS) & ((norm < LEAST_NORM) | (norm > MOST_NORM))
    if tl.max(extreme.to(tl.int32), axis=0) > 0:
        unit = tl.maximum(tl.where(extreme, largest.to(tl.float32, bitcast=True), 1.0), LEAST_FLOAT)
        total = tl.zeros((BLOCK_N,), tl.float32)
        for column in range(0, C, BLOCK_C):
            rows = load_rows(pointer, lane, inside, stride, column + tl.arange(0, BLOCK_C), C).to(tl.float32)
            part = rows / unit[:, None]
            total += tl.sum(part * part, axis=1)
        norm = tl.where(extreme, unit * tl.sqrt_rn(total), norm)
    return norm, largest


@triton.jit
def codes_of(norm, edges_ptr):
    """The number of edges <= norm [n]."""
    edge = tl.arange(0, 64)
    edges = tl.load(edges_ptr + edge, mask=edge < EDGES, other=float("inf"))
    return tl.sum((edges[None, :] <= norm[:, None]).to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["T", "tokens", "chunks"])
def embed(
    features_ptr, quality_ptr, styles_ptr, valid_ptr, table_ptr, edges_ptr, centers_ptr, offsets_ptr, lengths_ptr,
    starts_ptr, sizes_ptr, hidden_ptr, attending_ptr, chunk_ptr, norms_ptr, scale_ptr, usable_ptr, code_ptr, place_ptr,
    stride, T, tokens, C, D, STYLE, M, chunks, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tokens [tokens, D], whether they take part, and their chunk; norms, scales, codes and tokens [T] of the rows, and
    whether these are usable. A program has BLOCK_N tokens of a chunk."""
    p = find_piece(starts_ptr, sizes_ptr, tl.program_id(0).to(tl.int64), chunks, tokens, BLOCK_N)
    if p.begin >= p.end:
        return
    first, owned, count = bounds(offsets_ptr, lengths_ptr, p.set_id, T)
    lane = p.begin + tl.arange(0, BLOCK_N)
    inside, is_row, taking = lane < p.end, lane < owned, lane < count
    center = lane - owned
    is_center = inside & (center >= 0) & (center < M)

    # -- norms, and the rows that take part --
    norm, largest = norms_of(features_ptr + first * stride, lane, taking, stride, C, BLOCK_N, BLOCK_C)
    usable = taking
    if quality_ptr is not None:
        norm = tl.load(quality_ptr + first + lane, mask=taking, other=0.0)
        usable = usable & (largest < INFINITY_BITS)
    usable = usable & (norm >= 0) & (norm < float("inf"))
    if valid_ptr is not None:
        usable = usable & (tl.load(valid_ptr + first + lane, mask=taking, other=0) != 0)
    if styles_ptr is not None:
        styles_ptr += first * STYLE
        largest = tl.zeros((BLOCK_N,), tl.int32)
        for column in range(0, STYLE, BLOCK_C):
            cols = column + tl.arange(0, BLOCK_C)
            largest = tl.maximum(largest, magnitude_bits(load_rows(styles_ptr, lane, taking, STYLE, cols, STYLE)))
        usable = usable & (largest < INFINITY_BITS)
    norm = tl.where(usable, norm, 0.0)
    code = codes_of(norm, edges_ptr)
    scale = 1 / (norm + EPS)
    if quality_ptr is not None:
        scale *= norm

    # -- of rows --
    token = p.first + lane
    tl.store(norms_ptr + first + lane, norm, mask=is_row)
    tl.store(scale_ptr + first + lane, scale, mask=is_row)
    tl.store(code_ptr + first + lane, code, mask=is_row)
    tl.store(usable_ptr + first + lane, usable, mask=is_row)
    tl.store(place_ptr + first + lane, token, mask=is_row)

    # -- of tokens --
    tl.store(attending_ptr + token, usable | is_center, mask=inside)
    tl.store(chunk_ptr + token, tl.zeros_like(lane) + p.set_id, mask=inside)
    hidden_ptr += p.first * D
    for column in range(0, D, BLOCK_C):
        cols = column + tl.arange(0, BLOCK_C)
        behind = (cols >= STYLE) & (cols < D)
        where = code[:, None] * (D - STYLE) + (cols - STYLE)[None, :]
        hidden = tl.load(table_ptr + where, mask=usable[:, None] & behind[None, :], other=0.0)  # [n, c]
        if styles_ptr is not None:
            hidden += load_rows(styles_ptr, lane, usable, STYLE, cols, STYLE)
        hidden += load_rows(centers_ptr, center, is_center, D, cols, D)
        where = lane.to(tl.int64)[:, None] * D + cols[None, :]
        tl.store(hidden_ptr + where, hidden, mask=inside[:, None] & (cols < D)[None, :])
