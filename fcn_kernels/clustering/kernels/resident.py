# mypy: ignore-errors
"""A small chunk in one program, from rows to sums: what the launches do to all tokens, step by step to its own.

A chunk's hidden states, queries, keys and values stand in memory, in L1 while the program runs, and change hands at
barriers. Weights come from L2.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fcn_kernels.clustering.kernels.attention import attend_tile, head_of
from fcn_kernels.clustering.kernels.layers import GELU, LINEAR, Layer, linear_tile, normalize_tile
from fcn_kernels.clustering.kernels.pieces import Piece, bounds
from fcn_kernels.clustering.kernels.sums import INFINITY_BITS, Centers, Rows, share_piece
from fcn_kernels.clustering.kernels.tokens import Given, Made, embed_tile


class Constants(NamedTuple):
    """Sizes of a tile: tokens, outputs and inputs of a layer, and D and a head's width up to a power of two; how it
    multiplies, as in `Product`."""

    BLOCK_N: tl.constexpr
    BLOCK_F: tl.constexpr
    BLOCK_K: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_H: tl.constexpr
    OPERAND: tl.constexpr
    PRECISION: tl.constexpr


class Weights(NamedTuple):
    """Of all blocks, as in `fcn_kernels.clustering.problem.Chunks`."""

    qkv: Any
    qkv_bias: Any
    proj: Any
    proj_bias: Any
    fc1: Any
    fc1_bias: Any
    fc2: Any
    fc2_bias: Any


class Room(NamedTuple):
    """For what a block makes of all tokens."""

    unit: Any  # [tokens, D]
    qkv: Any  # [tokens, 3 D]
    attended: Any  # [tokens, D]
    middle: Any  # [tokens, D]
    active: Any  # [tokens, 4 D]


@triton.jit
def normalize(x_ptr, out_ptr, rstd_ptr, size, D, BUILD: tl.constexpr):
    """LayerNorm of a chunk's tokens, without weight and bias."""
    for at in range(0, size, BUILD.BLOCK_N):
        rows = at + tl.arange(0, BUILD.BLOCK_N)
        normalize_tile(x_ptr, out_ptr, rstd_ptr, rows, rows < size, D, BUILD.BLOCK_D)
    tl.debug_barrier()


@triton.jit
def apply(layer, x_ptr, out_ptr, wide_ptr, residual_ptr, factor_ptr, size, AFTER: tl.constexpr, BUILD: tl.constexpr):
    """A layer on a chunk's tokens, as `linear` has it."""
    factor = None
    if factor_ptr is not None:
        factor = tl.zeros((BUILD.BLOCK_N,), tl.float32) + tl.load(factor_ptr)
    for at in range(0, size, BUILD.BLOCK_N):
        rows = at + tl.arange(0, BUILD.BLOCK_N)
        for begin in range(0, layer.F, BUILD.BLOCK_F):
            linear_tile(
                layer, x_ptr, out_ptr, wide_ptr, residual_ptr, factor, rows, rows < size, begin,
                AFTER, BUILD.BLOCK_N, BUILD.BLOCK_F, BUILD.BLOCK_K, BUILD,
            )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def layer_of(weight, bias, block, F, K):
    """A block's layer, of weights [L, F, K] and biases [L, F]."""
    return Layer(weight + block * F * K, bias + block * F, K, F, K, 1)


@triton.jit
def attend_all(p, r, attending_ptr, lse_ptr, tokens, D, width, BUILD: tl.constexpr):
    """What a chunk's tokens gather; log-sum-exps [heads, tokens], if there is room for them."""
    for head in range(0, D // width):
        h = head_of(p, r.qkv, attending_ptr, D, width, head)
        of_head = None
        if lse_ptr is not None:
            of_head = lse_ptr + tl.cast(head, tl.int64) * tokens
        for at in range(0, p.count, BUILD.BLOCK_N):
            attend_tile(h, at, r.attended, of_head, BUILD.BLOCK_N, BUILD.BLOCK_H, BUILD)
    tl.debug_barrier()


@triton.jit
def run_block(
    p, w, r, attending_ptr, hidden_ptr, out_ptr, attention_ptr, mlp_ptr, block, D, width, BUILD: tl.constexpr
):
    """A chunk's tokens from hidden to out [size, D], which may be the same; with the chunk's factors, if any."""
    normalize(hidden_ptr, r.unit, None, p.count, D, BUILD)
    qkv, proj = layer_of(w.qkv, w.qkv_bias, block, 3 * D, D), layer_of(w.proj, w.proj_bias, block, D, D)
    fc1, fc2 = layer_of(w.fc1, w.fc1_bias, block, 4 * D, D), layer_of(w.fc2, w.fc2_bias, block, D, 4 * D)
    apply(qkv, r.unit, r.qkv, None, None, None, p.count, LINEAR, BUILD)
    attend_all(p, r, attending_ptr, None, 0, D, width, BUILD)
    apply(proj, r.attended, r.middle, None, hidden_ptr, attention_ptr, p.count, LINEAR, BUILD)
    normalize(r.middle, r.unit, None, p.count, D, BUILD)
    apply(fc1, r.unit, r.active, None, None, None, p.count, GELU, BUILD)
    apply(fc2, r.active, out_ptr, None, r.middle, mlp_ptr, p.count, LINEAR, BUILD)


class Out(NamedTuple):
    """Of a chunk, from its first row."""

    shares: Any  # [count, M]
    sums: Any  # [M, C]
    key_sums: Any  # [M, D]
    masses: Any  # [M]


class Blocks(NamedTuple):
    """All of them: what is kept after each, what each is multiplied by, and their sizes."""

    kept: Any  # [depth, tokens, D] from the chunk's first token, or None
    residual: Any  # factors [depth, 2, chunks], or None
    depth: Any
    chunks: Any
    tokens: Any  # of all chunks
    width: Any  # of a head


@triton.jit
def run_blocks(p, w, r, b, attending_ptr, hidden_ptr, D, BUILD: tl.constexpr):
    """A chunk's tokens through all blocks; where they stand after that."""
    for block in range(b.depth):
        out_ptr, attention_ptr, mlp_ptr = hidden_ptr, None, None
        if b.kept is not None:
            out_ptr = b.kept + tl.cast(block, tl.int64) * b.tokens * D
        if b.residual is not None:
            attention_ptr = b.residual + 2 * block * b.chunks + p.set_id
            mlp_ptr = attention_ptr + b.chunks
        run_block(p, w, r, attending_ptr, hidden_ptr, out_ptr, attention_ptr, mlp_ptr, block, D, b.width, BUILD)
        hidden_ptr = out_ptr
    return hidden_ptr


@triton.jit
def run_chunk(
    given, made, w, r, b, o, p, first, owned, count, keys_ptr, weight_ptr, bias_ptr, BUILD: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """A chunk from its rows to its sums. Returns the bits of their largest element."""
    D, size = given.D, p.count
    for at in range(0, p.end, BUILD.BLOCK_N):
        embed_tile(given, made, p, first, owned, count, at, BUILD.BLOCK_N, BUILD.BLOCK_K)
    tl.debug_barrier()
    inner = Piece(p.set_id, 0, 0, size, size, 0)  # of pointers that start at the chunk's first token
    hidden_ptr = run_blocks(inner, w, r, b, made.attending + p.first, made.hidden + p.first * D, D, BUILD)
    normalize(hidden_ptr, keys_ptr, None, size, D, BUILD)
    rows = Rows(
        given.features + first * given.stride, keys_ptr, made.scale + first, made.usable + first, given.stride, D,
        given.C, D, count,
    )  # fmt: skip
    centers = Centers(weight_ptr, bias_ptr, given.M, given.M, None, None, None)
    largest = share_piece(rows, centers, 0, count, o.shares, o.sums, o.key_sums, o.masses, SUMS)
    tl.debug_barrier()
    return largest


@triton.jit(do_not_specialize=["T", "tokens", "chunks", "depth", "most"])
def blocks_of_small_chunks(
    features_ptr, quality_ptr, styles_ptr, valid_ptr, table_ptr, edges_ptr, centers_ptr, offsets_ptr, lengths_ptr,
    starts_ptr, sizes_ptr, residual_ptr, qkv_weight_ptr, qkv_bias_ptr, proj_weight_ptr, proj_bias_ptr, fc1_weight_ptr,
    fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, weight_ptr, bias_ptr, hidden_ptr, attending_ptr, chunk_ptr, norms_ptr,
    scale_ptr, usable_ptr, code_ptr, place_ptr, sums_ptr, key_sums_ptr, masses_ptr, shares_ptr, kept_ptr, unit_ptr,
    qkv_ptr, attended_ptr, middle_ptr, active_ptr, keys_ptr,
    stride, T, tokens, C, D, STYLE, M, width, depth, chunks, most, BUILD: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Of chunks with at most `most` tokens: sums [P, M, C], key sums [P, M, D], masses [P, M] and shares [T, M], keys
    [tokens, D], and what `embed` makes of them.

    With room for them, kept [L, tokens, D] gets the hidden states after each block; else hidden [tokens, D] the last.
    Given the norms, rows are first taken for finite, and read for the sums alone: where one is not, these are not, and
    all is made again.
    """
    chunk = tl.program_id(0)
    first, owned, count = bounds(offsets_ptr, lengths_ptr, chunk, T)
    start, all_tokens, size = bounds(starts_ptr, sizes_ptr, chunk, tokens)
    if size > most:
        return
    made = Made(hidden_ptr, attending_ptr, chunk_ptr, norms_ptr, scale_ptr, usable_ptr, code_ptr, place_ptr)
    weights = Weights(
        qkv_weight_ptr, qkv_bias_ptr, proj_weight_ptr, proj_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr,
        fc2_bias_ptr,
    )  # fmt: skip
    room = Room(
        unit_ptr + start * D, qkv_ptr + start * 3 * D, attended_ptr + start * D, middle_ptr + start * D,
        active_ptr + start * 4 * D,
    )  # fmt: skip
    place = tl.cast(chunk, tl.int64) * M
    out = Out(shares_ptr + first * M, sums_ptr + place * C, key_sums_ptr + place * D, masses_ptr + place)
    if kept_ptr is not None:
        kept_ptr += start * D
    blocks = Blocks(kept_ptr, residual_ptr, depth, chunks, tokens, width)
    p = Piece(chunk, start, 0, all_tokens, size, 0)
    attempts: tl.constexpr = 1 if quality_ptr is None else 2
    largest = tl.full((), INFINITY_BITS, tl.int32)
    for attempt in range(0, attempts):
        if largest >= INFINITY_BITS:
            look = attempt >= attempts - 1
            given = Given(
                features_ptr, quality_ptr, styles_ptr, valid_ptr, table_ptr, edges_ptr, centers_ptr, stride, C, D,
                STYLE, M, look,
            )  # fmt: skip
            largest = run_chunk(
                given, made, weights, room, blocks, out, p, first, owned, count, keys_ptr + start * D, weight_ptr,
                bias_ptr, BUILD, SUMS,
            )  # fmt: skip
