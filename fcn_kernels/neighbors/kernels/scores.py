"""Cosines of rows and bank, tile by tile, of which only those that can matter leave the chip.

Shapes in comments: n rows and m bank rows of a tile, c columns of a block. A score is summed block after block of
columns, whatever tile it stands in, and so depends on its two rows alone.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Constants(NamedTuple):
    """What a kernel is built for, handed on as one constant, ``BUILD``."""

    BLOCK_N: tl.constexpr
    BLOCK_M: tl.constexpr
    BLOCK_C: tl.constexpr


class Side(NamedTuple):
    """Rows, or the bank."""

    rows: Any  # [count, C] by stride
    scale: Any  # [count] float32, 1 / norm; 0 for a row that is not usable
    ids: Any  # [count] int64, or None
    count: Any
    stride: Any


@triton.jit
def score_tile(x, bank, row, column, C, BUILD: tl.constexpr):
    """Scores [n, m] of rows from `row` on and bank rows from `column` on, and which of them take part, bool [n, m].

    Within a tile places are of 32 bits, which takes half of the registers.
    """
    n, m = tl.arange(0, BUILD.BLOCK_N), tl.arange(0, BUILD.BLOCK_M)
    rows, columns = n + row, m + column
    row_there, bank_there = rows < x.count, columns < bank.count
    x_tile = x.rows + tl.cast(row, tl.int64) * x.stride
    bank_tile = bank.rows + tl.cast(column, tl.int64) * bank.stride
    scores = tl.zeros([BUILD.BLOCK_N, BUILD.BLOCK_M], tl.float32)
    for first in range(0, C, BUILD.BLOCK_C):
        c = first + tl.arange(0, BUILD.BLOCK_C)
        u = tl.load(x_tile + (n[:, None] * x.stride + c[None, :]), row_there[:, None] & (c < C)[None, :], 0.0)  # [n, c]
        v = tl.load(bank_tile + (m[None, :] * bank.stride + c[:, None]), bank_there[None, :] & (c < C)[:, None], 0.0)
        if INTERPRETED:
            # whose dot takes bfloat16 for integers; in float32 the products of the same values are the same
            u, v = u.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(u, v, scores, input_precision="ieee")
    row_scale = tl.load(x.scale + rows, row_there, 0.0)
    bank_scale = tl.load(bank.scale + columns, bank_there, 0.0)
    part = (row_scale > 0)[:, None] & (bank_scale > 0)[None, :]
    if x.ids is not None:
        own, theirs = tl.load(x.ids + rows, row_there, 0), tl.load(bank.ids + columns, bank_there, 0)
        part = part & (own[:, None] != theirs[None, :])
    return scores * row_scale[:, None] * bank_scale[None, :], part


@triton.jit(do_not_specialize=["N", "M", "tiles", "room"])
def filter_scores(
    rows_ptr, bank_ptr, row_scale_ptr, bank_scale_ptr, row_ids_ptr, bank_ids_ptr, N, M, C, stride_rows, stride_bank,
    tiles, live_ptr, floor_ptr, scores_ptr, places_ptr, counts_ptr, room, BUILD: tl.constexpr,
):  # fmt: skip
    """Scores (N, S, room) of at least floor (N,) with their bank rows, in the order of these, and how many (N, S).

    A program takes BLOCK_N rows past the tiles of one of S parts of the bank. A count may be more than the room. Rows
    that are not live are left as they are, and a tile of none but these walks nothing.
    """
    x = Side(rows_ptr, row_scale_ptr, row_ids_ptr, N, stride_rows)
    bank = Side(bank_ptr, bank_scale_ptr, bank_ids_ptr, M, stride_bank)
    split, splits = tl.program_id(1), tl.num_programs(1)
    first = tl.program_id(0) * BUILD.BLOCK_N
    rows = first + tl.arange(0, BUILD.BLOCK_N)
    floor = tl.load(floor_ptr + rows, rows < N, float("inf"))
    live, last = rows < N, tl.minimum((split + 1) * tiles, tl.cdiv(M, BUILD.BLOCK_M))
    if live_ptr is not None:
        live = live & (tl.load(live_ptr + rows, rows < N, 0) != 0)
        last = tl.where(tl.max(live.to(tl.int32), 0) > 0, last, 0)
    begin = (first.to(tl.int64) * splits + split) * room  # of the first row's entries
    scores_ptr += begin
    places_ptr += begin
    slot = tl.arange(0, BUILD.BLOCK_N) * splits * room
    kept = tl.zeros([BUILD.BLOCK_N], tl.int32)
    for tile in range(split * tiles, last):
        scores, part = score_tile(x, bank, first, tile * BUILD.BLOCK_M, C, BUILD)
        columns = tl.arange(0, BUILD.BLOCK_M) + tile * BUILD.BLOCK_M
        # -- places by a prefix sum: no atomics, and always in one order --
        stays = (part & live[:, None] & (scores >= floor[:, None])).to(tl.int32)  # [n, m]
        at = kept[:, None] + tl.cumsum(stays, 1) - 1
        stored = (stays > 0) & (at < room)
        where = slot[:, None] + at
        tl.store(scores_ptr + where, scores, stored)
        tl.store(places_ptr + where, tl.broadcast_to(columns[None, :], (BUILD.BLOCK_N, BUILD.BLOCK_M)), stored)
        kept += tl.sum(stays, 1)
    tl.store(counts_ptr + rows.to(tl.int64) * splits + split, kept, live)


@triton.jit(do_not_specialize=["N", "M", "tiles", "least"])
def sum_moments(
    rows_ptr, bank_ptr, row_scale_ptr, bank_scale_ptr, row_ids_ptr, bank_ids_ptr, N, M, C, stride_rows, stride_bank,
    tiles, moments_ptr, least, BUILD: tl.constexpr,
):  # fmt: skip
    """Of the scores of at least `least`: number, mean, and sum of squares about it, (3, S, N), for each part."""
    x = Side(rows_ptr, row_scale_ptr, row_ids_ptr, N, stride_rows)
    bank = Side(bank_ptr, bank_scale_ptr, bank_ids_ptr, M, stride_bank)
    split, splits = tl.program_id(1), tl.num_programs(1)
    first = tl.program_id(0) * BUILD.BLOCK_N
    rows = first + tl.arange(0, BUILD.BLOCK_N)
    count = tl.zeros([BUILD.BLOCK_N], tl.float32)
    mean = tl.zeros([BUILD.BLOCK_N], tl.float32)
    squares = tl.zeros([BUILD.BLOCK_N], tl.float32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(M, BUILD.BLOCK_M))):
        scores, part = score_tile(x, bank, first, tile * BUILD.BLOCK_M, C, BUILD)
        # -- a tile's own moments, then both made one (Chan, Golub and LeVeque 1979) --
        member = part & (scores >= least)
        found = tl.sum(member.to(tl.float32), 1)  # [n]
        middle = tl.sum(tl.where(member, scores, 0.0), 1) / tl.maximum(found, 1.0)
        away = tl.where(member, scores - middle[:, None], 0.0)
        share = found / tl.maximum(count + found, 1.0)
        apart = middle - mean
        squares += tl.sum(away * away, 1) + apart * apart * share * count
        mean += apart * share
        count += found
    where = moments_ptr + split.to(tl.int64) * N + rows
    whole = splits.to(tl.int64) * N
    tl.store(where, count, rows < N)
    tl.store(where + whole, mean, rows < N)
    tl.store(where + 2 * whole, squares, rows < N)
