"""The k best of what a filter stored, and, where that had no room, of the whole bank.

A key holds a score's bits, in their order, above the bank row's number, counted down: keys are as scores are, the
lowest bank row first on ties, and no two are equal.
"""

import triton
import triton.language as tl

from fcn_kernels.neighbors.kernels.scores import Side, score_tile

NONE = tl.constexpr(-(2**62))
"""A key below all others, whose distance from them fits 63 bits."""
LOW_BITS = tl.constexpr(0x7FFFFFFF)
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def ordered(scores):
    """int32 in the order of the scores; 0 and -0 are one."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ LOW_BITS)


@triton.jit
def of_ordered(numbers):
    """The score of which this is the number."""
    return tl.where(numbers >= 0, numbers, numbers ^ LOW_BITS).to(tl.float32, bitcast=True)


@triton.jit
def keys_of(numbers, places):
    """Keys, int64, of scores by their ordered numbers."""
    return (numbers.to(tl.int64) << 32) | (-places + LOW_BITS).to(tl.int64)


@triton.jit(do_not_specialize=["k", "room", "splits"])
def select_best(
    scores_ptr, places_ptr, counts_ptr, live_ptr, keys_ptr, floor_ptr, full_ptr, k, room, splits, WIDE: tl.constexpr
):
    """Keys (N, k) of the best of S x room entries a row, in no order; NONE past them is there already.

    floor (N,) rises to the k-th best score, where there are as many; full (N,) says which rows had more than the room.
    Rows that are not live are left as they are. WIDE entries a row, S x room up to a power of two, stay on the chip.
    The room is a multiple of 16.
    """
    row = tl.program_id(0).to(tl.int64)
    live = True
    if live_ptr is not None:
        live = tl.load(live_ptr + row) != 0
    lane = tl.arange(0, WIDE)
    split = lane // room
    stored = tl.load(counts_ptr + row * splits + split, (split < splits) & live, 0)
    tl.store(full_ptr + row, (tl.max(stored, 0) > room).to(tl.int32), live)
    there = (lane - split * room < stored) & live
    # entries that are not there are loaded all the same, so that a thread loads 16 bytes at a time
    entries = tl.multiple_of(splits * room, 16)
    at = tl.multiple_of(row * entries, 16) + lane
    scores = tl.load(scores_ptr + at, (lane < entries) & live, 0.0)
    number = tl.where(there, ordered(scores), LOWEST)
    have = tl.sum(there.to(tl.int32), 0)
    want = tl.minimum(k, have)
    # -- the want-th best score, by bisection --
    low, high = tl.min(tl.where(there, number, LOW_BITS), 0), tl.max(number, 0)
    while low < high:
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounded up, in 32 bits
        enough = tl.sum((number >= middle).to(tl.int32), 0) >= want
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    better, equal = number > low, number == low  # LOWEST is neither
    ties = want - tl.sum(better.to(tl.int32), 0)
    places = tl.load(places_ptr + at, (lane < entries) & live, 0)
    # -- of those that tie with it the first: the ties-th lowest place, if it takes a choice --
    first, last = tl.zeros_like(low), tl.max(tl.where(equal, places, 0), 0)
    first = tl.where(tl.sum(equal.to(tl.int32), 0) > ties, first, last)
    while first < last:
        middle = (first + last) >> 1
        enough = tl.sum((equal & (places <= middle)).to(tl.int32), 0) >= ties
        first = tl.where(enough, first, middle + 1)
        last = tl.where(enough, middle, last)
    chosen = better | (equal & (places <= first))
    tl.store(floor_ptr + row, of_ordered(low), live & (have >= k))
    rank = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(keys_ptr + row * k + rank, keys_of(number, places), chosen)


@triton.jit
def count_from(x, bank, first, least, C, BUILD: tl.constexpr):
    """How many scores (n,) of a tile of rows are at least `least` (n,)."""
    count = tl.zeros([BUILD.BLOCK_N], tl.int32)
    for tile in range(0, tl.cdiv(bank.count, BUILD.BLOCK_M)):
        scores, part = score_tile(x, bank, first, tile * BUILD.BLOCK_M, C, BUILD)
        count += tl.sum((part & (scores >= least[:, None])).to(tl.int32), 1)
    return count


@triton.jit(do_not_specialize=["N", "M", "tiles", "k"])
def find_kth(
    rows_ptr, bank_ptr, row_scale_ptr, bank_scale_ptr, row_ids_ptr, bank_ids_ptr, N, M, C, stride_rows, stride_bank,
    tiles, live_ptr, floor_ptr, kth_ptr, ties_ptr, k, BUILD: tl.constexpr,
):  # fmt: skip
    """The k-th best scores (N,) of live rows, floor (N,) at least, by bisection: a walk through the bank a step.

    ties (N,) says how many bank rows of that very score are among the k best. For banks in which very many rows are
    alike: nothing is stored. Tiles of rows without a live one walk nothing.
    """
    x = Side(rows_ptr, row_scale_ptr, row_ids_ptr, N, stride_rows)
    first = tl.program_id(0) * BUILD.BLOCK_N
    rows = first + tl.arange(0, BUILD.BLOCK_N)
    live = tl.load(live_ptr + rows, rows < N, 0) != 0
    bank = Side(bank_ptr, bank_scale_ptr, bank_ids_ptr, tl.where(tl.max(live.to(tl.int32), 0) > 0, M, 0), stride_bank)
    floor = tl.load(floor_ptr + rows, live, 0.0)
    want = tl.minimum(count_from(x, bank, first, floor, C, BUILD), k)
    low = tl.where(live, ordered(floor), 0)
    high = tl.where(live, 0x7F800000, 0)  # of infinity
    better = tl.zeros([BUILD.BLOCK_N], tl.int32)  # than `high`, and in the end than the k-th
    while tl.max((low < high).to(tl.int32), 0) > 0:
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounded up, in 32 bits
        found = count_from(x, bank, first, of_ordered(middle), C, BUILD)
        enough = (found >= want) | (low == high)
        low = tl.where(found >= want, middle, low)
        better = tl.where(enough, better, found)
        high = tl.where(enough, high, middle - 1)
    tl.store(kth_ptr + rows, of_ordered(low), live)
    tl.store(ties_ptr + rows, want - better, live)


@triton.jit(do_not_specialize=["N", "M", "tiles", "k"])
def collect_best(
    rows_ptr, bank_ptr, row_scale_ptr, bank_scale_ptr, row_ids_ptr, bank_ids_ptr, N, M, C, stride_rows, stride_bank,
    tiles, live_ptr, kth_ptr, ties_ptr, keys_ptr, k, BUILD: tl.constexpr,
):  # fmt: skip
    """Keys (N, k) of live rows: of all scores above the k-th, and of the first `ties` that equal it."""
    x = Side(rows_ptr, row_scale_ptr, row_ids_ptr, N, stride_rows)
    first = tl.program_id(0) * BUILD.BLOCK_N
    rows = first + tl.arange(0, BUILD.BLOCK_N)
    live = tl.load(live_ptr + rows, rows < N, 0) != 0
    bank = Side(bank_ptr, bank_scale_ptr, bank_ids_ptr, tl.where(tl.max(live.to(tl.int32), 0) > 0, M, 0), stride_bank)
    kth = tl.load(kth_ptr + rows, live, float("inf"))
    ties = tl.load(ties_ptr + rows, live, 0)
    kept = tl.zeros([BUILD.BLOCK_N], tl.int32)
    tied = tl.zeros([BUILD.BLOCK_N], tl.int32)
    keys_ptr += first.to(tl.int64) * k
    slot = tl.arange(0, BUILD.BLOCK_N) * k
    for tile in range(0, tl.cdiv(bank.count, BUILD.BLOCK_M)):
        scores, part = score_tile(x, bank, first, tile * BUILD.BLOCK_M, C, BUILD)
        equal = part & (scores == kth[:, None])
        early = tied[:, None] + tl.cumsum(equal.to(tl.int32), 1) <= ties[:, None]
        stays = ((part & (scores > kth[:, None])) | (equal & early)) & live[:, None]
        at = kept[:, None] + tl.cumsum(stays.to(tl.int32), 1) - 1
        columns = tile * BUILD.BLOCK_M + tl.arange(0, BUILD.BLOCK_M)
        key = keys_of(ordered(scores), tl.broadcast_to(columns[None, :], (BUILD.BLOCK_N, BUILD.BLOCK_M)))
        tl.store(keys_ptr + (slot[:, None] + at), key, stays)
        kept += tl.sum(stays.to(tl.int32), 1)
        tied += tl.sum(equal.to(tl.int32), 1)
