"""The backward kernel: from the last pick to the first, then the rows' gradient.

With c the gradient at pick k, complete once the later picks are done, and y its softmax,

    dot(n) = c . x_n,  mean = sum_n y(n) dot(n),  min_grad(n) += y(n) (dot(n) - mean) / tau

is the gradient of the running minimum. The share of it that belongs to the distance to pick k - 1 gives
dcos(n) = -scale q^gamma share min_grad, and sum_n dcos(n) u_n is what pick k - 1 gets of it. That sum is linear in the
mean, which is known only once all rows were seen: two sums are made in the pass that makes the mean, so that each step
reads the rows once, as does the last, which writes their gradient.

Squared distances have 2 dcos(n) (x_n - x_i) in the place of dcos(n) u_n, from which x_n gets the opposite. Their tile
loops see the rows from a pick: what is far from the origin is near to that.

A step is a *scalar loop*, a row to a thread (settle the mean of the step before, noise, softmax), and a *tile loop*
(the dot, and the two sums, which stay in registers). All that steps hand on stands in memory, so that a step is the
same whether a program has a set to itself, meets the others at barriers, or is one launch of several.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fcn_kernels.device.rows import Layout, load_row, next_set, set_of
from fcn_kernels.device.splits import COOPERATIVE, LAUNCHES, WHOLE, barrier_phase, grid_barrier
from fcn_kernels.selection.kernels.common import (
    MOST_WEIGHT_LOG2,
    TAKEN,
    UNSPECIALIZED,
    Part,
    Rows,
    Weights,
    add_noise,
    bounds_of,
    finite_or_nan,
    load_cols,
    load_earlier,
    load_vector,
    noise_unit,
    place_of,
    scalar,
    softmax_term,
    times_power_of_two,
    weight_of,
)
from fcn_kernels.selection.kernels.forward import load_chunk, unit_vector


class Kept(NamedTuple):
    """What the forward pass kept, and the arriving gradient."""

    grad: Any  # [B, K, C]
    indices: Any  # [B, K] int64
    counts: Any  # [B] int64
    softmax: Any  # [B, K, 3] float32
    gaps: Any  # [K - 1, R] float32
    norms: Any  # [R] float32
    base: Any  # of the set among the B K picks
    picks: Any  # of the set


class Grads(NamedTuple):
    """The results."""

    rows: Any  # [B, N, C] or [T, C]
    quality: Any  # [R] float32
    gamma: Any  # [slots] float32


class State(NamedTuple):
    """What stands in memory between the loops and the steps, float32."""

    arriving: Any  # [B, K, C], the complete gradients at the picks
    units: Any  # [B, K, C], the picks' unit vectors; EUCLIDEAN: the picks
    dcos: Any  # [K - 1, R]
    min_grad: Any  # [R], without what the step gives it
    prob: Any  # [R], a step's softmax; -1 of rows that may not be picked
    fixed: Any  # [R], a row's weight in a step's sums without the softmax's dot; before the end, of its own direction
    slope: Any  # [R], what the dot adds to it: the weight by the mean
    dots: Any  # [R], of a step's pick
    means: Any  # [3, slots], of even steps, odd steps, and step 0
    sums: Any  # [slots, 2, C], a step's row sums, without and by the mean
    totals: Any  # [B, 2, C], their sums over the parts


@triton.jit
def load_norm_and_quality(rows, kept, n, inside):
    """(may be picked, norm, quality) [n], harmless ones where a row may not be picked."""
    mark = tl.load(kept.norms + rows.first + n, mask=inside, other=-1.0)
    allowed = mark > 0
    norm = tl.where(allowed, mark, 1.0)
    quality = norm
    if rows.quality is not None:
        quality = tl.load(rows.quality + rows.first + n, mask=allowed, other=1.0)
    return allowed, norm, quality


@triton.jit
def load_gap(rows, kept, n, inside, step):
    """A step's gap [n], whether the row was still in the softmax, and the step's share of the gradient.

    The share is 1 where the step came nearer than all before it, 1/2 where it tied with them, else 0.
    """
    at = kept.gaps + rows.first + n
    saved = tl.load(at + step * rows.R, mask=inside, other=0.0)
    before = tl.load(at + (step - 1) * rows.R, mask=inside & (step > 0), other=float("inf"))
    gap = tl.abs(saved)
    tied = saved.to(tl.int32, bitcast=True) < 0
    return gap, saved != TAKEN, tl.where(tied, 0.5, tl.where(gap < tl.abs(before), 1.0, 0.0))


@triton.jit
def whole_weight(weights, quality, exponent):
    """scale q^gamma [n], at the most 2^100 where weights have a unit of their own; 0 without a finite gamma."""
    weight = weight_of(weights, quality, tl.maximum(exponent - MOST_WEIGHT_LOG2, 0))
    return tl.where(weight == weight, weight, 0.0)


@triton.jit
def probabilities(rows, kept, logits, n, inside, step, tau, BUILD: tl.constexpr):
    """A step's softmax [n] from its logits without noise, in units of 2^exponent."""
    at = kept.softmax + (kept.base + step) * 3
    peak, denominator = tl.load(at), tl.load(at + 1)
    exponent = tl.load(at + 2).to(tl.int32)
    score = add_noise(logits, rows, n, inside, step, noise_unit(exponent), BUILD.SEEDED)
    return softmax_term(score, peak, exponent, tau) / tl.where(denominator > 0, denominator, 1.0)


@triton.jit
def pick_of(kept, step):
    """The row of a pick."""
    return tl.load(kept.indices + kept.base + step).to(tl.int32)


@triton.jit
def exponent_of(kept, step):
    """The unit's exponent of a step's logits."""
    return tl.load(kept.softmax + (kept.base + step) * 3 + 2).to(tl.int32)


@triton.jit
def mean_of(state, part, step, BUILD: tl.constexpr):
    """A step's softmax mean: the sum of one number of each part, in their order; step 2 stands for the first pick's."""
    lane = tl.arange(0, BUILD.BLOCK_P)
    at = state.means + step * part.slots + part.slot + lane
    return tl.sum(tl.load(at, mask=lane < part.parts, other=0.0, cache_modifier=".cg"), axis=0)


@triton.jit
def times_prob(value, prob):
    """value prob [n], 0 where prob is, even if the value is infinite."""
    return tl.where(prob > 0, value * prob, 0.0)


@triton.jit
def share_with_earlier(share, distance, earlier):
    """The share [n] that distances to what was picked before this call leave to a step's."""
    return tl.where(distance < earlier, share, tl.where(distance == earlier, tl.minimum(share, 0.5), 0.0))


@triton.jit
def settled_min_grad(rows, state, n, inside, mean, tau):
    """The minimum's gradient [n] with what the step after gave it, now that its softmax's mean is known."""
    at = rows.first + n
    prob = tl.load(state.prob + at, mask=inside, other=0.0)
    dot = tl.load(state.dots + at, mask=inside, other=0.0)
    return tl.load(state.min_grad + at, mask=inside, other=0.0) + times_prob(dot - mean, prob) / tau


@triton.jit
def route_min_grad(rows, kept, state, weights, min_grad, allowed, quality, n, inside, step, BUILD: tl.constexpr):
    """Divide the minimum's gradient [n] of step + 1 between the distance to pick ``step`` and those before it."""
    exponent = exponent_of(kept, step + 1)
    gap, _, share = load_gap(rows, kept, n, inside, step)
    if rows.earlier is not None:
        earlier = times_power_of_two(load_earlier(rows, n, inside), -exponent)
        share = share_with_earlier(share, gap * weight_of(weights, quality, exponent), earlier)
    weight = whole_weight(weights, quality, exponent)
    mine = tl.where(allowed, share * min_grad, 0.0)
    dcos = -weight * mine
    if not BUILD.NORMALIZED:  # a pick is 0 away from itself, wherever it moves; not where nothing is projected
        dcos = tl.where(n == pick_of(kept, step), 0.0, dcos)
    tl.store(state.dcos + step * rows.R + rows.first + n, dcos, mask=inside)
    return min_grad - mine


@triton.jit
def prepare_step(rows, part, kept, state, weights, step, mean, settle, tau, BUILD: tl.constexpr):
    """The scalar loop of a step: settle the mean of the one after it, then this one's softmax, noise and all."""
    exponent = exponent_of(kept, step)
    pick = pick_of(kept, step - 1)
    for begin in range(part.low, part.high, BUILD.BLOCK_R):  # @scalars
        n = begin + tl.arange(0, BUILD.BLOCK_R)
        inside = n < part.high
        allowed, norm, quality = load_norm_and_quality(rows, kept, n, inside)
        # -- the minimum's gradient so far
        min_grad = settled_min_grad(rows, state, n, inside & settle, mean, tau)
        if settle:
            min_grad = route_min_grad(rows, kept, state, weights, min_grad, allowed, quality, n, inside, step, BUILD)
        tl.debug_barrier()  # all have loaded what is stored here
        tl.store(state.min_grad + rows.first + n, min_grad, mask=inside)
        # -- this step's softmax
        gap, in_softmax, share = load_gap(rows, kept, n, inside, step - 1)
        logits = gap * weight_of(weights, quality, exponent)
        if rows.earlier is not None:
            earlier = times_power_of_two(load_earlier(rows, n, inside), -exponent)
            share = share_with_earlier(share, logits, earlier)
            logits = tl.minimum(logits, earlier)
        prob = probabilities(rows, kept, logits, n, inside, step, tau, BUILD)
        prob = tl.where(allowed & in_softmax, prob, 0.0)
        slope = tl.where(allowed, -whole_weight(weights, quality, exponent) * share, 0.0)  # of dcos in min_grad
        if not BUILD.NORMALIZED:
            slope = tl.where(n == pick, 0.0, slope)
        if BUILD.EUCLIDEAN:
            slope *= 2
        if BUILD.NORMALIZED:
            norm = tl.zeros_like(norm) + 1
        tl.store(state.prob + rows.first + n, tl.where(allowed, prob, -1.0), mask=inside)
        tl.store(state.fixed + rows.first + n, slope * min_grad / norm, mask=inside)
        tl.store(state.slope + rows.first + n, slope * (prob / tau) / norm, mask=inside)


@triton.jit
def load_for_rows(pointer, n, C, j: tl.constexpr, CHUNK: tl.constexpr):
    """What `load_cols` loads, for each row of a tile [n, c]. One row would pass through shared memory to get to the
    tile's threads, with two barriers; these are found in L1."""
    cols = j * CHUNK + tl.arange(0, CHUNK)
    return tl.load(pointer + tl.zeros_like(n)[:, None] + cols[None, :], mask=(cols < C)[None, :], other=0.0)


@triton.jit
def load_origin(rows, kept, step, BUILD: tl.constexpr):
    """The chunks [1, c] of the row from which a step sees the others: the pick before it, or the first. Nothing where
    rows are seen from 0."""
    origin = ()
    if BUILD.EUCLIDEAN:
        pick = tl.maximum(pick_of(kept, tl.maximum(step - 1, 0)), 0).to(tl.int64)
        for j in tl.static_range(BUILD.CHUNKS):
            cols = j * BUILD.CHUNK + tl.arange(0, BUILD.CHUNK)
            there = (cols < rows.C) & (kept.picks > 0)
            values = tl.load(rows.features + pick * rows.stride + cols, mask=there, other=0.0)
            origin = origin + (values.to(tl.float32)[None, :],)
    return origin


@triton.jit
def load_tile(rows, n, allowed, origin, BUILD: tl.constexpr):
    """A tile's chunks [n, c], 0 in rows that may not be picked: 0 * NaN is NaN, and they must not meet the sums."""
    tile = ()
    for j in tl.static_range(BUILD.CHUNKS):
        chunk = load_chunk(rows, n, allowed, j, BUILD)
        if BUILD.EUCLIDEAN:
            chunk = tl.where(allowed[:, None], chunk - origin[j], 0.0)
        tile = tile + (chunk,)
    return tile


@triton.jit
def dot_rows(tile, vector, BUILD: tl.constexpr):
    """x_n . v [n] of a tile's chunks."""
    products = tl.zeros_like(tile[0])
    for j in tl.static_range(BUILD.CHUNKS):
        products += tile[j] * vector[j]
    return tl.sum(products, axis=1)


@triton.jit
def add_weighted(sums, tile, weight, BUILD: tl.constexpr):
    """sums + sum_n weight_n x_n in chunks [fold, c]: over the rows that a thread holds; the rest is done at the end."""
    new = ()
    for j in tl.static_range(BUILD.CHUNKS):
        each = tile[j] * weight[:, None]
        new = new + (
            sums[j] + tl.sum(tl.reshape(each, (each.shape[0] // BUILD.FOLD, BUILD.FOLD, BUILD.CHUNK)), axis=0),
        )
    return new


@triton.jit
def sum_rows(rows, part, kept, state, step, centre, BUILD: tl.constexpr):
    """The tile loop of a step: the dot with the arriving gradient, and the two sums of what pick step - 1 gets."""
    arriving = load_vector(state.arriving + (kept.base + step) * rows.C, rows.C, BUILD)
    origin = load_origin(rows, kept, step, BUILD)
    mean = tl.zeros((BUILD.BLOCK_N,), tl.float32)
    fixed, by_mean = (), ()
    for _ in tl.static_range(BUILD.CHUNKS):
        fixed = fixed + (tl.zeros((BUILD.FOLD, BUILD.CHUNK), tl.float32),)
        by_mean = by_mean + (tl.zeros((BUILD.FOLD, BUILD.CHUNK), tl.float32),)
    for begin in range(part.low, part.high, BUILD.BLOCK_N):  # @tiles
        n = begin + tl.arange(0, BUILD.BLOCK_N)
        inside = n < part.high
        at = rows.first + n
        prob = tl.load(state.prob + at, mask=inside, other=-1.0)
        weight = tl.load(state.fixed + at, mask=inside, other=0.0)
        slope = tl.load(state.slope + at, mask=inside, other=0.0)
        tile = load_tile(rows, n, prob >= 0, origin, BUILD)
        dot = tl.where(prob > 0, dot_rows(tile, arriving, BUILD) - centre, 0.0)
        tl.store(state.dots + at, dot, mask=inside)
        mean += prob * dot
        fixed = add_weighted(fixed, tile, weight + slope * dot, BUILD)
        by_mean = add_weighted(by_mean, tile, slope, BUILD)
    slot = part.slot + part.part
    tl.store(state.means + step % 2 * part.slots + slot, tl.sum(mean, axis=0))
    for j in tl.static_range(BUILD.CHUNKS):
        cols = j * BUILD.CHUNK + tl.arange(0, BUILD.CHUNK)
        to = state.sums + slot.to(tl.int64) * (2 * rows.C) + cols
        tl.store(to, tl.sum(fixed[j], axis=0), mask=cols < rows.C)
        tl.store(to + rows.C, tl.sum(by_mean[j], axis=0), mask=cols < rows.C)
    tl.debug_barrier()


@triton.jit
def sum_parts(rows, part, state, BUILD: tl.constexpr):
    """Add the parts' vectors [2 C], each part a share of the columns, in the order of the parts."""
    lane = tl.arange(0, BUILD.BLOCK_P)
    for begin in range(part.part * BUILD.BLOCK_S, 2 * rows.C, part.parts * BUILD.BLOCK_S):  # @sums
        cols = begin + tl.arange(0, BUILD.BLOCK_S)
        at = (part.slot + lane).to(tl.int64)[:, None] * (2 * rows.C) + cols[None, :]
        there = (lane < part.parts)[:, None] & (cols < 2 * rows.C)[None, :]
        values = tl.load(state.sums + at, mask=there, other=0.0, cache_modifier=".cg")
        to = state.totals + rows.set_id.to(tl.int64) * (2 * rows.C) + cols
        tl.store(to, tl.sum(values, axis=0), mask=cols < 2 * rows.C)


@triton.jit
def arrive(rows, part, kept, state, step, later, BUILD: tl.constexpr):
    """Complete the gradient at pick ``step`` with what the ``later`` step gave it; returns (that step's mean, centre).

    The centre is the product with the pick's own row. The softmax's gradient does not change with what is taken off
    all dots, and where the softmax is all but one-hot, taking this off leaves a mean as small as the gradient itself.
    """
    cols = tl.arange(0, BUILD.BLOCK_C)
    there = (cols < rows.C) & (step < kept.picks)
    mean = 0.0
    if later:
        mean += mean_of(state, part, (step + 1) % 2, BUILD)
    totals_ptr = state.totals
    if BUILD.SPLIT == WHOLE:
        totals_ptr = state.sums
    at = totals_ptr + rows.set_id.to(tl.int64) * (2 * rows.C) + cols
    # -- from the sums to the gradient at the pick's row: (I - u u^T) / |x|
    pull = tl.load(at, mask=there & later, other=0.0, cache_modifier=".cg")
    pull -= mean * tl.load(at + rows.C, mask=there & later, other=0.0, cache_modifier=".cg")
    values = load_row(rows.features, pick_of(kept, step), step < kept.picks, rows.stride, cols, rows.C).to(tl.float32)
    unit, length = values, 1.0
    if not (BUILD.NORMALIZED or BUILD.EUCLIDEAN):
        length = tl.load(kept.norms + rows.first + pick_of(kept, step), mask=step < kept.picks, other=1.0)
        unit = unit_vector(values, length)
        pull = (pull - tl.sum(pull * unit, axis=0) * unit) / length
    arriving = tl.load(kept.grad + (kept.base + step) * rows.C + cols, mask=there, other=0.0).to(tl.float32) + pull
    tl.store(state.arriving + (kept.base + step) * rows.C + cols, arriving, mask=cols < rows.C)
    tl.store(state.units + (kept.base + step) * rows.C + cols, unit, mask=cols < rows.C)
    tl.debug_barrier()
    if BUILD.EUCLIDEAN:
        before = tl.maximum(pick_of(kept, tl.maximum(step - 1, 0)), 0)
        values -= load_row(rows.features, before, step < kept.picks, rows.stride, cols, rows.C).to(tl.float32)
    return mean, tl.sum(arriving * values, axis=0)


@triton.jit
def prepare_write(rows, part, kept, state, grads, weights, mean, extent, tau, BUILD: tl.constexpr):
    """The last scalar loop before the rows' gradient: all that is known of a row without its dot with the first pick's.

    Leaves in ``fixed`` what the row's own direction gets, in ``prob`` the first pick's softmax.
    """
    dgamma = tl.zeros((BUILD.BLOCK_R,), tl.float32)
    settle = kept.picks > 1
    gamma = tl.where(weights.gamma == weights.gamma, weights.gamma, 0.0)
    for begin in range(part.low, part.high, BUILD.BLOCK_R):  # @scalars
        n = begin + tl.arange(0, BUILD.BLOCK_R)
        inside = n < part.high
        at = rows.first + n
        allowed, _, quality = load_norm_and_quality(rows, kept, n, inside)
        if settle:
            min_grad = settled_min_grad(rows, state, n, inside, mean, tau)
            route_min_grad(rows, kept, state, weights, min_grad, allowed, quality, n, inside, 0, BUILD)
        along = tl.zeros((BUILD.BLOCK_R,), tl.float32)
        dlogweight = tl.zeros((BUILD.BLOCK_R,), tl.float32)
        for step in range(kept.picks - 1):  # @picks
            dcos = tl.load(state.dcos + step * rows.R + at, mask=inside & allowed, other=0.0)
            gap = tl.abs(tl.load(kept.gaps + step * rows.R + at, mask=inside & allowed, other=0.0))
            dlogweight -= gap * dcos
            along += dcos
        dgamma += dlogweight * tl.log(quality)
        tl.store(grads.quality + at, gamma * dlogweight / quality, mask=inside)
        radial = -(along + dlogweight)
        if BUILD.EUCLIDEAN:
            radial = -2 * along
        elif BUILD.NORMALIZED:
            radial = tl.zeros_like(along)
        tl.store(state.fixed + at, radial, mask=inside)
        if BUILD.CHOSEN:
            tl.debug_barrier()  # all have loaded what is stored here
            prob = probabilities(rows, kept, quality, n, inside, 0, tau, BUILD)
            tl.store(state.prob + at, tl.where(allowed & (kept.picks > 0), prob, 0.0), mask=inside)
    for begin in range(part.high, extent, BUILD.BLOCK_R):  # @padding
        n = begin + tl.arange(0, BUILD.BLOCK_R)
        tl.store(grads.quality + rows.first + n, tl.zeros_like(dgamma), mask=n < extent)
    tl.store(grads.gamma + part.slot + part.part, tl.sum(dgamma, axis=0))
    tl.debug_barrier()


@triton.jit
def dot_first(rows, part, kept, state, centre, BUILD: tl.constexpr):
    """Where the quality is the norm, its gradient is part of the rows': a pass for the first pick's dots and mean."""
    vector = load_vector(state.arriving + kept.base * rows.C, rows.C, BUILD)
    origin = load_origin(rows, kept, 0, BUILD)
    mean = tl.zeros((BUILD.BLOCK_N,), tl.float32)
    for begin in range(part.low, part.high, BUILD.BLOCK_N):  # @tiles
        n = begin + tl.arange(0, BUILD.BLOCK_N)
        inside = n < part.high
        prob = tl.load(state.prob + rows.first + n, mask=inside, other=0.0)
        tile = load_tile(rows, n, prob > 0, origin, BUILD)
        dot = dot_rows(tile, vector, BUILD) - centre
        dot = tl.where(prob > 0, dot, 0.0)
        tl.store(state.dots + rows.first + n, dot, mask=inside)
        mean += prob * dot
    tl.store(state.means + 2 * part.slots + part.slot + part.part, tl.sum(mean, axis=0))
    tl.debug_barrier()


@triton.jit
def settle_quality(rows, part, kept, state, grads, tau, BUILD: tl.constexpr):
    """The first pick's part of the quality's gradient, once its mean is known."""
    mean = mean_of(state, part, 2, BUILD)
    for begin in range(part.low, part.high, BUILD.BLOCK_R):  # @scalars
        n = begin + tl.arange(0, BUILD.BLOCK_R)
        inside = n < part.high
        prob = tl.load(state.prob + rows.first + n, mask=inside, other=0.0)
        dot = tl.load(state.dots + rows.first + n, mask=inside, other=0.0)
        dquality = tl.load(grads.quality + rows.first + n, mask=inside, other=0.0)
        tl.debug_barrier()  # all have loaded what is stored here
        tl.store(grads.quality + rows.first + n, dquality + times_prob(dot - mean, prob) / tau, mask=inside)
    tl.debug_barrier()


@triton.jit
def add_picks(gradient, rows, kept, state, origin, n, inside, begin, inverse, BUILD: tl.constexpr):
    """The rows' gradient in chunks [n, c] with what they get of the picks: of the distance to each, and as a pick."""
    for step in range(kept.picks):  # @picks
        if step + 1 < kept.picks:
            dcos = tl.load(state.dcos + step * rows.R + rows.first + n, mask=inside, other=0.0) * inverse
            more = ()
            for j in tl.static_range(BUILD.CHUNKS):
                unit = load_for_rows(state.units + (kept.base + step) * rows.C, n, rows.C, j, BUILD.CHUNK)
                if BUILD.EUCLIDEAN:
                    unit = 2 * (unit - origin[j])
                more = more + (gradient[j] + dcos[:, None] * unit,)
            gradient = more
        row = pick_of(kept, step)
        if (row >= begin) & (row < begin + BUILD.BLOCK_N):
            more = ()
            for j in tl.static_range(BUILD.CHUNKS):
                arriving = load_cols(state.arriving + (kept.base + step) * rows.C, rows.C, j, BUILD.CHUNK)
                more = more + (gradient[j] + tl.where((n == row)[:, None], arriving[None, :], 0.0),)
            gradient = more
    return gradient


@triton.jit
def write_rows(rows, part, kept, state, grads, centre, extent, BUILD: tl.constexpr):
    """The tile loop that writes the rows' gradient; with a given quality, also the first pick's dots and mean."""
    mean = tl.zeros((BUILD.BLOCK_N,), tl.float32)
    origin = load_origin(rows, kept, 0, BUILD)
    vector = ()
    if BUILD.CHOSEN and rows.quality is not None:
        vector = load_vector(state.arriving + kept.base * rows.C, rows.C, BUILD)
    for begin in range(part.low, extent, BUILD.BLOCK_N):  # @writes
        n = begin + tl.arange(0, BUILD.BLOCK_N)
        inside = n < part.high
        at = rows.first + n
        norm = tl.load(kept.norms + at, mask=inside, other=-1.0)
        allowed = norm > 0
        inverse = 1 / tl.where(allowed, norm, 1.0)
        if BUILD.NORMALIZED or BUILD.EUCLIDEAN:
            inverse = tl.zeros_like(norm) + 1
        radial = tl.load(state.fixed + at, mask=inside, other=0.0) * inverse
        tile = load_tile(rows, n, allowed, origin, BUILD)
        if rows.quality is None:
            slope = tl.load(grads.quality + at, mask=inside & allowed, other=0.0)
            if BUILD.NORMALIZED:
                slope = slope / tl.where(allowed, norm, 1.0)
            radial += slope
        elif BUILD.CHOSEN:
            prob = tl.load(state.prob + at, mask=inside, other=0.0)
            dot = tl.where(prob > 0, dot_rows(tile, vector, BUILD) - centre, 0.0)
            tl.store(state.dots + at, dot, mask=inside)
            mean += prob * dot
        gradient = ()
        for j in tl.static_range(BUILD.CHUNKS):
            gradient = gradient + (tile[j] * inverse[:, None] * radial[:, None],)  # their product may be infinite
        gradient = add_picks(gradient, rows, kept, state, origin, n, inside & allowed, begin, inverse, BUILD)
        for j in tl.static_range(BUILD.CHUNKS):
            cols = j * BUILD.CHUNK + tl.arange(0, BUILD.CHUNK)
            to = grads.rows + at[:, None] * rows.C + cols[None, :]
            written = (n < extent)[:, None] & (cols < rows.C)[None, :]
            chunk = gradient[j]
            if BUILD.EUCLIDEAN:  # of picks so far apart that the way between them is not a number; cosines' units are
                chunk = tl.where(allowed[:, None], chunk, 0.0)
            tl.store(to, chunk.to(grads.rows.dtype.element_ty), mask=written)
    if BUILD.CHOSEN and rows.quality is not None:
        tl.store(state.means + 2 * part.slots + part.slot + part.part, tl.sum(mean, axis=0))
    tl.debug_barrier()


@triton.jit
def meet(rows, part, phase, BUILD: tl.constexpr):
    """Wait for the other parts; returns the barrier's next phase."""
    if BUILD.SPLIT == COOPERATIVE:
        phase = grid_barrier(part.barrier + rows.set_id, part.part, part.parts, phase)
    return phase


@triton.jit
def padded_extent(rows, part, layout, BUILD: tl.constexpr):
    """Where the rows and padding of a part end: the last one has all of a set's padding."""
    extent = rows.count
    if layout.cu_seqlens is None:
        extent = layout.N
    if BUILD.SPLIT != WHOLE:
        extent = tl.where(part.part == part.parts - 1, extent, part.high)
    return extent


@triton.jit
def backward_set(rows, part, layout, saved, state, grads, weights, tau, K, turn, BUILD: tl.constexpr):
    """One part of one set: its rows [low, high), and what of the set's padding comes after, which gets zeros.

    Two phases a step (the part's sums, the parts' sum), then three: what precedes the rows' gradient, the rows'
    gradient, what waited for the first pick's mean. Launches take one phase each, in a cooperative launch there is a
    barrier between.
    """
    extent = padded_extent(rows, part, layout, BUILD)
    base = rows.set_id.to(tl.int64) * K
    picks = tl.load(saved.counts + rows.set_id).to(tl.int32)
    kept = Kept(saved.grad, saved.indices, saved.counts, saved.softmax, saved.gaps, saved.norms, base, picks)
    begin_back, end_back = 0, kept.picks - 1
    phase = turn
    if BUILD.SPLIT == LAUNCHES:
        begin_back = turn // 2
        end_back = tl.minimum(begin_back + 1, end_back)
    barrier = 0
    if BUILD.SPLIT == COOPERATIVE:
        barrier = barrier_phase(part.barrier + rows.set_id)
    for back in range(begin_back, end_back):  # @steps
        step = kept.picks - 1 - back
        if BUILD.SPLIT != LAUNCHES or phase % 2 == 0:
            mean, centre = arrive(rows, part, kept, state, step, back > 0, BUILD)
            prepare_step(rows, part, kept, state, weights, step, mean, back > 0, tau, BUILD)
            tl.debug_barrier()
            sum_rows(rows, part, kept, state, step, centre, BUILD)
        if BUILD.SPLIT != WHOLE:
            barrier = meet(rows, part, barrier, BUILD)
            if BUILD.SPLIT != LAUNCHES or phase % 2 == 1:
                sum_parts(rows, part, state, BUILD)
            barrier = meet(rows, part, barrier, BUILD)
    NORMS: tl.constexpr = BUILD.CHOSEN and rows.quality is None
    ending = 2 * (K - 1)
    if BUILD.SPLIT != LAUNCHES or phase >= ending:
        mean, centre = arrive(rows, part, kept, state, 0, kept.picks > 1, BUILD)
        if BUILD.SPLIT != LAUNCHES or phase == ending:
            prepare_write(rows, part, kept, state, grads, weights, mean, extent, tau, BUILD)
            if NORMS:
                dot_first(rows, part, kept, state, centre, BUILD)
        if NORMS:
            barrier = meet(rows, part, barrier, BUILD)
        if BUILD.SPLIT != LAUNCHES or phase == ending + 1:
            if NORMS:
                settle_quality(rows, part, kept, state, grads, tau, BUILD)
            write_rows(rows, part, kept, state, grads, centre, extent, BUILD)
        if BUILD.CHOSEN and not NORMS:
            barrier = meet(rows, part, barrier, BUILD)
            if BUILD.SPLIT != LAUNCHES or phase == ending + 2:
                settle_quality(rows, part, kept, state, grads, tau, BUILD)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def select_backward(
    rows_ptr,  # features: [B, N, C] by strides, or [T, C]
    quality_ptr,  # [R] float32, or None for the norms
    gamma_ptr,  # [1], or None for gamma_value
    gamma_value,
    tau_ptr,  # [1], or None for tau_value
    tau_value,
    noise_ptr,  # [K, R] float32, or None
    seed_ptr,  # [1] int64, or None
    seed_value: "i64",  # or negative: seed_ptr has it
    lengths_ptr,  # [B], or None
    cu_seqlens_ptr,  # [B + 1], or None
    grad_ptr,  # see `Kept`
    indices_ptr,
    earlier_ptr,  # [R] float32, or None
    counts_ptr,  # [B] int64
    softmax_ptr,
    gaps_ptr,
    norms_ptr,
    drows_ptr,  # out, as are the next: see `Grads`
    dquality_ptr,
    dgamma_ptr,
    arriving_ptr,  # scratch, as are the next: see `State`
    units_ptr,
    dcos_ptr,
    min_grad_ptr,
    prob_ptr,
    fixed_ptr,
    slope_ptr,
    dots_ptr,
    means_ptr,
    sums_ptr,
    totals_ptr,  # (split)
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
    saved = Kept(grad_ptr, indices_ptr, counts_ptr, softmax_ptr, gaps_ptr, norms_ptr, 0, 0)
    grads = Grads(drows_ptr, dquality_ptr, dgamma_ptr)
    of_rows = (min_grad_ptr, prob_ptr, fixed_ptr, slope_ptr, dots_ptr)
    state = State(arriving_ptr, units_ptr, dcos_ptr, *of_rows, means_ptr, sums_ptr, totals_ptr)
    weights = Weights(finite_or_nan(scalar(gamma_ptr, gamma_value)), scale)
    tau = scalar(tau_ptr, tau_value)
    if BUILD.LOOK == 0:
        set_id, above, longest = set_of(program // parts, layout, above, longest, BUILD.TWICE)
        x_ptr, first, count = place_of(set_id, rows_ptr, layout, BUILD)
        rows = Rows(x_ptr, stride_row, C, R, set_id, first, count, quality_ptr, None, earlier_ptr, noise_ptr, seed)
        low, high = bounds_of(count, program % parts, parts, BUILD)
        part = Part(low, high, program % parts, parts, set_id * parts, sets * parts, barrier_ptr)
        if (rows.count > above) & (rows.count <= longest):
            backward_set(rows, part, layout, saved, state, grads, weights, tau, K, turn, BUILD)
    else:
        end = tl.minimum((program + 1) * BUILD.LOOK, sets)
        set_id = next_set(program * BUILD.LOOK, end, above, longest, layout, BUILD.LOOK)
        while set_id < end:
            x_ptr, first, count = place_of(set_id, rows_ptr, layout, BUILD)
            rows = Rows(x_ptr, stride_row, C, R, set_id, first, count, quality_ptr, None, earlier_ptr, noise_ptr, seed)
            part = Part(0, count, 0, 1, set_id, sets, None)
            backward_set(rows, part, layout, saved, state, grads, weights, tau, K, turn, BUILD)
            set_id = next_set(set_id + 1, end, above, longest, layout, BUILD.LOOK)
