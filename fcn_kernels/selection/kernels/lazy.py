"""Many picks from large sets without gradient: the picks of `forward.py`, to the bit, from few reads of the rows.

A running minimum only falls. What is known of a row from the picks that it has met bounds its score from above, and a
row whose bound is below an exact score need not be read (lazy evaluation, as in Minoux, "Accelerated greedy algorithms
for maximizing submodular set functions", 1978). There are two pieces: *scan*, a row to a thread, finds a part's best
exact score and its best bound, and *refresh* lets one row meet the picks that it has missed, a tile of picks at a time.

Parts exchange their best score and best bound. In a first round the row of the set's best bound is refreshed to its
end, so that there is an exact score, and each part meanwhile brings the rows near that bound forward, as far as its
budget goes: they are the next that will be asked for. If no bound reaches the best exact score, the pick is made. Else
all rows that do are refreshed in a second round, until they fall below it. Noise is another in each step: there a round
that only scans comes before, to find the best bound.
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

# Rounds of a step
LOOK = tl.constexpr(0)  # at the bounds, under noise
LEAD = tl.constexpr(1)  # one row to its end, others as far as the budget goes
SETTLE = tl.constexpr(2)
NEAR = tl.constexpr(1 / 128)  # how far below the best bound rows are brought forward
ROWS_A_TILE = tl.constexpr(48)  # of a part, for each tile of late picks in its budget


class Picks(NamedTuple):
    """What rows meet late. Part 0 writes the tables, which others see after the next exchange, so that each part has a
    copy of the newest pick, behind them."""

    directions: Any  # [B K + slots, C] float32
    squares: Any  # [B K + slots] float32, of NORMALIZED rows: see `direction_of`
    met: Any  # [R] int32, how many picks a row has met
    table: Any  # the set's first pick in the tables
    copy: Any  # the part's own copy of the newest


class Progress(NamedTuple):
    """How far a set is; the same in all its parts."""

    step: Any  # picks made
    round: Any  # of the step


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
def scan_rows(rows, part, state, picks, weights, step, exponent, BUILD: tl.constexpr):
    """A part's best exact score in step ``step``, and the best bound of a row that has missed a pick."""
    exact, bound = nobody(BUILD.BLOCK_R), nobody(BUILD.BLOCK_R)
    for begin in range(part.low, part.high, BUILD.BLOCK_R):  # @scalars
        n = begin + tl.arange(0, BUILD.BLOCK_R)
        inside = n < part.high
        norm = tl.load(state.norms + rows.first + n, mask=inside, other=-1.0)
        gap = tl.load(state.nearest + rows.first + n, mask=inside, other=0.0)
        met = tl.load(picks.met + rows.first + n, mask=inside, other=0)
        logits, score = scores_of(rows, n, norm > 0, norm, gap, weights, step, exponent, BUILD)
        allowed = (norm > 0) & (gap >= 0)
        known = (met == step) | (gap == 0)  # a gap of 0 cannot fall
        exact = update_best(exact, score, logits, n, allowed & known, exponent, 1.0, False)
        bound = update_best(bound, score, logits, n, allowed & (known == 0), exponent, 1.0, False)
    return reduce_best(exact, exponent, 1.0, False), reduce_best(bound, exponent, 1.0, False)


# --- refresh ---------------------------------------------------------------------------------------------------------


@triton.jit
def load_directions(rows, picks, place, missed, j: tl.constexpr, CHUNK: tl.constexpr):
    """Columns of chunk j of the picks at these places of the table, [m, c]. Other SMs wrote them: not from L1."""
    cols = j * CHUNK + tl.arange(0, CHUNK)
    at = place.to(tl.int64)[:, None] * rows.C + cols[None, :]
    mask = missed[:, None] & (cols < rows.C)[None, :]
    return tl.load(picks.directions + at, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def gap_to_picks(rows, picks, row, norm, met, step, BUILD: tl.constexpr):
    """The least gap of a row to the LATE picks from ``met`` on.

    Products are summed as `multiply_rows` sums them, with a tile of picks in the place of a tile of rows. The row is
    loaded for each of them, which gives the tile that one's layout, and so its order of summation.
    """
    pick = met + tl.arange(0, BUILD.LATE)
    missed = pick < step
    place = tl.where(pick == step - 1, picks.copy, picks.table + pick)
    n = tl.zeros_like(pick) + row
    dots = tl.zeros((BUILD.LATE, BUILD.CHUNK), tl.float32)  # [m, c]
    for j in tl.static_range(BUILD.CHUNKS):
        tile = load_chunk(rows, n, missed, j, BUILD)
        direction = load_directions(rows, picks, place, missed, j, BUILD.CHUNK)
        if BUILD.EUCLIDEAN:
            dots += (tile - direction) * (tile - direction)
        else:
            dots += tile * direction
    own = 1.0
    if BUILD.NORMALIZED:
        own = tl.load(picks.squares + place, mask=missed, other=0.0, cache_modifier=".cg")
    gap = fresh_gaps(n, norm, tl.sum(dots, axis=1), NO_ROW, own, BUILD)  # a pick itself is known to be 0 away
    return tl.min(tl.where(missed, gap, float("inf")), axis=0)


@triton.jit
def gap_of_extreme_row(rows, picks, state, row, norm, met, step, BUILD: tl.constexpr):
    """The same to one pick, for a row whose norm's square leaves float32's range."""
    place = tl.where(met == step - 1, picks.copy, picks.table + met)
    direction_ptr = picks.directions + place.to(tl.int64) * rows.C
    multiply_extreme_rows(rows, row, row + 1, state, direction_ptr, False, True, BUILD)
    own = 1.0
    if BUILD.NORMALIZED:
        own = tl.load(picks.squares + place, cache_modifier=".cg")
    return fresh_gaps(row, norm, tl.load(state.products + rows.first + row), NO_ROW, own, BUILD)


@triton.jit
def refresh_row(rows, picks, state, weights, row, step, floor, budget, exponent, factor, BUILD: tl.constexpr):
    """Let a row meet the picks that it has missed, until its bound is below ``floor``, or so many tiles of picks are
    done. A tile at least, so that it comes closer to its end. Returns the tiles."""
    norm = tl.load(state.norms + rows.first + row)
    gap = tl.load(state.nearest + rows.first + row)
    met = tl.load(picks.met + rows.first + row)
    tiles, going = 0, met < step
    while going:
        if BUILD.EUCLIDEAN:
            gap = tl.minimum(gap, gap_to_picks(rows, picks, row, norm, met, step, BUILD))
            met += BUILD.LATE
        elif is_extreme(norm):
            gap = tl.minimum(gap, gap_of_extreme_row(rows, picks, state, row, norm, met, step, BUILD))
            met += 1
        else:
            gap = tl.minimum(gap, gap_to_picks(rows, picks, row, norm, met, step, BUILD))
            met += BUILD.LATE
        tiles += 1
        _, score = scores_of(rows, row, True, norm, gap, weights, step, exponent, BUILD)
        going = (met < step) & (rescaled(score, factor) >= floor) & (tiles < budget)
    tl.debug_barrier()  # all have loaded what is stored here
    tl.store(state.nearest + rows.first + row, gap)
    tl.store(picks.met + rows.first + row, tl.minimum(met, step))
    tl.debug_barrier()
    return tiles


# --- a round ---------------------------------------------------------------------------------------------------------


@triton.jit
def better(one, other):
    """Whether a partial comes before another: the larger score, on ties the lower row."""
    ahead = (one.score > other.score) | ((one.score == other.score) & (one.row < other.row))
    return (one.row != NO_ROW) & (ahead | (other.row == NO_ROW))


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
def is_wanted(bound, exact, round, reaches, leader, budget):
    """Whether the row of a part's best bound is refreshed in this round, ``reaches``: if its floor lets it."""
    forward = (round == LEAD) & ((reaches & (budget > 0)) | (bound.row == leader))
    return (bound.row != NO_ROW) & (forward | ((round == SETTLE) & reaches & better(bound, exact)))


@triton.jit
def refresh_part(rows, part, state, picks, weights, step, round, floor, leader, largest, BUILD: tl.constexpr):
    """Refresh a part's rows, the best bound first: in LEAD the ``leader`` to its end, and others that reach ``floor``
    as far as the budget goes; in SETTLE all that could still win. Returns the best exact score and the best bound."""
    exponent = tl.load(state.exponents + part.slot + part.part)
    factor = unit_factor(exponent, largest)
    budget = tl.where(round == LEAD, tl.cdiv(part.high - part.low, ROWS_A_TILE), NO_ROW)
    exact, bound = scan_rows(rows, part, state, picks, weights, step, exponent, BUILD)
    while is_wanted(bound, exact, round, rescaled(bound.score, factor) >= floor, leader, budget):
        leads = bound.row == leader
        least = tl.where(leads, float("-inf"), floor)
        most = tl.where(leads, NO_ROW, budget)
        budget -= refresh_row(rows, picks, state, weights, bound.row, step, least, most, exponent, factor, BUILD)
        exact, bound = scan_rows(rows, part, state, picks, weights, step, exponent, BUILD)
    return exact, bound


@triton.jit
def take_turn(rows, part, out, state, shared, picks, rivals, weights, limit, at, turn, BUILD: tl.constexpr):
    """What a part does from one exchange to the next: make the pick if it is decided, and refresh."""
    step, round = at.step, at.round + 1
    best, bound, next_best, pickable = merge_parts(shared, rivals, part, turn, BUILD)
    if (bound.row == NO_ROW) | (bound.score < best.score) | (at.round == SETTLE):  # it is decided
        there = make_pick(rows, part, out, state, picks, best, step, tl.minimum(pickable, limit), BUILD)
        step = tl.where(there, step + 1, out.steps)
        round = LEAD
        if BUILD.SEEDED or rows.noise is not None:
            round = LOOK
        bound = next_best  # an exact score is a bound now
    floor, leader = best.score, NO_ROW
    if round == LEAD:
        floor, leader = bound.score - tl.abs(bound.score) * NEAR, bound.row
    if step < out.steps:
        exact, bound = refresh_part(rows, part, state, picks, weights, step, round, floor, leader, best.exponent, BUILD)
        # the bound in the denominator's place
        exact = Partial(exact.score, exact.row, exact.logit, bound.score, exact.exponent)
        store_partial(shared, part, turn + 1, exact)
        tl.store(rivals + ((turn + 1) % 2) * part.slots + part.slot + part.part, bound.row)
    return Progress(step, round)


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
    picks = Picks(tables_ptr, squares_ptr, met_ptr, set_id * K, sets * K + slot)
    weights = Weights(finite_or_nan(scalar(gamma_ptr, gamma_value)), scale)
    limit = picks_of(set_id, limits_ptr, K)
    at = Progress(begin, LOOK)
    mine_to_do = (rows.count > above) & (rows.count <= longest)
    if BUILD.SPLIT == LAUNCHES:
        if turn > 0:
            at = Progress(tl.load(progress_ptr + slot * 2), tl.load(progress_ptr + slot * 2 + 1))
        if mine_to_do & (at.step < K):
            at = take_turn(rows, mine, out, state, shared, picks, rivals_ptr, weights, limit, at, begin + turn, BUILD)
            tl.debug_barrier()  # all have loaded what is stored here
            tl.store(progress_ptr + slot * 2, at.step)
            tl.store(progress_ptr + slot * 2 + 1, at.round)
    else:
        phase = barrier_phase(barrier_ptr + set_id)
        while mine_to_do & (at.step < K):
            if turn > 0:
                phase = grid_barrier(barrier_ptr + set_id, mine.part, parts, phase)
            at = take_turn(rows, mine, out, state, shared, picks, rivals_ptr, weights, limit, at, begin + turn, BUILD)
            turn += 1
