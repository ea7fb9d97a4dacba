# mypy: ignore-errors
"""Self-attention of a chunk's tokens, a tile of queries or of keys of one head to a program; chunks of any length.

Queries come scaled. Tokens that take no part are no keys; as queries they get what nobody reads, and no gradient.
Shapes in comments: q queries, k keys, h channels of a head.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fcn_kernels.clustering.kernels.pieces import find_piece
from fcn_kernels.clustering.kernels.products import dot
from fcn_kernels.device.rows import load_rows

UNSPECIALIZED = ["tokens", "chunks", "fewest"]


class Head(NamedTuple):
    """One head of a chunk's tokens, from the chunk's first."""

    qkv: Any  # [count, 3 D], queries, keys and values, each head-major
    attending: Any  # [count] bool
    count: Any
    D: Any
    begin: Any  # the head's first channel
    width: Any  # its channels


@triton.jit
def head_of(p, qkv_ptr, attending_ptr, D, width, head):
    """A head of a piece's chunk."""
    return Head(qkv_ptr + p.first * 3 * D, attending_ptr + p.first, p.count, D, head * width, width)


@triton.jit
def load_head(h, pointer, stride, lane, begin, BLOCK_H: tl.constexpr):
    """A head's channels [n, h] of tokens, from channel `begin` of rows by stride."""
    return load_rows(pointer + begin, lane, lane < h.count, stride, tl.arange(0, BLOCK_H), h.width)


@triton.jit
def load_qkv(h, lane, which, BLOCK_H: tl.constexpr):
    """Queries (0), keys (1) or values (2) of tokens [n, h]."""
    return load_head(h, h.qkv, 3 * h.D, lane, which * h.D + h.begin, BLOCK_H)


@triton.jit
def store_head(h, pointer, stride, lane, begin, value, BLOCK_H: tl.constexpr):
    """What :func:`load_head` loads."""
    channel = tl.arange(0, BLOCK_H)
    where = lane.to(tl.int64)[:, None] * stride + begin + channel[None, :]
    tl.store(pointer + where, value, mask=(lane < h.count)[:, None] & (channel < h.width)[None, :])


@triton.jit
def is_key(h, lane):
    """Whether tokens [n] are attended to."""
    return tl.load(h.attending + lane, mask=lane < h.count, other=0) != 0


@triton.jit
def attend_tile(h, at, out_ptr, lse_ptr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, HOW: tl.constexpr):
    """Queries [at, at + BLOCK_N) of a head over all keys of their chunk: out [count, D], lse [count] unless None."""
    query = at + tl.arange(0, BLOCK_N)
    q = load_qkv(h, query, 0, BLOCK_H)
    top, total = tl.full((BLOCK_N,), float("-inf"), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    out = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for start in range(0, h.count, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        score = dot(q, tl.trans(load_qkv(h, key, 1, BLOCK_H)), None, HOW)  # [q, k]
        score = tl.where(is_key(h, key)[None, :], score, float("-inf"))
        peak = tl.maximum(top, tl.max(score, axis=1))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        share, shrink = tl.exp(score - shift[:, None]), tl.exp(top - shift)
        total = total * shrink + tl.sum(share, axis=1)
        out = dot(share, load_qkv(h, key, 2, BLOCK_H), out * shrink[:, None], HOW)
        top = peak
    total = tl.where(total > 0, total, 1.0)
    store_head(h, out_ptr, h.D, query, h.begin, out / total[:, None], BLOCK_H)
    if lse_ptr is not None:
        tl.store(lse_ptr + query, top + tl.log(total), mask=query < h.count)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attend(
    qkv_ptr, attending_ptr, starts_ptr, sizes_ptr, out_ptr, lse_ptr, tokens, D, width, chunks, fewest,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """out [tokens, D] = softmax(q k^T) v; log-sum-exps [heads, tokens], if there is room for them. In chunks with at
    least `fewest` tokens."""
    p = find_piece(starts_ptr, sizes_ptr, tl.program_id(0).to(tl.int64), chunks, tokens, BLOCK_N)
    if (p.begin >= p.end) | (p.count < fewest):
        return
    head = tl.program_id(1)
    h = head_of(p, qkv_ptr, attending_ptr, D, width, head)
    if lse_ptr is not None:
        lse_ptr += head.to(tl.int64) * tokens + p.first
    attend_tile(h, p.begin, out_ptr + p.first * D, lse_ptr, BLOCK_N, BLOCK_H, HOW)


class Arriving(NamedTuple):
    """At a chunk's tokens, from the chunk's first."""

    grad: Any  # [count, D], at what they gathered
    out: Any  # [count, D], that itself
    lse: Any  # [count]


@triton.jit
def open_backward(
    qkv_ptr, attending_ptr, starts_ptr, sizes_ptr, grad_ptr, out_ptr, lse_ptr, tokens, D, width, chunks,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program's piece of a chunk, its head, and what arrives there."""
    p = find_piece(starts_ptr, sizes_ptr, tl.program_id(0).to(tl.int64), chunks, tokens, BLOCK_N)
    head = tl.program_id(1)
    h = head_of(p, qkv_ptr, attending_ptr, D, width, head)
    a = Arriving(grad_ptr + p.first * D, out_ptr + p.first * D, lse_ptr + head.to(tl.int64) * tokens + p.first)
    return p, h, a


@triton.jit
def shares_of(h, a, query, key, q, k, v, BLOCK_H: tl.constexpr, HOW: tl.constexpr):
    """Shares [q, k], the gradients of their scores, and that of what queries gathered [q, h]."""
    inside = query < h.count
    grad = load_head(h, a.grad, h.D, query, h.begin, BLOCK_H)  # [q, h]
    gathered = load_head(h, a.out, h.D, query, h.begin, BLOCK_H)
    lse = tl.load(a.lse + query, mask=inside, other=0.0)
    score = dot(q, tl.trans(k), None, HOW) - lse[:, None]
    mask = inside[:, None] & is_key(h, key)[None, :]
    # never above 1, however large a score's rounding is
    share = tl.exp(tl.where(mask, tl.minimum(score, 0.0), float("-inf")))
    reach = dot(grad, tl.trans(v), None, HOW) - tl.sum(grad * gathered, axis=1)[:, None]
    return share, share * reach, grad


@triton.jit
def attend_queries_tile(h, a, at, dqkv_ptr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, HOW: tl.constexpr):
    """The part of dqkv [count, 3 D] of the queries [at, at + BLOCK_N)."""
    query = at + tl.arange(0, BLOCK_N)
    q = load_qkv(h, query, 0, BLOCK_H)
    dq = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for start in range(0, h.count, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k, v = load_qkv(h, key, 1, BLOCK_H), load_qkv(h, key, 2, BLOCK_H)
        _share, dscore, _grad = shares_of(h, a, query, key, q, k, v, BLOCK_H, HOW)
        dq = dot(dscore, k, dq, HOW)
    store_head(h, dqkv_ptr, 3 * h.D, query, h.begin, dq, BLOCK_H)


@triton.jit
def attend_keys_tile(h, a, at, dqkv_ptr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, HOW: tl.constexpr):
    """The parts of dqkv [count, 3 D] of the keys and the values [at, at + BLOCK_N)."""
    key = at + tl.arange(0, BLOCK_N)
    k, v = load_qkv(h, key, 1, BLOCK_H), load_qkv(h, key, 2, BLOCK_H)
    dk, dv = tl.zeros((BLOCK_N, BLOCK_H), tl.float32), tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for start in range(0, h.count, BLOCK_N):
        query = start + tl.arange(0, BLOCK_N)
        q = load_qkv(h, query, 0, BLOCK_H)
        share, dscore, grad = shares_of(h, a, query, key, q, k, v, BLOCK_H, HOW)
        dk = dot(tl.trans(dscore), q, dk, HOW)
        dv = dot(tl.trans(share), grad, dv, HOW)
    store_head(h, dqkv_ptr, 3 * h.D, key, h.D + h.begin, dk, BLOCK_H)
    store_head(h, dqkv_ptr, 3 * h.D, key, 2 * h.D + h.begin, dv, BLOCK_H)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attend_queries(
    qkv_ptr, attending_ptr, starts_ptr, sizes_ptr, grad_ptr, out_ptr, lse_ptr, dqkv_ptr, tokens, D, width, chunks,
    fewest, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """The queries' part of dqkv [tokens, 3 D], in chunks with at least `fewest` tokens."""
    p, h, a = open_backward(
        qkv_ptr, attending_ptr, starts_ptr, sizes_ptr, grad_ptr, out_ptr, lse_ptr, tokens, D, width, chunks, BLOCK_N
    )
    if (p.begin >= p.end) | (p.count < fewest):
        return
    attend_queries_tile(h, a, p.begin, dqkv_ptr + p.first * 3 * D, BLOCK_N, BLOCK_H, HOW)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attend_keys(
    qkv_ptr, attending_ptr, starts_ptr, sizes_ptr, grad_ptr, out_ptr, lse_ptr, dqkv_ptr, tokens, D, width, chunks,
    fewest, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """The keys' and the values' parts of dqkv [tokens, 3 D], in chunks with at least `fewest` tokens."""
    p, h, a = open_backward(
        qkv_ptr, attending_ptr, starts_ptr, sizes_ptr, grad_ptr, out_ptr, lse_ptr, tokens, D, width, chunks, BLOCK_N
    )
    if (p.begin >= p.end) | (p.count < fewest):
        return
    attend_keys_tile(h, a, p.begin, dqkv_ptr + p.first * 3 * D, BLOCK_N, BLOCK_H, HOW)
