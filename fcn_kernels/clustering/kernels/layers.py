# mypy: ignore-errors
"""What a block does to each token by itself: LayerNorm, linear layers, and their gradients.

Tokens of all chunks lie flat, and a tile may have those of several: what becomes of a token does not depend on its
place. Shapes in comments: n tokens, k inputs, f outputs of a layer.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fcn_kernels.clustering.kernels.products import dot
from fcn_kernels.device.rows import load_rows

EPS = tl.constexpr(1e-5)  # `EPS_LAYER_NORM` of fcn_kernels.clustering.problem
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))  # of a normal variable at 0
UNSPECIALIZED = ["N"]
# What a layer does to its product.
LINEAR, GELU, GELU_GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Layer(NamedTuple):
    """A linear layer."""

    weight: Any  # [F, K] by strides
    bias: Any  # [F], or None
    K: Any
    F: Any
    stride_f: Any
    stride_k: Any


@triton.jit
def gelu(x):
    """x Phi(x)"""
    return 0.5 * x * (1 + tl.erf(x * SQRT_HALF))


@triton.jit
def gelu_slope(x):
    """Phi(x) + x phi(x)"""
    return 0.5 * (1 + tl.erf(x * SQRT_HALF)) + x * DENSITY * tl.exp(-0.5 * x * x)


@triton.jit
def load_factor(factor_ptr, chunk_ptr, rows, inside):
    """The factor [n] of each token's chunk."""
    return tl.load(factor_ptr + tl.load(chunk_ptr + rows, mask=inside, other=0), mask=inside, other=0.0)


@triton.jit
def at_work(working_ptr, rows, N):
    """Which of tokens [n] a launch is for: those below N, and if there is working [N] bool, those that it names."""
    inside = rows < N
    if working_ptr is not None:
        inside = inside & (tl.load(working_ptr + rows, mask=inside, other=0) != 0)
    return inside


@triton.jit
def normalize_tile(x_ptr, out_ptr, rstd_ptr, rows, inside, D, BLOCK_D: tl.constexpr):
    """out = (x - mean) rstd of rows [n] of (.., D), without weight and bias; rstd, if there is room for it."""
    cols = tl.arange(0, BLOCK_D)
    x = load_rows(x_ptr, rows, inside, D, cols, D)  # [n, d]
    centered = tl.where((cols < D)[None, :], x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(centered * centered, axis=1) / D + EPS)
    mask = inside[:, None] & (cols < D)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * D + cols[None, :], centered * rstd[:, None], mask=mask)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def layer_norm(x_ptr, working_ptr, out_ptr, rstd_ptr, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """out [N, D] and rstd [N], of x [N, D], for the tokens at work."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    normalize_tile(x_ptr, out_ptr, rstd_ptr, rows, at_work(working_ptr, rows, N), D, BLOCK_D)


@triton.jit
def normalize_backward_tile(
    grad_ptr, unit_ptr, rstd_ptr, residual_ptr, out_ptr, rows, inside, D, BLOCK_D: tl.constexpr
):  # fmt: skip
    """out = the gradient of x, of rows [n] of (.., D), from that of unit = (x - mean) rstd; plus the residual."""
    cols = tl.arange(0, BLOCK_D)
    grad = load_rows(grad_ptr, rows, inside, D, cols, D)  # [n, d]
    unit = load_rows(unit_ptr, rows, inside, D, cols, D)
    rstd = tl.load(rstd_ptr + rows, mask=inside, other=0.0)
    mean, along = tl.sum(grad, axis=1) / D, tl.sum(grad * unit, axis=1) / D
    out = (grad - mean[:, None] - unit * along[:, None]) * rstd[:, None]
    if residual_ptr is not None:
        out += load_rows(residual_ptr, rows, inside, D, cols, D)
    where = rows.to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(out_ptr + where, out, mask=inside[:, None] & (cols < D)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def layer_norm_backward(
    grad_ptr, unit_ptr, rstd_ptr, residual_ptr, working_ptr, out_ptr, N, D, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [N, D]: of x, from that of unit = (x - mean) rstd; plus residual [N, D], if any; for the tokens at work."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = at_work(working_ptr, rows, N)
    normalize_backward_tile(grad_ptr, unit_ptr, rstd_ptr, residual_ptr, out_ptr, rows, inside, D, BLOCK_D)


@triton.jit
def linear_tile(
    layer, x_ptr, out_ptr, wide_ptr, residual_ptr, factor, rows, inside, begin,
    AFTER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """Outputs from `begin` on of tokens `rows` [n]: out = factor after(x weight^T + bias) + residual; factor [n]."""
    outputs = begin + tl.arange(0, BLOCK_F)
    out = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for column in range(0, layer.K, BLOCK_K):
        inputs = column + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, rows, inside, layer.K, inputs, layer.K)  # [n, k]
        where = inputs[:, None] * layer.stride_k + outputs[None, :] * layer.stride_f
        mask = (inputs < layer.K)[:, None] & (outputs < layer.F)[None, :]
        weight = tl.load(layer.weight + where, mask=mask, other=0.0)
        out = dot(x, weight, out, HOW)  # [n, f]
    if layer.bias is not None:
        out += tl.load(layer.bias + outputs, mask=outputs < layer.F, other=0.0)[None, :]
    where = rows.to(tl.int64)[:, None] * layer.F + outputs[None, :]
    mask = inside[:, None] & (outputs < layer.F)[None, :]
    if AFTER == GELU:
        if wide_ptr is not None:
            tl.store(wide_ptr + where, out, mask=mask)
        out = gelu(out)
    if AFTER == GELU_GRADIENT:
        out *= gelu_slope(tl.load(wide_ptr + where, mask=mask, other=0.0))
    if factor is not None:
        out *= factor[:, None]
    if residual_ptr is not None:
        out += tl.load(residual_ptr + where, mask=mask, other=0.0)
    tl.store(out_ptr + where, out, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def linear(
    x_ptr, weight_ptr, bias_ptr, wide_ptr, residual_ptr, factor_ptr, chunk_ptr, working_ptr, out_ptr,
    N, K, F, stride_f, stride_k, AFTER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """out [N, F] = factor after(x weight^T + bias) + residual, for x [N, K] and weight [F, K] by strides.

    AFTER GELU keeps its argument in wide [N, F], and GELU_GRADIENT multiplies by its slope there. The factor is that of
    a token's chunk. Bias, wide, factor and residual may be None. Only tokens at work are looked at.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, factor = at_work(working_ptr, rows, N), None
    if tl.max(inside.to(tl.int32), axis=0) == 0:
        return
    if factor_ptr is not None:
        factor = load_factor(factor_ptr, chunk_ptr, rows, inside)
    layer = Layer(weight_ptr, bias_ptr, K, F, stride_f, stride_k)
    linear_tile(
        layer, x_ptr, out_ptr, wide_ptr, residual_ptr, factor, rows, inside, tl.program_id(1) * BLOCK_F,
        AFTER, BLOCK_N, BLOCK_F, BLOCK_K, HOW,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "share"])
def linear_weights(
    grad_ptr, x_ptr, factor_ptr, chunk_ptr, working_ptr, dweight_ptr, dbias_ptr, N, share, K, F,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """Of each part of `share` tokens: dweight [parts, F, K] = sum_n factor_n grad_n x_n^T, and dbias [parts, F].

    For grad [N, F] and x [N, K], of the tokens at work.
    """
    outputs = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inputs = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(2).to(tl.int64)
    begin = part * share
    end = tl.minimum(begin + share, N)
    dweight = tl.zeros((BLOCK_F, BLOCK_K), tl.float32)
    dbias = tl.zeros((BLOCK_F,), tl.float32)
    for at in range(begin, end, BLOCK_N):
        rows = at + tl.arange(0, BLOCK_N)
        inside = at_work(working_ptr, rows, end)
        grad = load_rows(grad_ptr, rows, inside, F, outputs, F)  # [n, f]
        if factor_ptr is not None:
            grad *= load_factor(factor_ptr, chunk_ptr, rows, inside)[:, None]
        x = load_rows(x_ptr, rows, inside, K, inputs, K)  # [n, k]
        dweight = dot(tl.trans(grad), x, dweight, HOW)  # [f, k]
        dbias += tl.sum(grad, axis=0)
    where = part * F * K + outputs.to(tl.int64)[:, None] * K + inputs[None, :]
    tl.store(dweight_ptr + where, dweight, mask=(outputs < F)[:, None] & (inputs < K)[None, :])
    if dbias_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(dbias_ptr + part * F + outputs, dbias, mask=outputs < F)
