"""The forward kernel: all K steps of a set, in one program or in several that each have a part of its rows.

A step ends one pick and makes the scores of the next, in two loops. The *tile loop* reads the rows and stores their
products with the pick; the pass that first sees them stores their norms, too. The *scalar loop* updates the running
minimum of the distances, a row to a thread, and finds the best score. Rows are read K - 1 times where a quality or a
start is given, else K times, from L1 or L2 while the set fits there. A set of one tile is read once, and held.

Where squared distances are asked for, these stand for the products, and rows have no norms but 1.

Each step reduces rows to a `Partial`. Partials merge, so that a set may be split between programs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fcn_kernels.device.rows import Layout, load_row, next_set, set_of
from fcn_kernels.device.splits import COOPERATIVE, LAUNCHES, WHOLE, barrier_phase, grid_barrier
from fcn_kernels.selection.kernels.common import (
    MOST_GAP,
    MOST_LOG2,
    NO_ROW,
    SAME_COSINE,
    TAKEN,
    UNSPECIALIZED,
    Part,
    Rows,
    Weights,
    add_noise,
    bounds_of,
    distance_of,
    downscale_of,
    finite_or_nan,
    is_extreme,
    is_usable_norm,
    load_earlier,
    log2_weight,
    noise_unit,
    opening_logits,
    picks_of,
    place_of,
    scalar,
    softmax_term,
    times_power_of_two,
    weight_of,
)


class Out(NamedTuple):
    """The results."""

    picked: Any  # [B, K, C]
    distances: Any  # [B, K] float32
    indices: Any  # [B, K] int64
    counts: Any  # [B] int64
    softmax: Any  # [B, K, 3] float32 (KEEP): peak, denominator and unit's exponent of each step
    gaps: Any  # [K - 1, R] float32 (KEEP): the gap to the nearest pick, the sign bit set where a step tied
    least: Any  # [R] float32 (STATE): distances to the nearest pick
    owners: Any  # [R] int64 (STATE): its number, set to -1 by the host
    steps: Any  # K


class State(NamedTuple):
    """What stands in memory between the loops and the steps."""

    norms: Any  # [R] float32, a result where KEEP: -1 of rows that may not be picked, NaN of those without a direction
    products: Any  # [R] float32; of rows with extreme norms, cosines; EUCLIDEAN: squared distances
    nearest: Any  # [R] float32, the running minimum of the gap; before it, scores of the first pick
    directions: Any  # [slots, C] float32, the pick's unit vector; EUCLIDEAN: the pick
    exponents: Any  # [slots] int32: a part's distances are in units of 2^exponent
    extremes: Any  # [slots] int32: how many of its rows have extreme norms


class Shared(NamedTuple):
    """By which parts exchange their partials."""

    numbers: Any  # [2, slots, 4] float32, of even and odd steps: score, logit, denominator, exponent
    winners: Any  # [2, slots] int32
    pickable: Any  # [slots] int32
    openings: Any  # [slots] float32, denominators of step 0 (EARLY)


class Partial(NamedTuple):
    """What a step needs of some rows: the best score, its row, its logit, the softmax's denominator, their unit."""

    score: Any
    row: Any  # NO_ROW if none may be picked
    logit: Any
    denominator: Any
    exponent: Any


@triton.jit
def may_be_picked(rows, quality, n, inside):
    """Whether rows [n] take part and are of usable quality; their features are another matter."""
    good = inside & (quality > 0) & (quality < float("inf"))
    if rows.mask is not None:
        good = good & tl.load(rows.mask + rows.first + n, mask=inside, other=0).to(tl.int1)
    if rows.earlier is not None:
        good = good & (tl.load(rows.earlier + rows.first + n, mask=inside, other=-1.0) >= 0)
    return good


# --- the tile loop ---------------------------------------------------------------------------------------------------


@triton.jit
def chunk_of(rows, n, inside, j: tl.constexpr, BUILD: tl.constexpr):
    """Where columns of chunk j of rows n are, [n, c], and which there are."""
    cols = j * BUILD.CHUNK + tl.arange(0, BUILD.CHUNK)
    stride, mask = rows.stride, inside[:, None] & (cols < rows.C)[None, :]
    if BUILD.TIGHT:
        stride, mask = BUILD.CHUNK, inside[:, None]
    return rows.features + (n.to(tl.int64)[:, None] * stride + cols[None, :]), mask


@triton.jit
def load_chunk(rows, n, inside, j: tl.constexpr, BUILD: tl.constexpr):
    """Columns of chunk j of a tile, [n, c] float32. With 512 bytes to a chunk a row's sum stays within a warp."""
    at, mask = chunk_of(rows, n, inside, j, BUILD)
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def hold_rows(rows, high, BUILD: tl.constexpr):
    """HELD: a set's only tile, in chunks [n, c] as stored; else nothing."""
    held = ()
    if BUILD.HELD:
        n = tl.arange(0, BUILD.BLOCK_N)
        for j in tl.static_range(BUILD.CHUNKS):
            at, mask = chunk_of(rows, n, n < high, j, BUILD)
            held = held + (tl.load(at, mask=mask, other=0.0),)
    return held


@triton.jit
def load_direction(rows, direction_ptr, j: tl.constexpr, CHUNK: tl.constexpr):
    """Columns of chunk j of the pick's unit vector, [1, c]."""
    cols = j * CHUNK + tl.arange(0, CHUNK)
    return tl.load(direction_ptr + cols, mask=cols < rows.C, other=0.0)[None, :]


@triton.jit
def multiply_rows(
    rows, low, high, held, state, direction_ptr, MEASURE: tl.constexpr, MULTIPLY: tl.constexpr, BUILD: tl.constexpr
):
    """Norms and products with the pick's unit vector; returns how many norms have to be made again."""
    extreme = tl.zeros((BUILD.BLOCK_N,), tl.int32)
    directions = ()
    if MULTIPLY:
        for j in tl.static_range(BUILD.CHUNKS):
            directions = directions + (load_direction(rows, direction_ptr, j, BUILD.CHUNK),)
    for begin in range(low, high, BUILD.BLOCK_N):  # @tiles
        n = begin + tl.arange(0, BUILD.BLOCK_N)
        inside = n < high
        dots = tl.zeros((BUILD.BLOCK_N, BUILD.CHUNK), tl.float32)  # [n, c]
        squares = tl.zeros((BUILD.BLOCK_N, BUILD.CHUNK), tl.float32)  # [n, c]
        for j in tl.static_range(BUILD.CHUNKS):
            if BUILD.HELD:
                tile = held[j].to(tl.float32)
            else:
                tile = load_chunk(rows, n, inside, j, BUILD)
            if MULTIPLY:
                if BUILD.EUCLIDEAN:
                    dots += (tile - directions[j]) * (tile - directions[j])
                else:
                    dots += tile * directions[j]
            if MEASURE:
                if BUILD.EUCLIDEAN:
                    squares += tile - tile  # NaN of a number that is not finite
                else:
                    squares += tile * tile
        if MULTIPLY:
            tl.store(state.products + rows.first + n, tl.sum(dots, axis=1), mask=inside)
        if MEASURE:
            norm = tl.sqrt_rn(tl.sum(squares, axis=1))  # [n]
            if BUILD.EUCLIDEAN:
                norm += 1
            extreme += (inside & is_extreme(norm)).to(tl.int32)
            tl.store(state.norms + rows.first + n, norm, mask=inside)
    tl.debug_barrier()  # the scalar loop reads by other threads
    return tl.sum(extreme, axis=0)


@triton.jit
def scaled_norms(rows, n, inside, BUILD: tl.constexpr):
    """Of rows that are divided by a power of two: (their norms, those of the divided, the power's inverse) [n]."""
    largest = tl.zeros_like(n).to(tl.float32)
    for j in tl.static_range(BUILD.CHUNKS):
        largest = tl.maximum(largest, tl.max(tl.abs(load_chunk(rows, n, inside, j, BUILD)), axis=1))
    down = downscale_of(largest)
    squares = tl.zeros_like(largest)
    for j in tl.static_range(BUILD.CHUNKS):
        tile = load_chunk(rows, n, inside, j, BUILD) * down[:, None]
        squares += tl.sum(tile * tile, axis=1)
    length = tl.sqrt_rn(squares)
    return tl.where((largest > 0) & (largest < float("inf")), length / down, float("nan")), length, down


@triton.jit
def multiply_extreme_rows(
    rows, low, high, state, direction_ptr, MEASURE: tl.constexpr, MULTIPLY: tl.constexpr, BUILD: tl.constexpr
):
    """Again, for rows of extreme norms: of rows that are divided by a power of two. Cosines instead of products."""
    for begin in range(low, high, BUILD.BLOCK_N):
        n = begin + tl.arange(0, BUILD.BLOCK_N)
        inside = n < high
        norm = tl.load(state.norms + rows.first + n, mask=inside, other=-1.0)
        again = is_extreme(norm)
        if tl.max(again.to(tl.int32), axis=0) > 0:
            norm, length, down = scaled_norms(rows, n, again, BUILD)
            tl.debug_barrier()
            if MULTIPLY:
                dots = tl.zeros((BUILD.BLOCK_N,), tl.float32)
                for j in tl.static_range(BUILD.CHUNKS):
                    tile = load_chunk(rows, n, again, j, BUILD) * down[:, None]
                    dots += tl.sum(tile * load_direction(rows, direction_ptr, j, BUILD.CHUNK), axis=1)
                tl.store(state.products + rows.first + n, dots / length, mask=again)
            if MEASURE:
                tl.store(state.norms + rows.first + n, norm, mask=again)
    tl.debug_barrier()


# --- the scalar loop -------------------------------------------------------------------------------------------------


@triton.jit
def nobody(BLOCK: tl.constexpr):
    """Partials [n] of no rows."""
    zero = tl.zeros((BLOCK,), tl.float32)
    return Partial(zero - float("inf"), tl.full((BLOCK,), NO_ROW, tl.int32), zero, zero, 0)


@triton.jit
def update_best(best, score, logits, n, allowed, exponent, tau, KEEP: tl.constexpr):
    """Each thread's best so far [n], with the rows n; lower rows come first, so that they keep a tie."""
    won = allowed & ((score > best.score) | (best.row == NO_ROW))
    peak = tl.where(won, score, best.score)
    denominator = best.denominator
    if KEEP:
        denominator = denominator * softmax_term(best.score, peak, exponent, tau)
        denominator += tl.where(allowed, softmax_term(score, peak, exponent, tau), 0.0)
    return Partial(peak, tl.where(won, n, best.row), tl.where(won, logits, best.logit), denominator, best.exponent)


@triton.jit
def reduce_best(best, exponent, tau, KEEP: tl.constexpr):
    """One partial of those [n] of threads or parts: the best score, of equal ones that of the lowest row."""
    score = tl.max(best.score, axis=0)
    row = tl.min(tl.where(best.score == score, best.row, NO_ROW), axis=0)
    logit = tl.sum(tl.where((best.row == row) & (best.row != NO_ROW), best.logit, 0.0), axis=0)
    denominator = 0.0
    if KEEP:
        denominator += tl.sum(best.denominator * softmax_term(best.score, score, exponent, tau), axis=0)
    return Partial(score, row, logit, denominator, exponent)


@triton.jit
def first_pick(rows, low, high, state, above, above_row, SAVE: tl.constexpr, BUILD: tl.constexpr):
    """The best by quality alone among rows [low, high) that come after (above, above_row); SAVE the scores."""
    best = nobody(BUILD.BLOCK_R)
    for begin in range(low, high, BUILD.BLOCK_R):  # @first
        n = begin + tl.arange(0, BUILD.BLOCK_R)
        inside = n < high
        quality = tl.load(rows.quality + rows.first + n, mask=inside, other=-1.0)
        logits = opening_logits(rows, quality, n, inside)
        score = add_noise(logits, rows, n, inside, 0, 1.0, BUILD.SEEDED)
        if SAVE:
            tl.store(state.nearest + rows.first + n, score, mask=inside)
        allowed = may_be_picked(rows, quality, n, inside)
        allowed = allowed & ((score < above) | ((score == above) & (n > above_row)))
        best = update_best(best, score, logits, n, allowed, 0, 1.0, False)
    return reduce_best(best, 0, 1.0, False)


@triton.jit
def admit_rows(
    rows, low, high, state, weights, slot, peak, tau, SCORE: tl.constexpr, SAVED: tl.constexpr, BUILD: tl.constexpr
):
    """After the pass that first saw the rows: marks in the norms, and the unit of the part's distances.

    Returns (how many may be picked, the first pick's partial if SCORE, its softmax's sum if scores were SAVED).
    """
    best = nobody(BUILD.BLOCK_R)
    pickable = tl.zeros((BUILD.BLOCK_R,), tl.int32)
    lowest = tl.full((BUILD.BLOCK_R,), 1e30, tl.float32)
    highest = tl.full((BUILD.BLOCK_R,), -1e30, tl.float32)
    total = tl.zeros((BUILD.BLOCK_R,), tl.float32)
    for begin in range(low, high, BUILD.BLOCK_R):  # @scalars
        n = begin + tl.arange(0, BUILD.BLOCK_R)
        inside = n < high
        norm = tl.load(state.norms + rows.first + n, mask=inside, other=-1.0)
        quality = norm
        if rows.quality is not None:
            quality = tl.load(rows.quality + rows.first + n, mask=inside, other=-1.0)
        sound = is_usable_norm(norm)
        allowed = may_be_picked(rows, quality, n, inside) & sound
        mark = tl.where(sound, tl.where(allowed, norm, -1.0), float("nan"))
        tl.debug_barrier()  # all have loaded what is stored here
        tl.store(state.norms + rows.first + n, mark, mask=inside)
        pickable += allowed.to(tl.int32)
        log2 = log2_weight(weights, tl.where(allowed, quality, 1.0))
        lowest = tl.minimum(lowest, tl.where(allowed, log2, 1e30))
        highest = tl.maximum(highest, tl.where(allowed, log2, -1e30))
        if SCORE:
            logits = opening_logits(rows, quality, n, inside)
            score = add_noise(logits, rows, n, inside, 0, 1.0, BUILD.SEEDED)
            best = update_best(best, score, logits, n, allowed, 0, tau, BUILD.KEEP)
        if SAVED:
            score = tl.load(state.nearest + rows.first + n, mask=inside, other=0.0)
            total += tl.where(allowed, softmax_term(score, peak, 0, tau), 0.0)
    least, most = tl.min(lowest, axis=0), tl.max(highest, axis=0)
    plain = (tl.maximum(tl.abs(least), tl.abs(most)) <= MOST_LOG2) | (most < -1e29)
    exponent = tl.where(plain, 0.0, tl.minimum(tl.maximum(tl.floor(most), -1e6), 1e6)).to(tl.int32)
    if BUILD.SEEDED or rows.noise is not None:
        exponent = tl.maximum(exponent, 0)  # noise has a scale of its own: beside it small weights are left small
    tl.store(state.exponents + slot, exponent)
    tl.debug_barrier()
    return tl.sum(pickable, axis=0), reduce_best(best, 0, tau, BUILD.KEEP), tl.sum(total, axis=0)


@triton.jit
def fresh_gaps(n, norm, product, pick, own, BUILD: tl.constexpr):
    """The gaps [n] to ``pick``, of the rows' products with it.

    A pick is 0 away from itself. NORMALIZED rows may be of length 1 but for rounding to 8 bits: there its duplicates
    are 0 away, too, by its product with itself, ``own``.
    """
    if BUILD.EUCLIDEAN:
        gap = tl.minimum(product, MOST_GAP)
    else:
        cosine = product
        if not BUILD.NORMALIZED:
            cosine = tl.where(is_extreme(norm), cosine, cosine / tl.where(norm > 0, norm, 1.0))
        alike = n == pick
        if BUILD.NORMALIZED:
            alike = alike | (tl.abs(cosine - own) <= SAME_COSINE)
        gap = tl.where(alike, 0.0, tl.maximum(1 - cosine, 0.0))  # rounding can take 1 - cosine below 0
    return gap


@triton.jit
def write_state(rows, out, n, allowed, gap, fresh, before, weight, logits, earlier, step, exponent):
    """The distances [n] to the nearest pick so far, and which picks are nearer than all before them."""
    distance = fresh * weight
    nearer = allowed & (fresh < float("inf")) & ((distance < before * weight) | (before == float("inf")))
    least = tl.where(gap < float("inf"), distance_of(logits, exponent), float("inf"))  # inf: no pick was made
    if rows.earlier is not None:
        scaled = times_power_of_two(earlier, -exponent)
        nearer = nearer & (distance < scaled)
        least = tl.where((logits == scaled) | (gap == float("inf")), earlier, least)  # as it was given
    tl.store(out.owners + rows.first + n, tl.zeros_like(n).to(tl.int64) + step, mask=nearer)
    least = tl.where(gap == TAKEN, float("-inf"), least)
    tl.store(out.least + rows.first + n, least, mask=allowed)


@triton.jit
def score_rows(rows, low, high, state, out, weights, step, made, begun, pick, own, exponent, tau, BUILD: tl.constexpr):
    """Update the running minimum with the distance to ``pick``, if one was ``made``; the next step's partial.

    A set that has not ``begun``, as its start cannot be picked, has no state.
    """
    best = nobody(BUILD.BLOCK_R)
    unit = noise_unit(exponent)
    more = step + 1 < out.steps  # not so in the pass after the last pick (STATE)
    for begin in range(low, high, BUILD.BLOCK_R):  # @scalars
        n = begin + tl.arange(0, BUILD.BLOCK_R)
        inside = n < high
        # -- what is known of the rows
        norm = tl.load(state.norms + rows.first + n, mask=inside, other=-1.0)
        product = tl.load(state.products + rows.first + n, mask=inside, other=0.0)
        before = tl.load(state.nearest + rows.first + n, mask=inside & (step > 0), other=float("inf"))
        allowed = norm > 0
        quality = norm
        if rows.quality is not None:
            quality = tl.load(rows.quality + rows.first + n, mask=inside, other=1.0)
        # -- update the running minimum
        fresh = fresh_gaps(n, norm, product, pick, own, BUILD)
        if BUILD.STATE:
            fresh = tl.where(made, fresh, float("inf"))
        gap = tl.minimum(before, fresh)
        if BUILD.DISTINCT:
            gap = tl.where((n == pick) & made, TAKEN, gap)
        tl.debug_barrier()  # all have loaded what is stored here
        tl.store(state.nearest + rows.first + n, gap, mask=inside)
        if BUILD.KEEP:
            bits = tl.where(allowed, gap, 0.0).to(tl.int32, bitcast=True)
            bits |= tl.where((fresh == before) & allowed, -2147483648, 0)  # -gap would lose the sign of a tie at 0
            at = out.gaps + step * rows.R + rows.first + n
            tl.store(at, bits.to(tl.float32, bitcast=True), mask=inside & more)
        # -- score
        weight = weight_of(weights, tl.where(allowed, quality, 1.0), exponent)
        logits = gap * weight
        earlier = logits
        if rows.earlier is not None:
            earlier = load_earlier(rows, n, allowed)
            logits = tl.minimum(logits, times_power_of_two(earlier, -exponent))
        if BUILD.STATE:
            write_state(rows, out, n, allowed & begun, gap, fresh, before, weight, logits, earlier, step, exponent)
        score = add_noise(logits, rows, n, inside & more, step + 1, unit, BUILD.SEEDED)
        best = update_best(best, score, logits, n, allowed & (gap >= 0), exponent, tau, BUILD.KEEP)
    return reduce_best(best, exponent, tau, BUILD.KEEP)


# --- a step ----------------------------------------------------------------------------------------------------------


@triton.jit
def store_partial(shared, part, step, partial):
    """Leave a part's partial for ``step`` where the others find it; even and odd steps have places of their own."""
    at = (step % 2) * part.slots + part.slot + part.part
    tl.store(shared.numbers + at * 4, partial.score)
    tl.store(shared.numbers + at * 4 + 1, partial.logit)
    tl.store(shared.numbers + at * 4 + 2, partial.denominator)
    tl.store(shared.numbers + at * 4 + 3, tl.cast(partial.exponent, tl.float32))
    tl.store(shared.winners + at, partial.row)


@triton.jit
def load_partials(shared, part, turn, BUILD: tl.constexpr):
    """What a set's parts left before exchange ``turn``, in their own units: partials [p]; where, and which there are.
    And how many rows may be picked."""
    lane = tl.arange(0, BUILD.BLOCK_P)
    there = lane < part.parts
    at = (turn % 2) * part.slots + part.slot + lane
    # .cg: other SMs wrote these, and L1 may hold what was here before
    row = tl.load(shared.winners + at, mask=there, other=NO_ROW, cache_modifier=".cg")
    score = tl.load(shared.numbers + at * 4, mask=there, other=float("-inf"), cache_modifier=".cg")
    logit = tl.load(shared.numbers + at * 4 + 1, mask=there, other=0.0, cache_modifier=".cg")
    denominator = tl.load(shared.numbers + at * 4 + 2, mask=there, other=0.0, cache_modifier=".cg")
    exponents = tl.load(shared.numbers + at * 4 + 3, mask=there, other=0.0, cache_modifier=".cg").to(tl.int32)
    count = tl.load(shared.pickable + part.slot + lane, mask=there, other=0, cache_modifier=".cg")
    return Partial(score, row, logit, denominator, exponents), at, there, tl.sum(count, axis=0)


@triton.jit
def unit_factor(exponent, largest):
    """What takes numbers in units of 2^exponent to the set's unit."""
    return times_power_of_two(1.0, tl.minimum(tl.maximum(exponent - largest, -252), 0))


@triton.jit
def common_unit(exponents, taking_part):
    """The largest unit of the parts that take part, 0 of none; what takes each of them to it."""
    exponent = tl.max(tl.where(taking_part, exponents, -1000000), axis=0)
    exponent = tl.where(exponent == -1000000, 0, exponent)
    return exponent, unit_factor(exponents, exponent)


@triton.jit
def rescaled(score, factor):
    """Scores in a larger unit."""
    return tl.where(score > float("-inf"), score * factor, score)


@triton.jit
def merge_partials(shared, part, step, tau, BUILD: tl.constexpr):
    """The set's partial from those of its parts, in the largest unit of them, and how many rows may be picked."""
    each, _at, _there, count = load_partials(shared, part, step, BUILD)
    exponent, factor = common_unit(each.exponent, each.row != NO_ROW)
    best = Partial(rescaled(each.score, factor), each.row, each.logit * factor, each.denominator, exponent)
    return reduce_best(best, exponent, tau, BUILD.KEEP), count


@triton.jit
def unit_vector(values, norm):
    """A row [c] over its norm, whatever that is: as measured by the tile loop, whose order of summation does not depend
    on the launch."""
    down = tl.where(is_extreme(norm), downscale_of(norm), 1.0)
    return values * down / (norm * down)


@triton.jit
def direction_of(values, norm, there, BUILD: tl.constexpr):
    """What rows are multiplied with to tell how far they are from a pick [c], and of NORMALIZED rows its square."""
    if not (BUILD.NORMALIZED or BUILD.EUCLIDEAN):
        values = unit_vector(values, tl.where(there, norm, 1.0))
    return values, norm * norm


@triton.jit
def norm_of(rows, row, there, BUILD: tl.constexpr):
    """The norm of one row before the tile loop has seen it, and to the bit as that has it: summed in the same layout,
    which a tile of copies has."""
    n = tl.zeros((BUILD.FOLD,), tl.int32) + row
    inside = (n == row) & there
    squares = tl.zeros((BUILD.FOLD, BUILD.CHUNK), tl.float32)  # [n, c]
    for j in tl.static_range(BUILD.CHUNKS):
        at, mask = chunk_of(rows, n, inside, j, BUILD)
        tile = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if BUILD.EUCLIDEAN:
            squares += tile - tile
        else:
            squares += tile * tile
    norm = tl.max(tl.sqrt_rn(tl.sum(squares, axis=1)), axis=0)
    if BUILD.EUCLIDEAN:
        norm += 1
    elif is_extreme(norm):
        norms, _length, _down = scaled_norms(rows, n, inside, BUILD)
        norm = tl.max(norms, axis=0)
    return norm


@triton.jit
def load_norm(rows, state, row, there):
    """The norm of a pick, another part's where sets are split."""
    return tl.load(state.norms + rows.first + row, mask=there, other=1.0, cache_modifier=".cg")


@triton.jit
def given_start(rows, state, start_ptr, BUILD: tl.constexpr):
    """The given first pick, its norm and whether it may be picked, whatever is known of the other rows."""
    row = tl.load(start_ptr + rows.set_id).to(tl.int32)
    inside = (row >= 0) & (row < rows.count)
    if BUILD.EARLY:
        norm = norm_of(rows, row, inside, BUILD)
    else:
        norm = load_norm(rows, state, row, inside)
    quality = norm
    if rows.quality is not None:
        quality = tl.load(rows.quality + rows.first + row, mask=inside, other=-1.0)
    return row, norm, may_be_picked(rows, quality, row, inside) & is_usable_norm(norm)


@triton.jit
def next_usable(rows, partial, BUILD: tl.constexpr):
    """From a first pick by quality alone on to the best whose row is usable, and its norm."""
    score, row = partial.score, partial.row
    norm = norm_of(rows, row, row != NO_ROW, BUILD)
    while (row != NO_ROW) & (is_usable_norm(norm) == 0):
        other = first_pick(rows, 0, rows.count, rows, score, row, False, BUILD)
        score, row = other.score, other.row
        norm = norm_of(rows, row, row != NO_ROW, BUILD)
    logit = opening_logits(rows, partial.logit, row, row != NO_ROW)
    return Partial(score, row, logit, partial.denominator, partial.exponent), norm


@triton.jit
def store_pick(rows, out, partial, step, there, values, count, BUILD: tl.constexpr):
    """Write a pick, and what is known of the set with it: that ``count`` picks can be made."""
    cols = tl.arange(0, BUILD.BLOCK_C)
    at = rows.set_id.to(tl.int64) * out.steps + step
    tl.store(out.counts + rows.set_id, count.to(tl.int64))
    tl.store(out.picked + at * rows.C + cols, values, mask=cols < rows.C)
    tl.store(out.indices + at, tl.where(there, partial.row, -1).to(tl.int64))
    distance = distance_of(partial.logit, partial.exponent)
    if rows.earlier is None:
        distance = tl.where(step == 0, float("inf"), distance)  # no pick is before the first
    else:
        earlier = load_earlier(rows, partial.row, there)
        distance = tl.where(partial.logit == times_power_of_two(earlier, -partial.exponent), earlier, distance)
    tl.store(out.distances + at, tl.where(there, distance, 0.0))
    if BUILD.KEEP:
        tl.store(out.softmax + at * 3, partial.score)
        tl.store(out.softmax + at * 3 + 1, partial.denominator)
        tl.store(out.softmax + at * 3 + 2, tl.cast(partial.exponent, tl.float32))


@triton.jit
def see_rows(rows, part, held, state, MEASURE: tl.constexpr, MULTIPLY: tl.constexpr, BUILD: tl.constexpr):
    """A pass over a part's rows; where no row has an extreme norm that is one tile loop."""
    slot = part.slot + part.part
    direction_ptr = state.directions + slot.to(tl.int64) * rows.C
    if not MEASURE:
        extreme = tl.load(state.extremes + slot)  # before the rows, so that nothing waits for it after them
    measured = multiply_rows(rows, part.low, part.high, held, state, direction_ptr, MEASURE, MULTIPLY, BUILD)
    if MEASURE:
        extreme = measured
        tl.store(state.extremes + slot, extreme)
    if not BUILD.EUCLIDEAN:  # whose norms are 1
        if extreme > 0:
            multiply_extreme_rows(rows, part.low, part.high, state, direction_ptr, MEASURE, MULTIPLY, BUILD)


@triton.jit
def look_first(rows, part, held, state, shared, weights, tau, START: tl.constexpr, BUILD: tl.constexpr):
    """What comes before the first pick: the pass that first sees the rows, or EARLY, a look at their qualities."""
    slot = part.slot + part.part
    partial = reduce_best(nobody(BUILD.BLOCK_R), 0, 1.0, False)
    pickable = tl.sum(tl.zeros((BUILD.BLOCK_R,), tl.int32), axis=0)
    if BUILD.EARLY:
        if not START:
            partial = first_pick(rows, part.low, part.high, state, float("inf"), -1, True, BUILD)
    else:
        see_rows(rows, part, held, state, True, False, BUILD)
        pickable, partial, _ = admit_rows(rows, part.low, part.high, state, weights, slot, 0.0, tau, True, False, BUILD)
    if BUILD.SPLIT != WHOLE:
        store_partial(shared, part, 0, partial)
        tl.store(shared.pickable + slot, pickable)
    return partial, pickable


@triton.jit
def open_rows(
    rows, part, held, out, state, shared, weights, opened, given, tau, START: tl.constexpr, BUILD: tl.constexpr
):
    """EARLY, the pass that sees the rows with the first pick made already; returns how many may be picked."""
    slot = part.slot + part.part
    see_rows(rows, part, held, state, True, True, BUILD)
    saved: tl.constexpr = BUILD.KEEP and not START
    pickable, _, total = admit_rows(rows, part.low, part.high, state, weights, slot, opened, tau, False, saved, BUILD)
    pickable = tl.where(given, pickable, 0)
    if BUILD.SPLIT == WHOLE:
        if BUILD.KEEP:
            tl.store(out.softmax + rows.set_id.to(tl.int64) * out.steps * 3 + 1, total)
    else:
        tl.store(shared.pickable + slot, pickable)
        tl.store(shared.openings + slot, total)
    return pickable


@triton.jit
def forward_set(rows, part, out, state, shared, weights, start_ptr, limits_ptr, tau, K, turn, BUILD: tl.constexpr):
    """The picks by one part of one set, all of it where it is not split; launch ``turn`` > 0 of several makes pick
    turn - 1."""
    START: tl.constexpr = start_ptr is not None
    cols = tl.arange(0, BUILD.BLOCK_C)
    slot = part.slot + part.part
    limit = picks_of(rows.set_id, limits_ptr, K)
    held = hold_rows(rows, part.high, BUILD)
    begin_step, end_step = 0, K
    if BUILD.SPLIT == LAUNCHES:
        begin_step, end_step = tl.maximum(turn - 1, 0), turn
    partial = reduce_best(nobody(BUILD.BLOCK_R), 0, 1.0, False)
    pickable = tl.sum(tl.zeros((BUILD.BLOCK_R,), tl.int32), axis=0)
    norm = tl.cast(1.0, tl.float32)  # of the pick
    if BUILD.SPLIT == COOPERATIVE:
        phase = barrier_phase(part.barrier + rows.set_id)
    if BUILD.SPLIT != LAUNCHES or turn == 0:
        partial, pickable = look_first(rows, part, held, state, shared, weights, tau, START, BUILD)
    for step in range(begin_step, end_step):  # @steps
        # -- agree on the pick
        if BUILD.SPLIT == COOPERATIVE:
            phase = grid_barrier(part.barrier + rows.set_id, part.part, part.parts, phase)
        if BUILD.SPLIT != WHOLE:
            partial, pickable = merge_partials(shared, part, step, tau, BUILD)
            if BUILD.EARLY and BUILD.KEEP and (step == 1) & (part.part == 0):
                lane = tl.arange(0, BUILD.BLOCK_P)
                at = shared.openings + part.slot + lane
                each = tl.load(at, mask=lane < part.parts, other=0.0, cache_modifier=".cg")
                tl.store(out.softmax + rows.set_id.to(tl.int64) * K * 3 + 1, tl.sum(each, axis=0))
        given = step < K
        if step == 0:
            if START:
                row, norm, given = given_start(rows, state, start_ptr, BUILD)
                logit = opening_logits(rows, 0.0, row, given)
                partial = Partial(partial.score, tl.where(given, row, NO_ROW), logit, partial.denominator, 0)
                pickable = tl.where(given, tl.maximum(pickable, 1), 0)  # BUILD.EARLY: no other is known of yet
            elif BUILD.EARLY:
                partial, norm = next_usable(rows, partial, BUILD)
                pickable = tl.where(partial.row != NO_ROW, 1, 0)  # as far as is known
        # -- write it
        count = tl.minimum(pickable, limit)
        there = (step < count) & (partial.row != NO_ROW)
        values = load_row(rows.features, partial.row, there, rows.stride, cols, rows.C)
        if part.part == 0:
            store_pick(rows, out, partial, step, there, values, count, BUILD)
        if BUILD.STATE or step + 1 < K:
            # -- products with it, a tile at a time
            seen = there
            if BUILD.EARLY:
                seen = there & (step > 0)
            norm = tl.where(seen, load_norm(rows, state, partial.row, seen), norm)
            direction, own = direction_of(values.to(tl.float32), norm, there, BUILD)
            tl.debug_barrier()  # all have read what these loops write
            tl.store(state.directions + slot.to(tl.int64) * rows.C + cols, direction, mask=cols < rows.C)
            tl.debug_barrier()
            if BUILD.EARLY and step == 0:
                pickable = open_rows(
                    rows, part, held, out, state, shared, weights, partial.score, given, tau, START, BUILD
                )
            else:
                see_rows(rows, part, held, state, False, True, BUILD)
            # -- distances and scores, a row to a thread
            exponent = tl.load(state.exponents + slot)
            low, high, begun = part.low, part.high, pickable > 0
            partial = score_rows(
                rows, low, high, state, out, weights, step, there, begun, partial.row, own, exponent, tau, BUILD
            )
            if BUILD.SPLIT != WHOLE:
                store_partial(shared, part, step + 1, partial)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def select_forward(
    rows_ptr,  # features: [B, N, C] by strides, or [T, C]
    quality_ptr,  # [R] float32, or None for the norms
    gamma_ptr,  # [1], or None for gamma_value
    gamma_value,
    tau_ptr,  # [1], or None for tau_value
    tau_value,
    noise_ptr,  # [K, R] float32, or None
    seed_ptr,  # [1] int64, or None
    seed_value: "i64",  # or negative: seed_ptr has it
    start_ptr,  # [B], or None
    mask_ptr,  # [R] bool, or None
    lengths_ptr,  # [B], or None
    cu_seqlens_ptr,  # [B + 1], or None
    limits_ptr,  # [B] int64, or None for K
    earlier_ptr,  # [R] float32, or None
    picked_ptr,  # out, as are the next: see `Out`
    distances_ptr,
    indices_ptr,
    counts_ptr,
    softmax_ptr,
    gaps_ptr,
    least_ptr,
    owners_ptr,
    norms_ptr,  # see `State`
    products_ptr,
    nearest_ptr,
    directions_ptr,
    exponents_ptr,
    extremes_ptr,
    numbers_ptr,  # see `Shared` (split)
    winners_ptr,
    pickable_ptr,
    openings_ptr,
    barrier_ptr,  # [B] int32, see `grid_barrier` (cooperative)
    sets,
    parts,
    turn,
    stride_set,
    stride_row,
    N,
    C,
    K,
    R: "i64",
    above,  # sets of so many rows or fewer are another launch's; TWICE: are begun with last
    longest,  # sets of more rows are another launch's
    scale,
    BUILD: tl.constexpr,  # see `Constants`
):
    program = tl.program_id(0)
    layout = Layout(sets, lengths_ptr, cu_seqlens_ptr, stride_set, stride_row, N, R)
    seed = (seed_ptr, seed_value)
    out = Out(picked_ptr, distances_ptr, indices_ptr, counts_ptr, softmax_ptr, gaps_ptr, least_ptr, owners_ptr, K)
    state = State(norms_ptr, products_ptr, nearest_ptr, directions_ptr, exponents_ptr, extremes_ptr)
    shared = Shared(numbers_ptr, winners_ptr, pickable_ptr, openings_ptr)
    weights = Weights(finite_or_nan(scalar(gamma_ptr, gamma_value)), scale)
    tau = scalar(tau_ptr, tau_value)
    if BUILD.LOOK == 0:
        set_id, above, longest = set_of(program // parts, layout, above, longest, BUILD.TWICE)
        x_ptr, first, count = place_of(set_id, rows_ptr, layout, BUILD)
        rows = Rows(
            x_ptr, stride_row, C, R, set_id, first, count, quality_ptr, mask_ptr, earlier_ptr, noise_ptr, seed
        )  # fmt: skip
        low, high = bounds_of(count, program % parts, parts, BUILD)
        part = Part(low, high, program % parts, parts, set_id * parts, sets * parts, barrier_ptr)
        if (rows.count > above) & (rows.count <= longest):
            forward_set(rows, part, out, state, shared, weights, start_ptr, limits_ptr, tau, K, turn, BUILD)
    else:
        end = tl.minimum((program + 1) * BUILD.LOOK, sets)
        set_id = next_set(program * BUILD.LOOK, end, above, longest, layout, BUILD.LOOK)
        while set_id < end:
            x_ptr, first, count = place_of(set_id, rows_ptr, layout, BUILD)
            rows = Rows(
                x_ptr, stride_row, C, R, set_id, first, count, quality_ptr, mask_ptr, earlier_ptr, noise_ptr, seed
            )  # fmt: skip
            part = Part(0, count, 0, 1, set_id, sets, None)
            forward_set(rows, part, out, state, shared, weights, start_ptr, limits_ptr, tau, K, turn, BUILD)
            set_id = next_set(set_id + 1, end, above, longest, layout, BUILD.LOOK)
