"""The forward kernel: all K steps of a set.

Three tiers in one body. *Resident*: a program's tile [n, c] stays in registers from the first step to the last, so
its rows are read once. *Streaming*: tiles are read again for each step, from L1 or L2 while the set fits there, and
what a row carries from step to step, its norm and its gap, stands in global memory; with a quality or a start
given the rows are read K - 1 times, else K. Either can be *split*: a set's rows are divided between programs, which
agree on each pick.

A step ends one pick and makes the logits of the next. All that it needs of the set is a ballot: the best noisy logit,
its row, that row's logit without the noise, and the denominator of the softmax. Splitting a set is exchanging those.
"""

import triton
import triton.language as tl

from fcn_kernels.device.rows import load_row, load_rows, locate, norm_of, products
from fcn_kernels.device.splits import COOPERATIVE, LAUNCHES, WHOLE, divide, grid_barrier
from fcn_kernels.selection.kernels.common import RAGGED, RESIDENT_TIER, TAKEN, UNSPECIALIZED, perturb, power, scalar


@triton.jit
def is_sound(norm):
    """Whether rows of these norms are finite and have a direction."""
    return (norm < float("inf")) & (norm > 0)


@triton.jit
def may_be_picked(quality, mask_ptr, first, rows, inside):
    """Whether rows [n] take part and are of usable quality; their features are another matter."""
    good = inside & (quality > 0) & (quality < float("inf"))
    if mask_ptr is not None:
        good = good & tl.load(mask_ptr + first + rows, mask=inside, other=0).to(tl.int1)
    return good


@triton.jit
def admit(tile, rows, inside, first, quality_ptr, mask_ptr):
    """First look at rows: (quality, mark) [n].

    The mark is the norm of a row that can be picked, -1 for one that is masked or of unusable quality, NaN for one
    that is not finite or has no direction. Rows that cannot be picked get quality 1, which is harmless.
    """
    norm = norm_of(tile)
    if quality_ptr is not None:
        quality = tl.load(quality_ptr + first + rows, mask=inside, other=-1.0)
    else:
        quality = norm
    good = may_be_picked(quality, mask_ptr, first, rows, inside)
    sound = is_sound(norm)
    mark = tl.where(sound, tl.where(good, norm, -1.0), float("nan"))
    return tl.where(good & sound, quality, 1.0), mark


@triton.jit
def approach(tile, direction, norm, gap, rows, row, NORMALIZED: tl.constexpr, DISTINCT: tl.constexpr):
    """The gap [n] once `row`, of unit vector `direction`, is picked too; and whether it tied with the gap before."""
    along = products(tile, direction)
    if not NORMALIZED:
        along = along / norm
    # rounding can take 1 - cos below the 0 that a picked row has to itself
    fresh = tl.maximum(1 - along, 0.0)
    if DISTINCT:
        gap = tl.where(rows == row, TAKEN, gap)
    return tl.minimum(gap, fresh), fresh == gap


@triton.jit
def challenge(best, row, logit, denominator, noisy, logits, rows, tau, KEEP: tl.constexpr):
    """Let a tile's noisy logits [n] (-inf where barred) take part in the running argmax and softmax."""
    tile_best, at = tl.max(noisy, axis=0, return_indices=True, return_indices_tie_break_left=True)
    at = tl.min(rows, axis=0) + at
    peak = tl.maximum(best, tile_best)
    if KEEP:
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        denominator = denominator * tl.exp((best - shift) / tau)
        denominator += tl.sum(tl.exp((noisy - shift) / tau), axis=0)
    won = tile_best > best  # tiles come in order of rows, so the lowest row keeps a tie
    here = tl.sum(tl.where(rows == at, logits, 0.0), axis=0)
    return peak, tl.where(won, at, row), tl.where(won, here, logit), denominator


@triton.jit
def favourite(
    quality_ptr, noise_ptr, seed, mask_ptr, set_id, first, low, high, R, above, above_row,
    SEEDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first pick among rows [low, high) by their qualities alone: the best that comes after (above, above_row)."""
    best, row = float("-inf"), 0
    for begin in range(low, high, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        inside = rows < high
        quality = tl.load(quality_ptr + first + rows, mask=inside, other=-1.0)
        open_to = may_be_picked(quality, mask_ptr, first, rows, inside)
        noisy = perturb(quality, rows, inside, 0, set_id, first, R, noise_ptr, seed, SEEDED)
        open_to = open_to & ((noisy < above) | ((noisy == above) & (rows > above_row)))
        noisy = tl.where(open_to, noisy, float("-inf"))
        best, row, _, _ = challenge(best, row, 0.0, 0.0, noisy, quality, rows, 1.0, False)
    return best, row


@triton.jit
def is_sound_row(rows_ptr, row, there, stride_row, cols, C):
    """The same of one row, not seen yet."""
    values = load_row(rows_ptr, row, there, stride_row, cols, C).to(tl.float32)
    return is_sound(tl.sqrt_rn(tl.sum(values * values, axis=0)))


@triton.jit
def may_start(rows_ptr, quality_ptr, mask_ptr, row, first, count, stride_row, cols, C):
    """Whether a given first row is of the set and can be picked, whatever is known of the others."""
    there = (row >= 0) & (row < count)
    quality = 1.0
    if quality_ptr is not None:
        quality = tl.load(quality_ptr + first + row, mask=there, other=-1.0)
    there = may_be_picked(quality, mask_ptr, first, row, there)
    return there & is_sound_row(rows_ptr, row, there, stride_row, cols, C)


@triton.jit
def log(denominator):
    """The logarithm of a softmax's denominator; 0 for that of no rows."""
    return tl.log(tl.where(denominator > 0, denominator, 1.0))


@triton.jit
def add_normalizers(openings_ptr, slot, parts, BLOCK_P: tl.constexpr):
    """log sum exp of a set from those of its parts."""
    part = tl.arange(0, BLOCK_P)
    each = tl.load(openings_ptr + slot + part, mask=part < parts, other=float("-inf"), cache_modifier=".cg")
    most = tl.max(each, axis=0)
    shift = tl.where(most == float("-inf"), 0.0, most)
    return shift + log(tl.sum(tl.exp(each - shift), axis=0))


@triton.jit
def save_gap(gaps_ptr, at, gap, tied, open_to, inside):
    """Save a step's gaps [n] for the gradient, the sign bit set where the step tied."""
    bits = tl.where(open_to, gap, 0.0).to(tl.int32, bitcast=True)
    bits |= tl.where(tied & open_to, -2147483648, 0)  # -gap would lose the sign of a tie at 0, as Triton's is 0 - gap
    tl.store(gaps_ptr + at, bits.to(tl.float32, bitcast=True), mask=inside)


@triton.jit
def cast_ballot(ballots_ptr, winners_ptr, step, slot, slots, best, row, logit, denominator):
    """Leave a part's ballot for ``step`` where the others find it; even and odd steps have places of their own."""
    at = (step % 2) * slots + slot
    tl.store(ballots_ptr + at * 3, best)
    tl.store(ballots_ptr + at * 3 + 1, logit)
    tl.store(ballots_ptr + at * 3 + 2, denominator)
    tl.store(winners_ptr + at, row)


@triton.jit
def count_ballots(
    ballots_ptr, winners_ptr, admitted_ptr, step, slot, slots, parts, tau, KEEP: tl.constexpr, BLOCK_P: tl.constexpr
):
    """The set's ballot from those of its parts, and its pickable rows. Parts are in order of rows, so ties are, too."""
    part = tl.arange(0, BLOCK_P)
    there = part < parts
    at = (step % 2) * slots + slot + part
    # .cg: other SMs wrote these, and L1 may hold what was here before
    bests = tl.load(ballots_ptr + at * 3, mask=there, other=float("-inf"), cache_modifier=".cg")
    logits = tl.load(ballots_ptr + at * 3 + 1, mask=there, other=0.0, cache_modifier=".cg")
    rows = tl.load(winners_ptr + at, mask=there, other=0, cache_modifier=".cg")
    best, winner = tl.max(bests, axis=0, return_indices=True, return_indices_tie_break_left=True)
    row = tl.sum(tl.where(part == winner, rows, 0), axis=0)
    logit = tl.sum(tl.where(part == winner, logits, 0.0), axis=0)
    denominator = 0.0
    if KEEP:
        denominators = tl.load(ballots_ptr + at * 3 + 2, mask=there, other=0.0, cache_modifier=".cg")
        shift = tl.where(best == float("-inf"), 0.0, best)
        denominator += tl.sum(denominators * tl.exp((bests - shift) / tau), axis=0)
    admitted = tl.load(admitted_ptr + slot + part, mask=there, other=0, cache_modifier=".cg")
    return best, row, logit, denominator, tl.sum(admitted, axis=0)


@triton.jit
def forward_set(
    rows_ptr, quality_ptr, gamma, noise_ptr, seed, start_ptr, mask_ptr, picked_ptr, distances_ptr, indices_ptr,
    counts_ptr, normalizers_ptr, gaps_ptr, norms_ptr, nearest_ptr, ballots_ptr, winners_ptr, admitted_ptr, openings_ptr,
    barrier_ptr, set_id, part, parts, sets, turn, first, count, stride_row, C, K, R, tau, scale,
    SEEDED: tl.constexpr, NORMALIZED: tl.constexpr, DISTINCT: tl.constexpr, KEEP: tl.constexpr, EARLY: tl.constexpr,
    RESIDENT: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One part of one set, all of it where it is not split.

    Where rows are streamed, the pass that first sees them makes the first pick, whose softmax and pickable rows it
    also counts. EARLY, the pick is given, or made before from given qualities alone, and that pass is spared: the first
    to see the rows compares them with the pick already.
    """
    cols = tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_N)
    slot = set_id * parts
    slots = sets * parts
    low, high, admit_to, begin_step, end_step = 0, count, count, 0, K
    if SPLIT != WHOLE:
        low, high = divide(count, part, parts, BLOCK_N)
        admit_to = high
        if SPLIT == LAUNCHES:  # launch 0 looks for the first pick, launch t makes pick t - 1
            admit_to = high if turn == 0 else low
            begin_step = turn - 1 if turn > 0 else 0
            end_step = turn
    best, row, logit, denominator = float("-inf"), 0, 0.0, 0.0
    pickable = 0
    if RESIDENT:
        mine = low + lane
        inside = mine < high
        held = load_rows(rows_ptr, mine, inside, stride_row, cols, C)
        quality, mark = admit(held.to(tl.float32), mine, inside, first, quality_ptr, mask_ptr)
        open_to = mark > 0
        norm = tl.where(open_to, mark, 1.0)
        weight = scale * power(quality, gamma)
        gap = tl.full((BLOCK_N,), float("inf"), tl.float32)
        pickable += tl.sum(open_to.to(tl.int32), axis=0)
        if KEEP or SPLIT != WHOLE:
            tl.store(norms_ptr + first + mine, mark, mask=inside)
        noisy = perturb(quality, mine, inside, 0, set_id, first, R, noise_ptr, seed, SEEDED)
        noisy = tl.where(open_to, noisy, float("-inf"))
        best, row, logit, denominator = challenge(best, row, logit, denominator, noisy, quality, mine, tau, KEEP)
    elif EARLY:
        if start_ptr is None:
            best, row = favourite(
                quality_ptr, noise_ptr, seed, mask_ptr, set_id, first, low, admit_to, R, float("inf"), -1, SEEDED,
                BLOCK_R,
            )  # fmt: skip
    else:
        for begin in range(low, admit_to, BLOCK_N):
            rows = begin + lane
            inside = rows < high
            tile = load_rows(rows_ptr, rows, inside, stride_row, cols, C).to(tl.float32)
            quality, mark = admit(tile, rows, inside, first, quality_ptr, mask_ptr)
            pickable += tl.sum((mark > 0).to(tl.int32), axis=0)
            tl.store(norms_ptr + first + rows, mark, mask=inside)
            noisy = perturb(quality, rows, inside, 0, set_id, first, R, noise_ptr, seed, SEEDED)
            noisy = tl.where(mark > 0, noisy, float("-inf"))
            best, row, logit, denominator = challenge(best, row, logit, denominator, noisy, quality, rows, tau, KEEP)
        tl.debug_barrier()  # the marks are read by other threads than wrote them

    if SPLIT != WHOLE:
        if turn == 0:
            cast_ballot(ballots_ptr, winners_ptr, 0, slot + part, slots, best, row, logit, denominator)
            tl.store(admitted_ptr + slot + part, pickable)

    for step in range(begin_step, end_step):
        if SPLIT == COOPERATIVE:
            grid_barrier(barrier_ptr + set_id, parts * (step + 1))
        if SPLIT != WHOLE:
            best, row, logit, denominator, pickable = count_ballots(
                ballots_ptr, winners_ptr, admitted_ptr, step, slot, slots, parts, tau, KEEP, BLOCK_P
            )
        opening = tl.full((), step, tl.int32) == 0
        if start_ptr is not None:
            start = tl.load(start_ptr + set_id).to(tl.int32)
            if RESIDENT and SPLIT == WHOLE:
                given = tl.sum(tl.where((lane == start) & open_to, 1, 0), axis=0) > 0
            else:
                given = may_start(rows_ptr, quality_ptr, mask_ptr, start, first, count, stride_row, cols, C)
            pickable = tl.where(given, tl.maximum(pickable, 1), 0)  # EARLY: no other is known of yet
            row = tl.where(opening, start, row)
        elif EARLY and not RESIDENT:
            if opening:
                while (best > float("-inf")) & (is_sound_row(rows_ptr, row, True, stride_row, cols, C) == 0):
                    best, row = favourite(
                        quality_ptr, noise_ptr, seed, mask_ptr, set_id, first, 0, count, R, best, row, SEEDED, BLOCK_R
                    )
                pickable = tl.where(best > float("-inf"), 1, 0)  # as far as is known
            if KEEP and SPLIT != WHOLE:
                if (step == 1) & (part == 0):
                    tl.store(
                        normalizers_ptr + set_id.to(tl.int64) * K, add_normalizers(openings_ptr, slot, parts, BLOCK_P)
                    )
        there = step < pickable
        picked = load_row(rows_ptr, row, there, stride_row, cols, C)
        if part == 0:
            out = set_id.to(tl.int64) * K + step
            tl.store(counts_ptr + set_id, tl.minimum(pickable, K).to(tl.int64))
            tl.store(picked_ptr + out * C + cols, picked, mask=cols < C)
            tl.store(indices_ptr + out, tl.where(there, row, -1).to(tl.int64))
            distance = tl.where(opening, float("inf"), logit)  # no pick is before the first
            tl.store(distances_ptr + out, tl.where(there, distance, 0.0))
            if KEEP:
                empty = best == float("-inf")
                normalizer = tl.where(empty, 0.0, best) / tau + log(denominator)
                tl.store(normalizers_ptr + out, normalizer)
        if step + 1 < K:
            direction = picked.to(tl.float32)
            if not NORMALIZED:
                length = tl.sqrt_rn(tl.sum(direction * direction, axis=0))
                direction = direction / tl.where(there, length, 1.0)
            pick = row
            opened, openings = best, 0.0
            best, row, logit, denominator = float("-inf"), 0, 0.0, 0.0
            if RESIDENT:
                gap, tied = approach(held.to(tl.float32), direction, norm, gap, mine, pick, NORMALIZED, DISTINCT)
                if KEEP:
                    save_gap(gaps_ptr, step * R + first + mine, gap, tied, open_to, inside)
                logits = gap * weight
                noisy = perturb(logits, mine, inside, step + 1, set_id, first, R, noise_ptr, seed, SEEDED)
                noisy = tl.where(open_to & (gap >= 0), noisy, float("-inf"))
                best, row, logit, denominator = challenge(best, row, logit, denominator, noisy, logits, mine, tau, KEEP)
            else:
                admitted = 0
                for begin in range(low, high, BLOCK_N):
                    rows = begin + lane
                    inside = rows < high
                    tile = load_rows(rows_ptr, rows, inside, stride_row, cols, C).to(tl.float32)
                    if EARLY:
                        if opening:
                            quality, mark = admit(tile, rows, inside, first, quality_ptr, mask_ptr)
                            tl.store(norms_ptr + first + rows, mark, mask=inside)
                            admitted += tl.sum((mark > 0).to(tl.int32), axis=0)
                            if KEEP and start_ptr is None:
                                noisy = perturb(quality, rows, inside, 0, set_id, first, R, noise_ptr, seed, SEEDED)
                                shares = tl.exp((noisy - opened) / tau)
                                openings += tl.sum(tl.where(mark > 0, shares, 0.0), axis=0)
                        else:
                            mark = tl.load(norms_ptr + first + rows, mask=inside, other=-1.0)
                    else:
                        mark = tl.load(norms_ptr + first + rows, mask=inside, other=-1.0)
                    open_to = mark > 0
                    norm = tl.where(open_to, mark, 1.0)
                    quality = norm
                    if quality_ptr is not None:
                        quality = tl.load(quality_ptr + first + rows, mask=open_to, other=1.0)
                    before = inside & (step > 0)
                    gap = tl.load(nearest_ptr + first + rows, mask=before, other=float("inf"))
                    gap, tied = approach(tile, direction, norm, gap, rows, pick, NORMALIZED, DISTINCT)
                    tl.store(nearest_ptr + first + rows, gap, mask=inside)
                    if KEEP:
                        save_gap(gaps_ptr, step * R + first + rows, gap, tied, open_to, inside)
                    logits = gap * scale * power(quality, gamma)
                    noisy = perturb(logits, rows, inside, step + 1, set_id, first, R, noise_ptr, seed, SEEDED)
                    noisy = tl.where(open_to & (gap >= 0), noisy, float("-inf"))
                    best, row, logit, denominator = challenge(
                        best, row, logit, denominator, noisy, logits, rows, tau, KEEP
                    )
                tl.debug_barrier()
                if EARLY:
                    if opening:
                        normalizer = tl.where(openings > 0, opened / tau + log(openings), float("-inf"))
                        if SPLIT == WHOLE:
                            pickable = admitted
                            if KEEP:
                                tl.store(normalizers_ptr + set_id.to(tl.int64) * K, normalizer)
                        else:
                            tl.store(admitted_ptr + slot + part, admitted)
                            tl.store(openings_ptr + slot + part, normalizer)
            if SPLIT != WHOLE:
                cast_ballot(ballots_ptr, winners_ptr, step + 1, slot + part, slots, best, row, logit, denominator)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def select_forward(
    rows_ptr,  # features: [B, N, C] by strides, or [T, C]
    quality_ptr,  # [R] float32, or None for the norms
    gamma_ptr,  # [1], or None for gamma_value
    gamma_value,
    noise_ptr,  # [K, R] float32, or None
    seed_ptr,  # [1] int64, or None
    seed_value: "i64",  # or negative: seed_ptr has it
    start_ptr,  # [B], or None
    mask_ptr,  # [R] bool, or None
    lengths_ptr,  # [B], or None
    cu_seqlens_ptr,  # [B + 1], or None
    order_ptr,  # [B], the sets in the order to start them in, or None
    picked_ptr,  # out [B, K, C]
    distances_ptr,  # out [B, K] float32
    indices_ptr,  # out [B, K] int64
    counts_ptr,  # out [B] int64
    normalizers_ptr,  # out [B, K] float32 (KEEP)
    gaps_ptr,  # out [K - 1, R] float32 (KEEP)
    norms_ptr,  # out [R] float32, the marks (KEEP or streaming)
    nearest_ptr,  # scratch [R] float32, the running gaps (streaming)
    ballots_ptr,  # scratch [2, B, parts, 3] float32 (split)
    winners_ptr,  # scratch [2, B, parts] int32 (split)
    admitted_ptr,  # scratch [B, parts] int32, pickable rows (split)
    openings_ptr,  # scratch [B, parts] float32, log-normalizers of step 0 (split, EARLY)
    barrier_ptr,  # [B] int32, zero: parts that arrived (split, cooperative)
    parts,
    turn,
    stride_set,
    stride_row,
    N,
    C,
    K,
    R: "i64",
    tau,
    scale,
    SEEDED: tl.constexpr,
    NORMALIZED: tl.constexpr,
    DISTINCT: tl.constexpr,
    KEEP: tl.constexpr,
    EARLY: tl.constexpr,  # the first pick needs no pass over the rows: K > 1, and a quality or a start is given
    TIER: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows at a time where only their qualities are read
):
    sets = tl.num_programs(0)
    part = 0
    set_id = tl.program_id(0)
    if SPLIT != WHOLE:
        sets = sets // parts
        part = set_id % parts
        set_id = set_id // parts
    if order_ptr is not None:
        set_id = tl.load(order_ptr + set_id).to(tl.int32)
    first, count, offset = locate(set_id, lengths_ptr, cu_seqlens_ptr, stride_set, stride_row, N, R)
    gamma = tl.cast(scalar(gamma_ptr, gamma_value), tl.float32)
    seed = (seed_ptr, seed_value)
    if TIER == RAGGED:
        resident = count <= BLOCK_N
    else:
        resident: tl.constexpr = TIER == RESIDENT_TIER
    if resident:
        forward_set(
            rows_ptr + offset, quality_ptr, gamma, noise_ptr, seed, start_ptr, mask_ptr, picked_ptr, distances_ptr,
            indices_ptr, counts_ptr, normalizers_ptr, gaps_ptr, norms_ptr, nearest_ptr, ballots_ptr, winners_ptr,
            admitted_ptr, openings_ptr, barrier_ptr, set_id, part, parts, sets, turn, first, count, stride_row, C, K, R,
            tau, scale, SEEDED, NORMALIZED, DISTINCT, KEEP, EARLY, True, SPLIT, BLOCK_N, BLOCK_C, BLOCK_P, BLOCK_R,
        )  # fmt: skip
    else:
        forward_set(
            rows_ptr + offset, quality_ptr, gamma, noise_ptr, seed, start_ptr, mask_ptr, picked_ptr, distances_ptr,
            indices_ptr, counts_ptr, normalizers_ptr, gaps_ptr, norms_ptr, nearest_ptr, ballots_ptr, winners_ptr,
            admitted_ptr, openings_ptr, barrier_ptr, set_id, part, parts, sets, turn, first, count, stride_row, C, K, R,
            tau, scale, SEEDED, NORMALIZED, DISTINCT, KEEP, EARLY, False, SPLIT, BLOCK_N, BLOCK_C, BLOCK_P, BLOCK_R,
        )  # fmt: skip
