# mypy: ignore-errors
"""The gradients of all blocks of a small chunk in one program: each block again from its input, and back.

As in ``resident.py``, what a step makes stands in memory, in L1 while the program runs. What the weights' gradients are
made of stays there for the launches that sum it over all chunks.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fcn_kernels.clustering.kernels.attention import Arriving, attend_keys_tile, attend_queries_tile, head_of
from fcn_kernels.clustering.kernels.layers import GELU, GELU_GRADIENT, LINEAR, Layer, normalize_backward_tile
from fcn_kernels.clustering.kernels.pieces import Piece, bounds
from fcn_kernels.clustering.kernels.resident import Room, Weights, apply, attend_all, layer_of, normalize


class Scrap(NamedTuple):
    """Room for what a block makes, and nothing needs after it."""

    qkv: Any  # [tokens, 3 D]
    lse: Any  # [heads, tokens]
    middle: Any  # [tokens, D]
    wide: Any  # [tokens, 4 D]
    rstd: Any  # [tokens]
    rstd2: Any
    back: Any  # [tokens, D], a gradient


class Taken(NamedTuple):
    """What the weights' gradients of blocks are made of; of one block, from a chunk's first token."""

    unit: Any  # [L, tokens, D], the first LayerNorm
    attended: Any  # [L, tokens, D]
    unit2: Any  # [L, tokens, D], the second
    active: Any  # [L, tokens, 4 D]
    dqkv: Any  # [L, tokens, 3 D], gradients
    dmiddle: Any  # [L, tokens, D]
    dwide: Any  # [L, tokens, 4 D]


@triton.jit
def normalize_backward(grad_ptr, unit_ptr, rstd_ptr, residual_ptr, out_ptr, size, D, BUILD: tl.constexpr):
    """The gradient of what a LayerNorm was given, of a chunk's tokens, plus the residual."""
    for at in range(0, size, BUILD.BLOCK_N):
        rows = at + tl.arange(0, BUILD.BLOCK_N)
        normalize_backward_tile(
            grad_ptr, unit_ptr, rstd_ptr, residual_ptr, out_ptr, rows, rows < size, D, BUILD.BLOCK_D
        )
    tl.debug_barrier()


@triton.jit
def attend_backward(p, s, t, attending_ptr, tokens, D, width, BUILD: tl.constexpr):
    """Gradients of queries, keys and values, from those of what tokens gathered."""
    for head in range(0, D // width):
        h = head_of(p, s.qkv, attending_ptr, D, width, head)
        a = Arriving(s.back, t.attended, s.lse + tl.cast(head, tl.int64) * tokens)
        for at in range(0, p.count, BUILD.BLOCK_N):
            attend_queries_tile(h, a, at, t.dqkv, BUILD.BLOCK_N, BUILD.BLOCK_H, BUILD)
            attend_keys_tile(h, a, at, t.dqkv, BUILD.BLOCK_N, BUILD.BLOCK_H, BUILD)
    tl.debug_barrier()


@triton.jit
def run_back(
    p, w, s, t, attending_ptr, hidden_ptr, grad_ptr, out_ptr, attention_ptr, mlp_ptr, block, tokens, D, width,
    BUILD: tl.constexpr,
):  # fmt: skip
    """out [size, D], the gradient of a block's input hidden, from grad, that of its output."""
    # -- the block again --
    r = Room(t.unit, s.qkv, t.attended, s.middle, t.active)
    qkv, proj = layer_of(w.qkv, w.qkv_bias, block, 3 * D, D), layer_of(w.proj, w.proj_bias, block, D, D)
    fc1 = layer_of(w.fc1, w.fc1_bias, block, 4 * D, D)
    normalize(hidden_ptr, t.unit, s.rstd, p.count, D, BUILD)
    apply(qkv, t.unit, s.qkv, None, None, None, p.count, LINEAR, BUILD)
    attend_all(p, r, attending_ptr, s.lse, tokens, D, width, BUILD)
    apply(proj, t.attended, s.middle, None, hidden_ptr, attention_ptr, p.count, LINEAR, BUILD)
    normalize(s.middle, t.unit2, s.rstd2, p.count, D, BUILD)
    apply(fc1, t.unit2, t.active, s.wide, None, None, p.count, GELU, BUILD)

    # -- back through the MLP, by layers that take gradients of outputs to those of inputs --
    fc2 = Layer(w.fc2 + block * 4 * D * D, None, D, 4 * D, 1, 4 * D)
    fc1 = Layer(w.fc1 + block * 4 * D * D, None, 4 * D, D, 1, D)
    apply(fc2, grad_ptr, t.dwide, s.wide, None, mlp_ptr, p.count, GELU_GRADIENT, BUILD)
    apply(fc1, t.dwide, s.back, None, None, None, p.count, LINEAR, BUILD)
    normalize_backward(s.back, t.unit2, s.rstd2, grad_ptr, t.dmiddle, p.count, D, BUILD)

    # -- and through attention --
    proj = Layer(w.proj + block * D * D, None, D, D, 1, D)
    qkv = Layer(w.qkv + block * 3 * D * D, None, 3 * D, D, 1, D)
    apply(proj, t.dmiddle, s.back, None, None, attention_ptr, p.count, LINEAR, BUILD)
    attend_backward(p, s, t, attending_ptr, tokens, D, width, BUILD)
    apply(qkv, t.dqkv, s.back, None, None, None, p.count, LINEAR, BUILD)
    normalize_backward(s.back, t.unit, s.rstd, t.dmiddle, out_ptr, p.count, D, BUILD)


@triton.jit(do_not_specialize=["tokens", "chunks", "depth", "most"])
def blocks_of_small_chunks_backward(
    starts_ptr, sizes_ptr, residual_ptr, qkv_weight_ptr, qkv_bias_ptr, proj_weight_ptr, proj_bias_ptr, fc1_weight_ptr,
    fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, attending_ptr, hidden_ptr, kept_ptr, grads_ptr, qkv_ptr, lse_ptr,
    middle_ptr, wide_ptr, rstd_ptr, rstd2_ptr, back_ptr, unit_ptr, attended_ptr, unit2_ptr, active_ptr, dqkv_ptr,
    dmiddle_ptr, dwide_ptr, tokens, D, width, depth, chunks, most, BUILD: tl.constexpr,
):  # fmt: skip
    """Of chunks with at most `most` tokens, grads [L + 1, tokens, D]: of each block's input, from that of the last
    one's output. Hidden [tokens, D] go into the first block, kept [L, tokens, D] come out of each."""
    chunk = tl.program_id(0)
    start, _all_tokens, size = bounds(starts_ptr, sizes_ptr, chunk, tokens)
    if size > most:
        return
    weights = Weights(
        qkv_weight_ptr, qkv_bias_ptr, proj_weight_ptr, proj_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr,
        fc2_bias_ptr,
    )  # fmt: skip
    scrap = Scrap(
        qkv_ptr + start * 3 * D, lse_ptr + start, middle_ptr + start * D, wide_ptr + start * 4 * D, rstd_ptr + start,
        rstd2_ptr + start, back_ptr + start * D,
    )  # fmt: skip
    p = Piece(chunk, 0, 0, size, size, 0)  # of pointers that start at the chunk's first token
    for step in range(depth):
        block = depth - 1 - step
        at = tl.cast(block, tl.int64) * tokens + start
        taken = Taken(
            unit_ptr + at * D, attended_ptr + at * D, unit2_ptr + at * D, active_ptr + at * 4 * D,
            dqkv_ptr + at * 3 * D, dmiddle_ptr + at * D, dwide_ptr + at * 4 * D,
        )  # fmt: skip
        input_ptr, attention_ptr, mlp_ptr = hidden_ptr + start * D, None, None
        if block > 0:
            input_ptr = kept_ptr + (at - tokens) * D
        if residual_ptr is not None:
            attention_ptr = residual_ptr + 2 * block * chunks + chunk
            mlp_ptr = attention_ptr + chunks
        grad_ptr = grads_ptr + (at + tokens) * D
        run_back(
            p, weights, scrap, taken, attending_ptr + start, input_ptr, grad_ptr, grads_ptr + at * D, attention_ptr,
            mlp_ptr, block, tokens, D, width, BUILD,
        )  # fmt: skip
