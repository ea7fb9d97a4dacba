# mypy: ignore-errors
"""Chunks' tokens: what a row's norm and style, and the centers, bring to the first block.

A chunk's tokens are its rows, as many as its length says, then the M centers, then padding. Shapes in comments: n
tokens of a tile, c columns.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fcn_kernels.clustering.kernels.pieces import bounds, find_piece
from fcn_kernels.clustering.kernels.sums import INFINITY_BITS, magnitude_bits
from fcn_kernels.device.rows import load_rows

EDGES = tl.constexpr(60)
EPS = tl.constexpr(1e-5)  # `EPS_NORM` of fcn_kernels.clustering.problem
# The squares of norms outside leave float32's range, or lose what they should hold.
LEAST_NORM, MOST_NORM = tl.constexpr(1e-15), tl.constexpr(1e15)
LEAST_FLOAT = tl.constexpr(1.1754943508222875e-38)  # the smallest normal number


class Given(NamedTuple):
    """What a call has for its rows, from the first of all, and for its tokens; pointers are None for what it lacks."""

    features: Any  # [T, C] by stride; None: given the norms, of rows of which `valid` names those that take part
    quality: Any  # [T] float32
    styles: Any  # [T, STYLE] float32
    valid: Any  # [T] bool
    table: Any  # [CODES, D - STYLE] float32
    edges: Any  # [EDGES] float32
    centers: Any  # [M, D] float32
    stride: Any
    C: Any
    D: Any
    STYLE: Any
    M: Any
    look: Any  # whether to look at the features; None: yes


class Made(NamedTuple):
    """What becomes of that: tokens, of all chunks, and what is kept of rows."""

    hidden: Any  # [tokens, D]
    attending: Any  # [tokens] bool
    chunk: Any  # [tokens] int32
    norms: Any  # [T]
    scale: Any  # [T]
    usable: Any  # [T] bool
    code: Any  # [T] int32, -1 for rows that take no part
    place: Any  # [T] int64


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


@triton.jit
def usable_rows(g, first, lane, taking, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Norms [n] of a chunk's rows, and which of those `taking` have all that they need, and finite."""
    usable = taking
    if g.features is not None:
        looking = taking
        if g.look is not None:
            looking = looking & g.look
        norm, largest = norms_of(g.features + first * g.stride, lane, looking, g.stride, g.C, BLOCK_N, BLOCK_C)
        usable = usable & (largest < INFINITY_BITS)
    if g.quality is not None:
        norm = tl.load(g.quality + first + lane, mask=taking, other=0.0)
    usable = usable & (norm >= 0) & (norm < float("inf"))
    if g.valid is not None:
        usable = usable & (tl.load(g.valid + first + lane, mask=taking, other=0) != 0)
    if g.styles is not None:
        largest = tl.zeros((BLOCK_N,), tl.int32)
        for column in range(0, g.STYLE, BLOCK_C):
            cols = column + tl.arange(0, BLOCK_C)
            styles = load_rows(g.styles + first * g.STYLE, lane, taking, g.STYLE, cols, g.STYLE)  # [n, c]
            largest = tl.maximum(largest, magnitude_bits(styles))
        usable = usable & (largest < INFINITY_BITS)
    return tl.where(usable, norm, 0.0), usable


@triton.jit
def embed_tile(g, m, p, first, owned, count, at, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Tokens [at, at + BLOCK_N) of a chunk: rows [0, count), centers, and padding; and what is kept of rows [0, owned),
    from row `first` of all."""
    lane = at + tl.arange(0, BLOCK_N)
    inside, is_row = lane < p.end, lane < owned
    center = lane - count
    is_center = inside & (center >= 0) & (center < g.M)
    norm, usable = usable_rows(g, first, lane, lane < count, BLOCK_N, BLOCK_C)
    code = codes_of(norm, g.edges)
    scale = 1 / (norm + EPS)
    if g.quality is not None:
        scale *= norm

    # -- of rows --
    token = p.first + lane
    tl.store(m.norms + first + lane, norm, mask=is_row)
    tl.store(m.scale + first + lane, scale, mask=is_row)
    tl.store(m.code + first + lane, tl.where(usable, code, -1), mask=is_row)
    tl.store(m.usable + first + lane, usable, mask=is_row)
    tl.store(m.place + first + lane, token, mask=is_row)

    # -- of tokens --
    tl.store(m.attending + token, usable | is_center, mask=inside)
    tl.store(m.chunk + token, tl.zeros_like(lane) + p.set_id, mask=inside)
    for column in range(0, g.D, BLOCK_C):
        cols = column + tl.arange(0, BLOCK_C)
        behind = (cols >= g.STYLE) & (cols < g.D)
        where = code[:, None] * (g.D - g.STYLE) + (cols - g.STYLE)[None, :]
        hidden = tl.load(g.table + where, mask=usable[:, None] & behind[None, :], other=0.0)  # [n, c]
        if g.styles is not None:
            hidden += load_rows(g.styles + first * g.STYLE, lane, usable, g.STYLE, cols, g.STYLE)
        hidden += load_rows(g.centers, center, is_center, g.D, cols, g.D)
        where = lane.to(tl.int64)[:, None] * g.D + cols[None, :]
        tl.store(m.hidden + p.first * g.D + where, hidden, mask=inside[:, None] & (cols < g.D)[None, :])


@triton.jit(do_not_specialize=["T", "tokens", "chunks", "fewest"])
def embed(
    features_ptr, quality_ptr, styles_ptr, valid_ptr, table_ptr, edges_ptr, centers_ptr, offsets_ptr, lengths_ptr,
    starts_ptr, sizes_ptr, hidden_ptr, attending_ptr, chunk_ptr, norms_ptr, scale_ptr, usable_ptr, code_ptr, place_ptr,
    working_ptr, stride, T, tokens, C, D, STYLE, M, chunks, fewest, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tokens [tokens, D], whether they take part, and their chunk; norms, scales, codes and tokens [T] of the rows, and
    whether these are usable; of chunks with at least `fewest` tokens, which working [tokens], if any, then names. A
    program has BLOCK_N tokens of a chunk."""
    p = find_piece(starts_ptr, sizes_ptr, tl.program_id(0).to(tl.int64), chunks, tokens, BLOCK_N)
    if (p.begin >= p.end) | (p.count < fewest):
        return
    given = Given(
        features_ptr, quality_ptr, styles_ptr, valid_ptr, table_ptr, edges_ptr, centers_ptr, stride, C, D, STYLE, M,
        None,
    )  # fmt: skip
    made = Made(hidden_ptr, attending_ptr, chunk_ptr, norms_ptr, scale_ptr, usable_ptr, code_ptr, place_ptr)
    first, owned, count = bounds(offsets_ptr, lengths_ptr, p.set_id, T)
    embed_tile(given, made, p, first, owned, count, p.begin, BLOCK_N, BLOCK_C)
    if working_ptr is not None:
        lane = p.begin + tl.arange(0, BLOCK_N)
        tl.store(working_ptr + p.first + lane, lane < p.count, mask=lane < p.end)
