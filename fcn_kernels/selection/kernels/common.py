"""What the forward and the backward pass share: the bundles that device functions hand on, scalars of rows, units.

Both passes are made of two loops. The *tile loop* reads rows, a tile [n, c] at a time, and makes products. The *scalar
loop* works on what is known of a row, a row to a thread: norm, quality, distance, noise, softmax. What one loop makes
for the other stands in memory, a number a row. Loops carry a mark, as `# @tiles`, by which benchmarks/model finds them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fcn_kernels.device.noise import gumbel_noise, seed_of
from fcn_kernels.device.rows import locate
from fcn_kernels.device.splits import WHOLE, divide

ANY_CACHE = tl.constexpr("")  # a load's modifier; Triton 3.6 takes no plain string as a default
NO_ROW = tl.constexpr(2147483647)  # above all rows, so that a minimum over rows passes it by

# Rows that left the softmax under `distinct` carry this as their gap: below every gap, so that the running minimum
# keeps it, and below the lowest that a gap with the tie bit can be.
TAKEN = tl.constexpr(-3.4028234663852886e38)
MOST_GAP = tl.constexpr(3.4028232635611926e38)  # the number before the largest: squared distances end there

# Norms outside are computed again from rows that were divided by a power of two: squares leave float32's range.
LEAST_NORM = tl.constexpr(1e-15)
MOST_NORM = tl.constexpr(1e15)
LEAST_FLOAT = tl.constexpr(1.1754943508222875e-38)  # the smallest normal number
MOST_FLOAT = tl.constexpr(3.4028234663852886e38)
SAME_COSINE = tl.constexpr(1e-6)  # two sums of the same 4,096 products in other orders
MOST_LOG2 = tl.constexpr(64.0)  # of weights that need no unit of their own
MOST_WEIGHT_LOG2 = tl.constexpr(100)  # of a weight in a gradient

# Call-dependent scalars. Specializing on 1 or 16-divisibility would recompile without helping address arithmetic.
UNSPECIALIZED = ["seed_value", "sets", "parts", "turn", "N", "K", "R", "above", "longest"]


class Constants(NamedTuple):
    """What a kernel is built for, handed on as one constant, ``BUILD``."""

    SEEDED: tl.constexpr  # noise is drawn
    NORMALIZED: tl.constexpr
    EUCLIDEAN: tl.constexpr  # gaps are |x_n - x_i|^2, not 1 - cosine; norms are 1, or NaN of rows that are not finite
    TIGHT: tl.constexpr  # rows are of CHUNK columns and lie side by side: what the compiler has to know of short ones
    SPLIT: tl.constexpr  # where the parts of a set meet: see `fcn_kernels.device.splits`
    BLOCK_N: tl.constexpr  # rows of a tile
    CHUNK: tl.constexpr  # columns at a time
    CHUNKS: tl.constexpr
    BLOCK_C: tl.constexpr  # C up to the next power of two
    BLOCK_P: tl.constexpr  # parts up to the next power of two
    BLOCK_R: tl.constexpr  # rows at a time in the scalar loops
    FOLD: tl.constexpr  # rows of a tile in different threads
    TWICE: tl.constexpr = tl.constexpr(False)  # two programs a set: the first takes a long one, the second a short one
    LOOK: tl.constexpr = tl.constexpr(0)  # sets that a program looks through for long ones; 0: it has one
    # forward
    DISTINCT: tl.constexpr = tl.constexpr(False)
    KEEP: tl.constexpr = tl.constexpr(False)  # what the backward pass reads
    STATE: tl.constexpr = tl.constexpr(False)  # what another call goes on from: a pass after the last pick, too
    HELD: tl.constexpr = tl.constexpr(False)  # rows stay in registers from step to step: a set is a tile
    EARLY: tl.constexpr = tl.constexpr(False)  # the first pick needs no pass: K > 1, and a quality or a start is given
    LATE: tl.constexpr = tl.constexpr(0)  # rows at a time that meet picks late: see `lazy.py`
    # backward
    CHOSEN: tl.constexpr = tl.constexpr(False)  # the first pick was chosen by quality
    BLOCK_S: tl.constexpr = tl.constexpr(0)  # columns at a time where the parts' sums are added


class Rows(NamedTuple):
    """One set's rows and what is given for them; pointers are None for what is not given."""

    features: Any  # [count, C] by stride, at the set's first row
    stride: Any
    C: Any
    R: Any  # rows of all sets
    set_id: Any
    first: Any  # the set's first among all R
    count: Any
    quality: Any  # [R] float32
    mask: Any  # [R] bool
    earlier: Any  # [R] float32, distances to what was picked before this call; negative: never to be picked
    noise: Any  # [K, R] float32
    seed: Any  # (pointer, value), see `seed_of`


class Part(NamedTuple):
    """This program's rows [low, high) of the set, and where the parts of a set meet."""

    low: Any
    high: Any
    part: Any
    parts: Any
    slot: Any  # of the set's first part
    slots: Any  # of all sets
    barrier: Any  # [B] int32, see `grid_barrier` (cooperative)


class Weights(NamedTuple):
    """What q^gamma is made with."""

    gamma: Any  # NaN if it is not finite
    scale: Any


# Bundles are made in the kernels, not returned to them: Triton 3.6 takes no None out of a function.


@triton.jit
def place_of(set_id, rows_ptr, layout, BUILD: tl.constexpr):
    """Where a set's rows begin, the first's number among all R, and how many there are."""
    first, count, offset = locate(set_id, layout)
    if BUILD.TIGHT:
        offset = offset // BUILD.CHUNK * BUILD.CHUNK  # which the compiler would not know
    return rows_ptr + offset, first, count


@triton.jit
def bounds_of(count, part, parts, BUILD: tl.constexpr):
    """The rows [low, high) of a part of a set, all of them where it is not split."""
    low, high = 0, count
    if BUILD.SPLIT != WHOLE:
        low, high = divide(count, part, parts, BUILD.BLOCK_N)
    return low, high


@triton.jit
def picks_of(set_id, limits_ptr, K):
    """How many picks a set is to have."""
    limit = K
    if limits_ptr is not None:
        limit = tl.minimum(tl.maximum(tl.load(limits_ptr + set_id), 0), K).to(tl.int32)
    return limit


@triton.jit
def load_cols(pointer, C, j: tl.constexpr, CHUNK: tl.constexpr, CACHE: tl.constexpr = ANY_CACHE):
    """Columns of chunk j of a vector, [c]."""
    cols = j * CHUNK + tl.arange(0, CHUNK)
    return tl.load(pointer + cols, mask=cols < C, other=0.0, cache_modifier=CACHE)


@triton.jit
def load_vector(pointer, C, BUILD: tl.constexpr, CACHE: tl.constexpr = ANY_CACHE):
    """A vector's chunks [1, c], before a loop that needs them for each tile: there a load is two barriers."""
    vector = ()
    for j in tl.static_range(BUILD.CHUNKS):
        vector = vector + (load_cols(pointer, C, j, BUILD.CHUNK, CACHE)[None, :],)
    return vector


@triton.jit
def scalar(pointer, value):
    """A number of the call: given by value, or read on the device, where the host need not wait for it."""
    if pointer is not None:
        value = tl.load(pointer)
    return tl.cast(value, tl.float32)


@triton.jit
def finite_or_nan(number):
    """NaN for a number that is not finite."""
    return tl.where(tl.abs(number) < float("inf"), number, float("nan"))


@triton.jit
def power_of_two(exponent):
    """2^exponent for an int32 within [-126, 127], the nearest of those for others."""
    bits = (tl.minimum(tl.maximum(exponent, -126), 127) + 127) << 23
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def times_power_of_two(number, exponent):
    """number 2^exponent, for an exponent up to the double of what a float32 has."""
    half = exponent // 2
    return number * power_of_two(half) * power_of_two(exponent - half)


@triton.jit
def noise_unit(exponent):
    """What noise is multiplied by where distances are in units of 2^exponent; 0 if that leaves nothing of it."""
    return times_power_of_two(1.0, tl.maximum(-tl.maximum(exponent, 0), -252))


@triton.jit
def downscale_of(largest):
    """A power of two that takes numbers up to ``largest`` to about 1."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    return (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def is_extreme(norm):
    """Whether a norm has to be made of scaled rows; not so those of rows that cannot be picked, which are -1 or NaN."""
    return ((norm >= 0) & (norm < LEAST_NORM)) | (norm > MOST_NORM)


@triton.jit
def is_usable_norm(norm):
    """Whether rows of these norms may be picked, as `fcn_kernels.sets.usable` says; not so those marked -1 or NaN."""
    return (norm >= LEAST_FLOAT) & (norm <= MOST_FLOAT)


@triton.jit
def log2_weight(weights, quality):
    """log2 of scale q^gamma [n]; 0 without a finite gamma."""
    value = weights.gamma * tl.log2(quality) + tl.log2(weights.scale)
    return tl.where(value == value, value, 0.0)


@triton.jit
def weight_of(weights, quality, exponent):
    """scale q^gamma 2^-exponent [n]."""
    log2 = weights.gamma * tl.log2(quality)
    plain = (exponent == 0) & (tl.abs(log2) <= MOST_WEIGHT_LOG2)
    shift = tl.where(plain, 0.0, tl.log2(weights.scale) - exponent.to(tl.float32))
    return tl.where(plain, weights.scale, 1.0) * tl.exp2(log2 + shift)


@triton.jit
def load_earlier(rows, n, inside):
    """Distances [n] to what was picked before this call, where there are any."""
    return tl.load(rows.earlier + rows.first + n, mask=inside, other=0.0)


@triton.jit
def opening_logits(rows, quality, n, inside):
    """What the first pick is the best of [n]: the quality, or the distance to what was picked before this call."""
    if rows.earlier is not None:
        quality = load_earlier(rows, n, inside)
    return quality


@triton.jit
def distance_of(logits, exponent):
    """Distances [n] in units of 1, at most the largest number."""
    distance = times_power_of_two(logits, tl.minimum(tl.maximum(exponent, -252), 252))
    return tl.where(distance == distance, tl.minimum(distance, MOST_FLOAT), 0.0)


@triton.jit
def add_noise(logits, rows, n, inside, step, unit, SEEDED: tl.constexpr):
    """Scores [n]: logits in units of 1 / ``unit`` with the step's Gumbel noise; NaN counts as -inf.

    The seed is read here, each time: rows of 1,024 columns leave no registers to hold it.
    """
    if rows.noise is not None:
        logits += unit * tl.load(rows.noise + step * rows.R + rows.first + n, mask=inside, other=0.0)
    elif SEEDED:
        logits += unit * gumbel_noise(seed_of(*rows.seed), n, step, rows.set_id)
    return tl.where(logits == logits, logits, float("-inf"))


@triton.jit
def softmax_term(score, peak, exponent, tau):
    """exp((z - peak) / tau) [n] for scores in units of 2^exponent; 0 where either is not finite."""
    peak += tl.zeros_like(score)  # [n]
    known = (peak < float("inf")) & (peak > float("-inf")) & (score > float("-inf"))
    # Rounding must not take a score above the best.
    difference = tl.minimum(tl.where(known, score - peak, 0.0), 0.0) * power_of_two(exponent)
    return tl.where(known, tl.exp(difference / tau), 0.0)
