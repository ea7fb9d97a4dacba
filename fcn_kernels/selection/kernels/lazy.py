"""Many picks from large sets without gradient: the picks of `forward.py`, to the bit, from few reads of the rows.

A running minimum only falls. What is known of a row from the picks that it has met bounds its score from above, and a
row whose bound is below an exact score need not be read (lazy evaluation, as in Minoux, "Accelerated greedy algorithms
for maximizing submodular set functions", 1978). There are three pieces: *scan*, a row to a thread, finds a part's best
exact score and its best bound; *collect* lists the rows whose bound reaches a floor; *refresh* lets them meet the picks
that they have missed, a tile of rows at a time, so that a pick is loaded once for all of the tile.

Parts exchange their best score and best bound. The floor lies a little below the best bound, and stays where it is as
long as a row reaches it: what reaches it has then missed the newest pick alone. If no bound reaches the best exact
score, the pick is made. Else the floor is lowered. Noise is another in each step: there a round that only scans comes
before, to find the best bound.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fcn_kernels.device.rows import Layout, load_row
from fcn_kernels.device.splits import LAUNCHES, barrier_phase, grid_barrier
from fcn_kernels.selection.kernels.common import (
    NO_ROW,
    TAKEN,
    UNSPECIALIZED,
    Part,
    Rows,
    Weights,
    add_noise,
    bounds_of,
    finite_or_nan,
    is_extreme,
    load_earlier,
    load_vector,
    noise_unit,
    picks_of,
    place_of,
    scalar,
    times_power_of_two,
    weight_of,
)
from fcn_kernels.selection.kernels.forward import (
    Out,
    Partial,
    Shared,
    State,
    common_unit,
    direction_of,
    fresh_gaps,
    load_chunk,
    load_norm,
    load_partials,
    multiply_extreme_rows,
    nobody,
    reduce_best,
    rescaled,
    store_partial,
    store_pick,
    unit_factor,
    update_best,
)

NEAR = tl.constexpr(1 / 512)  # how far below the best bound a new floor is
WINDOW = tl.constexpr(16)  # picks that rows meet before it is asked again which of them still reach the floor


class Picks(NamedTuple):
    """What rows meet late. Part 0 writes the tables, which others see after the next exchange, so that each part has a
    copy of the newest pick, behind them."""

    directions: Any  # [B K + slots, C] float32
    squares: Any  # [B K + slots] float32, of NORMALIZED rows: see `direction_of`
    met: Any  # [R] int32, how many picks a row has met
    table: Any  # the set's first pick in the tables
    copy: Any  # the part's own copy of the newest
    waiting: Any  # [R] int32, a part's rows that are to meet picks


class Progress(NamedTuple):
    """How far a set is; the same in all its parts."""

    step: Any  # picks made
    floor: Any  # the score from which on rows meet all picks


# --- scan ------------------------------------------------------------------------------------------------------------


@triton.jit
def scores_of(rows, n, allowed, norm, gap, weights, step, exponent, BUILD: tl.constexpr):
    """(logits, scores) [n] in step ``step`` for these gaps, as `score_rows` makes them."""
    quality = norm
    if rows.quality is not None:
        quality = tl.load(rows.quality + rows.first + n, mask=allowed, other=1.0)
    logits = gap * weight_of(weights, tl.where(allowed, quality, 1.0), exponent)
    if rows.earlier is not None:
        logits = tl.minimum(logits, times_power_of_two(load_earlier(rows, n, allowed), -exponent))
    return logits, add_noise(logits, rows, n, allowed, step, noise_unit(exponent), BUILD.SEEDED)


@triton.jit
def look_at_rows(rows, part, begin, state, picks, weights, step, exponent, BUILD: tl.constexpr):
    """What is known of a block of a part's rows [n] in step ``step``: (rows, logits, scores, picks met, whether the
    score is exact, whether it is a bound)."""
    n = begin + tl.arange(0, BUILD.BLOCK_R)
    inside = n < part.high
    norm = tl.load(state.norms + rows.first + n, mask=inside, other=-1.0)
    gap = tl.load(state.nearest + rows.first + n, mask=inside, other=0.0)
    met = tl.load(picks.met + rows.first + n, mask=inside, other=0)
    logits, score = scores_of(rows, n, norm > 0, norm, gap, weights, step, exponent, BUILD)
    allowed = (norm > 0) & (gap >= 0)
    known = (met == step) | (gap == 0)  # a gap of 0 cannot fall
    return n, logits, score, met, allowed & known, allowed & (known == 0)


@triton.jit
def scan_rows(rows, part, state, picks, weights, step, exponent, BUILD: tl.constexpr):
    """A part's best exact score in step ``step``, and the best bound of a row that has missed a pick."""
    best, bound = nobody(BUILD.BLOCK_R), nobody(BUILD.BLOCK_R)
    for begin in range(part.low, part.high, BUILD.BLOCK_R):  # @scans
        n, logits, score, _, exact, stale = look_at_rows(
            rows, part, begin, state, picks, weights, step, exponent, BUILD
        )
        best = update_best(best, score, logits, n, exact, exponent, 1.0, False)
        bound = update_best(bound, score, logits, n, stale, exponent, 1.0, False)
    return reduce_best(best, exponent, 1.0, False), reduce_best(bound, exponent, 1.0, False)


@triton.jit
def collect_rows(rows, part, state, picks, weights, step, until, floor, leader, exponent, factor, BUILD: tl.constexpr):
    """List a part's rows that are to meet picks: their bound reaches ``floor``, or they are the ``leader``; of them
    those that have met fewer than ``until``. Returns how many, and the fewest picks that another of them has met."""
    count = 0
    later = tl.full((BUILD.BLOCK_R,), NO_ROW, tl.int32)
    for begin in range(part.low, part.high, BUILD.BLOCK_R):  # @collects
        n, _, score, met, _, stale = look_at_rows(rows, part, begin, state, picks, weights, step, exponent, BUILD)
        wanted = stale & ((rescaled(score, factor) >= floor) | (n == leader))
        taken = (wanted & (met < until)).to(tl.int32)
        place = count + tl.cumsum(taken, axis=0) - 1
        tl.store(picks.waiting + rows.first + part.low + place, n, mask=taken > 0)
        count += tl.sum(taken, axis=0)
        later = tl.minimum(later, tl.where(wanted & (met >= until), met, NO_ROW))
    tl.debug_barrier()  # the list is read by other threads
    return count, tl.min(later, axis=0)


# --- refresh ---------------------------------------------------------------------------------------------------------


@triton.jit
def place_of_pick(picks, pick, step):
    """Where a pick is in the tables. What is there other SMs wrote: it is not loaded from L1."""
    return tl.where(pick == step - 1, picks.copy, picks.table + pick)


@triton.jit
def direction_at(rows, picks, pick, step):
    """Where the direction of a pick is."""
    return picks.directions + place_of_pick(picks, pick, step).to(tl.int64) * rows.C


@triton.jit
def load_square(picks, pick, step, BUILD: tl.constexpr):
    """Of NORMALIZED rows, a pick's product with itself."""
    own = 1.0
    if BUILD.NORMALIZED:
        own = tl.load(picks.squares + place_of_pick(picks, pick, step), cache_modifier=".cg")
    return own


@triton.jit
def meet_picks(rows, picks, n, inside, norm, gap, begin, until, step, BUILD: tl.constexpr):
    """The gaps [n] of a tile of rows after picks [begin, until), products summed as `multiply_rows` sums them.

    Gaps fall where products with a pick's unit vector rise, rounding included: the largest product has the least gap.
    """
    ahead = load_vector(direction_at(rows, picks, begin, step), rows.C, BUILD, ".cg")
    tiles = ()
    for j in tl.static_range(BUILD.CHUNKS):
        tiles = tiles + (load_chunk(rows, n, inside, j, BUILD),)
    nearest = tl.full((BUILD.LATE,), float("inf") if BUILD.EUCLIDEAN else float("-inf"), tl.float32)
    for pick in range(begin, until):  # @picks
        directions = ahead
        next_ptr = direction_at(rows, picks, tl.minimum(pick + 1, until - 1), step)
        ahead = load_vector(next_ptr, rows.C, BUILD, ".cg")
        dots = tl.zeros((BUILD.LATE, BUILD.CHUNK), tl.float32)  # [n, c]
        for j in tl.static_range(BUILD.CHUNKS):
            if BUILD.EUCLIDEAN:
                dots += (tiles[j] - directions[j]) * (tiles[j] - directions[j])
            else:
                dots += tiles[j] * directions[j]
        product = tl.sum(dots, axis=1)
        if BUILD.EUCLIDEAN:
            nearest = tl.minimum(nearest, product)
        elif BUILD.NORMALIZED:  # of such rows duplicates are 0 away
            own = load_square(picks, pick, step, BUILD)
            gap = tl.minimum(gap, fresh_gaps(n, norm, product, NO_ROW, own, BUILD))
        else:
            nearest = tl.maximum(nearest, product)
    if not BUILD.NORMALIZED:
        gap = tl.minimum(gap, fresh_gaps(n, norm, nearest, NO_ROW, 1.0, BUILD))
    return gap


@triton.jit
def meet_picks_extremely(rows, picks, state, row, until, step, BUILD: tl.constexpr):
    """Let a row meet picks up to ``until`` whose norm's square leaves float32's range, if it does."""
    norm = tl.load(state.norms + rows.first + row)
    if is_extreme(norm):
        gap = tl.load(state.nearest + rows.first + row)
        for pick in range(tl.load(picks.met + rows.first + row), until):
            direction_ptr = direction_at(rows, picks, pick, step)
            multiply_extreme_rows(rows, row, row + 1, state, direction_ptr, False, True, BUILD)
            product = tl.load(state.products + rows.first + row)
            own = load_square(picks, pick, step, BUILD)
            gap = tl.minimum(gap, fresh_gaps(row, norm, product, NO_ROW, own, BUILD))
        tl.debug_barrier()  # all have loaded what is stored here
        tl.store(state.nearest + rows.first + row, gap)


@triton.jit
def refresh_rows(rows, part, state, picks, count, until, step, BUILD: tl.constexpr):
    """Let the ``count`` rows that are listed meet the picks that they have missed, up to ``until``."""
    for at in range(0, count, BUILD.LATE):  # @refreshes
        place = at + tl.arange(0, BUILD.LATE)
        inside = place < count
        n = tl.load(picks.waiting + rows.first + part.low + place, mask=inside, other=0)
        norm = tl.load(state.norms + rows.first + n, mask=inside, other=1.0)
        gap = tl.load(state.nearest + rows.first + n, mask=inside, other=0.0)
        met = tl.load(picks.met + rows.first + n, mask=inside, other=NO_ROW)
        fresh = meet_picks(rows, picks, n, inside, norm, gap, tl.min(met, axis=0), until, step, BUILD)
        gap = tl.where(is_extreme(norm), gap, fresh)
        tl.debug_barrier()  # all have loaded what is stored here
        tl.store(state.nearest + rows.first + n, gap, mask=inside)
        if not BUILD.EUCLIDEAN:
            if tl.max(is_extreme(norm).to(tl.int32), axis=0) > 0:
                for one in range(at, tl.minimum(at + BUILD.LATE, count)):
                    row = tl.load(picks.waiting + rows.first + part.low + one)
                    meet_picks_extremely(rows, picks, state, row, until, step, BUILD)
                tl.debug_barrier()
        tl.store(picks.met + rows.first + n, tl.zeros_like(n) + until, mask=inside)
    tl.debug_barrier()


# --- a round ---------------------------------------------------------------------------------------------------------


@triton.jit
def merge_parts(shared, rivals, part, turn, BUILD: tl.constexpr):
    """From what its parts left, a set's best exact score, its best bound, and the best of both beside the former; in
    the largest unit of its parts. And how many rows may be picked."""
    each, at, there, count = load_partials(shared, part, turn, BUILD)
    row = each.row
    rival = tl.load(rivals + at, mask=there, other=NO_ROW, cache_modifier=".cg")  # as there
    exponent, factor = common_unit(each.exponent, (row != NO_ROW) | (rival != NO_ROW))
    score = tl.where(row != NO_ROW, rescaled(each.score, factor), float("-inf"))
    bound = tl.where(rival != NO_ROW, rescaled(each.denominator, factor), float("-inf"))  # see `take_turn`
    nothing = tl.zeros_like(score)
    best = reduce_best(Partial(score, row, each.logit * factor, nothing, exponent), exponent, 1.0, False)
    bounds = reduce_best(Partial(bound, rival, nothing, nothing, exponent), exponent, 1.0, False)
    left = (row != NO_ROW) & (row != best.row) & ((score >= bound) | (rival == NO_ROW))
    left_score, left_row = tl.where(left, score, bound), tl.where(left, row, rival)
    next_best = reduce_best(Partial(left_score, left_row, nothing, nothing, exponent), exponent, 1.0, False)
    return best, bounds, next_best, count


@triton.jit
def make_pick(rows, part, out, state, picks, best, step, count, BUILD: tl.constexpr):
    """Write pick ``step`` where it can be found: by the caller, by rows that meet it, and in what is known of its row.
    Returns whether there was one; if not, there will be none, and all that are missing are written."""
    cols = tl.arange(0, BUILD.BLOCK_C)
    there = (step < count) & (best.row != NO_ROW)
    values = load_row(rows.features, best.row, there, rows.stride, cols, rows.C)
    if part.part == 0:
        for at in range(step, tl.where(there, step + 1, out.steps)):  # @written
            store_pick(rows, out, best, at, there, values, count, BUILD)
    norm = load_norm(rows, state, best.row, there)
    direction, own = direction_of(values.to(tl.float32), norm, there, BUILD)
    tl.debug_barrier()  # all have read what is stored here
    tl.store(picks.directions + picks.copy.to(tl.int64) * rows.C + cols, direction, mask=cols < rows.C)
    if part.part == 0:
        at = (picks.table + step).to(tl.int64)
        tl.store(picks.directions + at * rows.C + cols, direction, mask=cols < rows.C)
    if BUILD.NORMALIZED:
        tl.store(picks.squares + picks.copy, own)
        if part.part == 0:
            tl.store(picks.squares + picks.table + step, own)
    if there & (best.row >= part.low) & (best.row < part.high):
        tl.store(state.nearest + rows.first + best.row, TAKEN if BUILD.DISTINCT else 0.0)
    tl.debug_barrier()
    return there


@triton.jit
def refresh_part(rows, part, state, picks, weights, step, floor, kept, leader, largest, BUILD: tl.constexpr):
    """Refresh a part's rows that reach ``floor``, a window of picks after the other, until they have met all or no
    longer reach it; the ``leader`` to its end. Those that reached a floor that is ``kept`` have missed no pick but the
    newest. Returns the best exact score and the best bound."""
    exponent = tl.load(state.exponents + part.slot + part.part)
    factor = unit_factor(exponent, largest)
    until = tl.where(kept, step, 0)
    going = True
    while going:
        count, later = collect_rows(
            rows, part, state, picks, weights, step, until, floor, leader, exponent, factor, BUILD
        )
        refresh_rows(rows, part, state, picks, count, until, step, BUILD)
        going = (later != NO_ROW) | ((count > 0) & (until < step))
        until = tl.minimum(tl.where((count == 0) & going, later, until) + WINDOW, step)
    return scan_rows(rows, part, state, picks, weights, step, exponent, BUILD)


@triton.jit
def take_turn(rows, part, out, state, shared, picks, rivals, weights, limit, at, turn, BUILD: tl.constexpr):
    """What a part does from one exchange to the next: make the pick if it is decided, and refresh."""
    step, floor = at.step, at.floor
    best, bound, next_best, pickable = merge_parts(shared, rivals, part, turn, BUILD)
    kept = False
    if (bound.row == NO_ROW) | (bound.score < best.score):  # it is decided
        there = make_pick(rows, part, out, state, picks, best, step, tl.minimum(pickable, limit), BUILD)
        step = tl.where(there, step + 1, out.steps)
        if BUILD.SEEDED or rows.noise is not None:
            floor, leader = float("inf"), NO_ROW  # a round to look at the bounds
        else:
            kept, leader = floor <= next_best.score, next_best.row  # an exact score is a bound now
            below = next_best.score - tl.abs(next_best.score) * NEAR
            floor = tl.where(kept, tl.maximum(floor, below), below)
    else:
        leader = bound.row
        below = bound.score - tl.abs(bound.score) * NEAR
        lowest = best.score  # all that could still win; of many that could, most would be read in vain
        if BUILD.SPLIT != LAUNCHES and not (BUILD.SEEDED or rows.noise is not None):
            lowest = tl.maximum(lowest, below)
        floor = tl.where(floor == float("inf"), below, tl.minimum(floor, lowest))
    if step < out.steps:
        exact, bound = refresh_part(rows, part, state, picks, weights, step, floor, kept, leader, best.exponent, BUILD)
        # the bound in the denominator's place
        exact = Partial(exact.score, exact.row, exact.logit, bound.score, exact.exponent)
        store_partial(shared, part, turn + 1, exact)
        tl.store(rivals + ((turn + 1) % 2) * part.slots + part.slot + part.part, bound.row)
    return Progress(step, floor)


# --- the launch ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "begin"])
def select_lazily(
    rows_ptr,  # as in `select_forward`, and left by its launches, which made the picks before ``begin``
    quality_ptr,
    gamma_ptr,
    gamma_value,
    noise_ptr,
    seed_ptr,
    seed_value: "i64",
    lengths_ptr,
    cu_seqlens_ptr,
    limits_ptr,
    earlier_ptr,
    picked_ptr,
    distances_ptr,
    indices_ptr,
    counts_ptr,
    norms_ptr,
    products_ptr,
    nearest_ptr,
    exponents_ptr,
    numbers_ptr,
    winners_ptr,
    pickable_ptr,
    barrier_ptr,
    tables_ptr,  # see `Picks`
    squares_ptr,
    met_ptr,  # [R] int32, ``begin`` of all rows
    waiting_ptr,  # [R] int32
    rivals_ptr,  # [2, slots] int32, NO_ROW: the rows of the parts' best bounds
    progress_ptr,  # [slots, 2] int32: `Progress`, from launch to launch
    sets,
    parts,
    turn,
    begin,
    stride_set,
    stride_row,
    N,
    C,
    K,
    R: "i64",
    above,
    longest,
    scale,
    BUILD: tl.constexpr,  # see `Constants`
):
    set_id = tl.program_id(0) // parts
    layout = Layout(sets, lengths_ptr, cu_seqlens_ptr, stride_set, stride_row, N, R)
    seed = (seed_ptr, seed_value)
    x_ptr, first, count = place_of(set_id, rows_ptr, layout, BUILD)
    rows = Rows(x_ptr, stride_row, C, R, set_id, first, count, quality_ptr, None, earlier_ptr, noise_ptr, seed)
    part = tl.program_id(0) % parts
    low, high = bounds_of(count, part, parts, BUILD)
    mine = Part(low, high, part, parts, set_id * parts, sets * parts, barrier_ptr)
    out = Out(picked_ptr, distances_ptr, indices_ptr, counts_ptr, None, None, None, None, K)
    state = State(norms_ptr, products_ptr, nearest_ptr, None, exponents_ptr, None)
    shared = Shared(numbers_ptr, winners_ptr, pickable_ptr, None)
    slot = mine.slot + mine.part
    picks = Picks(tables_ptr, squares_ptr, met_ptr, set_id * K, sets * K + slot, waiting_ptr)
    weights = Weights(finite_or_nan(scalar(gamma_ptr, gamma_value)), scale)
    limit = picks_of(set_id, limits_ptr, K)
    at = Progress(begin, float("inf"))
    mine_to_do = (rows.count > above) & (rows.count <= longest)
    if BUILD.SPLIT == LAUNCHES:
        if turn > 0:
            floor = tl.load(progress_ptr + slot * 2 + 1).to(tl.float32, bitcast=True)
            at = Progress(tl.load(progress_ptr + slot * 2), floor)
        if mine_to_do & (at.step < K):
            at = take_turn(rows, mine, out, state, shared, picks, rivals_ptr, weights, limit, at, begin + turn, BUILD)
            tl.debug_barrier()  # all have loaded what is stored here
            tl.store(progress_ptr + slot * 2, at.step)
            tl.store(progress_ptr + slot * 2 + 1, tl.cast(at.floor, tl.float32).to(tl.int32, bitcast=True))
    else:
        phase = barrier_phase(barrier_ptr + set_id)
        while mine_to_do & (at.step < K):
            if turn > 0:
                phase = grid_barrier(barrier_ptr + set_id, mine.part, parts, phase)
            at = take_turn(rows, mine, out, state, shared, picks, rivals_ptr, weights, limit, at, begin + turn, BUILD)
            turn += 1
