# mypy: ignore-errors
"""All blocks of a small chunk in one program: what the launches of a block do to all tokens, step by step to its own.

A chunk's hidden states, queries, keys and values stand in memory, in L1 while the program runs, and change hands at
barriers. Weights come from L2.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fcn_kernels.clustering.kernels.attention import attend_tile, head_of
from fcn_kernels.clustering.kernels.layers import GELU, LINEAR, Layer, linear_tile, normalize_tile
from fcn_kernels.clustering.kernels.pieces import Piece, bounds
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
def normalize(x_ptr, out_ptr, size, D, BUILD: tl.constexpr):
    """LayerNorm of a chunk's tokens, without weight and bias."""
    for at in range(0, size, BUILD.BLOCK_N):
        rows = at + tl.arange(0, BUILD.BLOCK_N)
        normalize_tile(x_ptr, out_ptr, None, rows, rows < size, D, BUILD.BLOCK_D)
    tl.debug_barrier()


@triton.jit
def apply(weight, bias, K, F, block, x_ptr, out_ptr, residual_ptr, factor_ptr, size, AFTER: tl.constexpr,
          BUILD: tl.constexpr):  # fmt: skip
    """A block's layer, of weights [L, F, K] and biases [L, F], on a chunk's tokens."""
    layer = Layer(weight + block * F * K, bias + block * F, K, F, K, 1)
    factor = None
    if factor_ptr is not None:
        factor = tl.zeros((BUILD.BLOCK_N,), tl.float32) + tl.load(factor_ptr)
    for at in range(0, size, BUILD.BLOCK_N):
        rows = at + tl.arange(0, BUILD.BLOCK_N)
        for begin in range(0, F, BUILD.BLOCK_F):
            linear_tile(
                layer, x_ptr, out_ptr, None, residual_ptr, factor, rows, rows < size, begin,
                AFTER, BUILD.BLOCK_N, BUILD.BLOCK_F, BUILD.BLOCK_K, BUILD,
            )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def run_block(
    p, w, r, attending_ptr, hidden_ptr, out_ptr, attention_ptr, mlp_ptr, block, D, width, BUILD: tl.constexpr
):
    """A chunk's tokens from hidden to out [size, D], which may be the same; with the chunk's factors, if any."""
    normalize(hidden_ptr, r.unit, p.count, D, BUILD)
    apply(w.qkv, w.qkv_bias, D, 3 * D, block, r.unit, r.qkv, None, None, p.count, LINEAR, BUILD)
    for head in range(0, D // width):
        chunk = Piece(p.set_id, 0, 0, p.count, p.count, 0)  # `r` starts at the chunk's first token
        h = head_of(chunk, r.qkv, attending_ptr, D, width, head)
        for at in range(0, p.count, BUILD.BLOCK_N):
            attend_tile(h, at, r.attended, None, BUILD.BLOCK_N, BUILD.BLOCK_H, BUILD)
    tl.debug_barrier()
    apply(w.proj, w.proj_bias, D, D, block, r.attended, r.middle, hidden_ptr, attention_ptr, p.count, LINEAR, BUILD)
    normalize(r.middle, r.unit, p.count, D, BUILD)
    apply(w.fc1, w.fc1_bias, D, 4 * D, block, r.unit, r.active, None, None, p.count, GELU, BUILD)
    apply(w.fc2, w.fc2_bias, 4 * D, D, block, r.active, out_ptr, r.middle, mlp_ptr, p.count, LINEAR, BUILD)


@triton.jit(do_not_specialize=["T", "tokens", "chunks", "depth", "most"])
def blocks_of_small_chunks(
    features_ptr, quality_ptr, styles_ptr, valid_ptr, table_ptr, edges_ptr, centers_ptr, offsets_ptr, lengths_ptr,
    starts_ptr, sizes_ptr, residual_ptr, qkv_weight_ptr, qkv_bias_ptr, proj_weight_ptr, proj_bias_ptr, fc1_weight_ptr,
    fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, hidden_ptr, attending_ptr, chunk_ptr, norms_ptr, scale_ptr, usable_ptr,
    code_ptr, place_ptr, kept_ptr, unit_ptr, qkv_ptr, attended_ptr, middle_ptr, active_ptr, keys_ptr,
    stride, T, tokens, C, D, STYLE, M, width, depth, chunks, most, BUILD: tl.constexpr,
):  # fmt: skip
    """Keys [tokens, D] of the chunks with at most `most` tokens, and what `embed` makes of these.

    With room for them, kept [L, tokens, D] gets the hidden states after each block; else hidden [tokens, D] the last.
    """
    chunk = tl.program_id(0)
    first, owned, count = bounds(offsets_ptr, lengths_ptr, chunk, T)
    start, all_tokens, size = bounds(starts_ptr, sizes_ptr, chunk, tokens)
    if size > most:
        return
    given = Given(
        features_ptr, quality_ptr, styles_ptr, valid_ptr, table_ptr, edges_ptr, centers_ptr, stride, C, D, STYLE, M
    )
    made = Made(hidden_ptr, attending_ptr, chunk_ptr, norms_ptr, scale_ptr, usable_ptr, code_ptr, place_ptr)
    weights = Weights(
        qkv_weight_ptr, qkv_bias_ptr, proj_weight_ptr, proj_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr,
        fc2_bias_ptr,
    )  # fmt: skip
    p = Piece(chunk, start, 0, all_tokens, size, 0)
    for at in range(0, all_tokens, BUILD.BLOCK_N):
        embed_tile(given, made, p, first, owned, count, at, BUILD.BLOCK_N, BUILD.BLOCK_K)
    tl.debug_barrier()
    room = Room(
        unit_ptr + start * D, qkv_ptr + start * 3 * D, attended_ptr + start * D, middle_ptr + start * D,
        active_ptr + start * 4 * D,
    )  # fmt: skip
    attending_ptr += start
    hidden_ptr += start * D
    for block in range(depth):
        out_ptr, attention_ptr, mlp_ptr = hidden_ptr, None, None
        if kept_ptr is not None:
            out_ptr = kept_ptr + (tl.cast(block, tl.int64) * tokens + start) * D
        if residual_ptr is not None:
            attention_ptr = residual_ptr + 2 * block * chunks + chunk
            mlp_ptr = attention_ptr + chunks
        run_block(p, weights, room, attending_ptr, hidden_ptr, out_ptr, attention_ptr, mlp_ptr, block, D, width, BUILD)
        hidden_ptr = out_ptr
    normalize(hidden_ptr, keys_ptr + start * D, size, D, BUILD)
