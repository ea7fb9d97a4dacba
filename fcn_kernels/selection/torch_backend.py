"""Coreset selection in PyTorch operations: the plain form, for whatever has neither Triton nor a C++ compiler.

It goes step by step as ``reference/listing.py`` does, over groups of sets that fit the cache, and writes the gradient
out instead of recording the steps. Shapes in comments: G sets of a group, n rows of its longest, C columns, K picks.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fcn_kernels.backends import without_autocast
from fcn_kernels.noise import STEPS_PER_DRAW, gumbel_noise
from fcn_kernels.selection.problem import Gradients, Problem, Saved, Selected
from fcn_kernels.selection.ranks import Ballot, Pool, Ranks
from fcn_kernels.sets import GROUP_BYTES, accumulator, finite_marks, row_norms, usable

# Sets of a packed batch share a padded group only if none is padded to more than twice its length.
MAX_PADDING = 2
LARGEST_EXPONENT = 64
"""Weights q^gamma of a set within 2^-64 to 2^64 are used as they are, others relative to the largest."""
LARGEST_GRADIENT_EXPONENT = 100
"""In the gradient a weight counts as 2^100 at the most."""
SMALL_NORM = 1e-15


def forward(p: Problem, keep: bool, ranks: Ranks | None = None) -> Selected:
    """Select; with ``keep``, also keep what :func:`backward` reads.

    Other ``ranks`` may have rows of the sets, too. Each needs a row here then, if only one that takes no part, and
    softmaxes are without their denominators.
    """
    out = Selected.empty(p, keep, normalizers=False)
    for tensor in (*out[:4], *out.kept):
        tensor.zero_()
    for tensor in (out.indices, *out.kept[2:]):  # no pick; and of a row that its norm is not wanted
        tensor.fill_(-1)
    with without_autocast(p.features.device.type):
        p = p.flat
        for group in _groups(p) if ranks is None else _all_sets(p):
            _select(p, group, out, ranks)
    return out


def backward(
    p: Problem, grad: Tensor, saved: Saved, ranks: Ranks | None = None, picked: Tensor | None = None
) -> Gradients:
    """Straight-through gradients, given ``grad`` (B, K, C) of the picked rows.

    Where other ``ranks`` have rows of the sets, too, these are given as ``picked`` (B, K, C), and gamma's gradient is
    of this rank's rows.
    """
    new = torch.empty_like if p.cu_seqlens is None else torch.zeros_like  # offsets may leave rows to no set
    dx = new(p.features, memory_format=torch.contiguous_format)
    dq = saved.norms.new_zeros(p.quality_shape)
    dgamma = saved.norms.new_zeros(())
    with without_autocast(p.features.device.type):
        p = p.flat
        for group in _groups(p) if ranks is None else _all_sets(p):
            dgamma += _differentiate(p, group, saved, grad, dx, dq.view(-1), ranks, picked)
    return Gradients(dx, dq, dgamma)


def unpickable_row(p: Problem) -> tuple[int, int, str] | None:
    """The first row that takes part and cannot be picked: its set, its number and the reason."""
    found: list[tuple[int, int, str]] = []
    p = p.flat
    for group in _groups(p):
        norms = _norms(p, group)
        quality = norms if p.quality is None else group.take(p.quality)
        bad = _takes_part(p, group) & ~usable(norms, quality)
        if bad.any():
            # sets are in order within a padded group, but not within a packed one, which is sorted by length
            at = min(bad.nonzero().tolist(), key=lambda place: (int(group.sets[place[0]]), place[1]))
            q, norm, raw = float(quality[*at]), float(norms[*at]), group.raw[*at]
            if not raw.isfinite().all():
                reason = "its features are not finite"
            elif not raw.any() and not p.euclidean:
                reason = "its features are all zero"
            elif not usable(norms[*at], norms[*at]):
                reason = f"its norm is {norm:g}, expected a normal number of {accumulator(raw.dtype)}"
            else:
                reason = f"its quality is {q:g}, expected finite and above 0"
            found.append((int(group.sets[at[0]]), at[1], reason))
    return min(found, default=None)


# --- sets side by side --------------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Some sets, side by side."""

    sets: Tensor  # (G,) their numbers
    at: slice | Tensor  # their places among the B
    where: slice | Tensor  # their rows among all R: a slice, or (G, n) places, -1 for padding of packed sets
    raw: Tensor  # (G, n, C) as given

    def take(self, values: Tensor) -> Tensor:
        """(..., R) -> (..., G, n); padding takes some other row's value."""
        if isinstance(self.where, slice):
            return values[..., self.where].unflatten(-1, self.raw.shape[:2])  # type: ignore[no-any-return]
        return values[..., self.where.clamp(min=0)]

    def put(self, values: Tensor, out: Tensor) -> None:
        """Write (..., G, n) to its place in (..., R)."""
        if isinstance(self.where, slice):
            out[..., self.where] = values.flatten(-2)
        else:
            real = self.where >= 0
            out[..., self.where[real]] = values[..., real]

    def rows_in(self, out: Tensor) -> Tensor | None:
        """The group's rows (G, n, C) in ``out``, of the features' shape, to write sums to; None if they are not so."""
        if isinstance(self.where, Tensor) or out.dtype != accumulator(out.dtype):
            return None
        return out.view(-1, out.shape[-1])[self.where].view(self.raw.shape)

    def put_rows(self, values: Tensor, at: slice, out: Tensor) -> None:
        """Write rows ``at`` of each set, (G, m, C), to their places in ``out``, of the features' shape."""
        flat = out.view(-1, out.shape[-1])
        if isinstance(self.where, slice):
            flat[self.where].unflatten(0, self.raw.shape[:2])[:, at] = values.to(out.dtype)
        else:
            real = self.where[:, at] >= 0
            flat[self.where[:, at][real]] = values[real].to(out.dtype)


def _groups(p: Problem) -> Iterator[_Group]:
    """The sets in groups of about GROUP_BYTES, the packed ones sorted by length. Sets without rows are in none."""
    row_bytes = p.dim * accumulator(p.features.dtype).itemsize
    device = p.features.device
    if p.cu_seqlens is None:
        sets, n = p.features.shape[:2]
        step = max(1, GROUP_BYTES // max(1, n * row_bytes))
        for first in range(0, sets if n else 0, step):
            last = min(first + step, sets)
            numbers = torch.arange(first, last, device=device)
            yield _Group(numbers, slice(first, last), slice(first * n, last * n), p.features[first:last])
        return
    starts = p.cu_seqlens.to(torch.int64).clamp(0, p.rows)  # compiled calls do not look at their values
    lengths = starts.diff().clamp(min=0)
    by_length, order = lengths.sort(descending=True, stable=True)
    sizes = by_length.tolist()
    first = 0
    while first < len(sizes) and sizes[first] > 0:
        longest, last = sizes[first], first + 1
        room = GROUP_BYTES // (longest * row_bytes)
        while last < len(sizes) and last - first < room and sizes[last] * MAX_PADDING >= longest:
            last += 1
        numbers = order[first:last]
        if last == first + 1:
            begin = int(starts[numbers])
            rows = slice(begin, begin + longest)
            yield _Group(numbers, numbers, rows, p.features[None, rows])
        else:
            column = torch.arange(longest, device=device)
            places = (starts[numbers, None] + column).masked_fill_(column >= lengths[numbers, None], -1)
            yield _Group(numbers, numbers, places, p.features[places.clamp(min=0)])
        first = last


def _all_sets(p: Problem) -> Iterator[_Group]:
    """All sets in one group, padded to the longest: ranks whose sets differ in length take the same steps."""
    numbers = torch.arange(p.sets, device=p.features.device)
    if p.sets and p.cu_seqlens is None:
        yield _Group(numbers, slice(0, p.sets), slice(0, p.rows), p.features)
    elif p.sets:
        starts, lengths = p.cu_seqlens[:-1, None], p.cu_seqlens.diff()[:, None]  # type: ignore[index, union-attr]
        column = torch.arange(max(1, int(lengths.max())), device=numbers.device)
        places = torch.where(column < lengths, starts + column, -1)
        yield _Group(numbers, numbers, places, p.features[places.clamp(min=0)])


def _takes_part(p: Problem, group: _Group) -> Tensor:
    """(G, n) bool: rows that are neither padding nor masked."""
    if isinstance(group.where, Tensor):
        return group.where >= 0
    if p.mask is not None:
        return group.take(p.mask)
    if p.lengths is not None:
        return torch.arange(group.raw.shape[1], device=group.raw.device) < p.lengths[group.at, None]
    return torch.ones(group.raw.shape[:2], dtype=torch.bool, device=group.raw.device)


class _Rows:
    """A group's rows, a block at a time that fits the cache, in the dtype in which they are summed.

    They are taken from an ``origin`` (G, C) of each set, where one is given.
    """

    def __init__(self, raw: Tensor, allowed: Tensor | None = None, origin: Tensor | None = None) -> None:
        self.raw, self.dtype, self.origin = raw, accumulator(raw.dtype), origin
        self.block = max(1, GROUP_BYTES // max(1, raw.shape[0] * raw.shape[2] * self.dtype.itemsize))
        self.allowed = None if allowed is None or bool(allowed.all()) else allowed[..., None]
        self.each = torch.arange(len(raw), device=raw.device)[:, None]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Places and rows (G, m, C). Rows that are not allowed are zero, as 0 * NaN would be NaN."""
        for first in range(0, self.raw.shape[1], self.block):
            at = slice(first, first + self.block)
            rows = self._from_origin(self.raw[:, at].to(self.dtype))
            yield at, rows if self.allowed is None else torch.where(self.allowed[:, at], rows, 0)

    def _from_origin(self, rows: Tensor) -> Tensor:
        return rows if self.origin is None else rows - self.origin[:, None]

    def norms(self) -> Tensor:
        """|x_n|, (G, n)."""
        return _joined([row_norms(rows) for _, rows in self.blocks()])

    def finite_marks(self) -> Tensor:
        """1 for rows of finite numbers, NaN for others, (G, n)."""
        return _joined([finite_marks(rows) for _, rows in self.blocks()])

    def squared_distances(self, vectors: Tensor) -> Tensor:
        """|x_n - v|^2 for each set's own v (G, C), (G, n): of differences, which rows far from the origin have, too."""
        largest = torch.finfo(self.dtype).max
        squares = [(rows - vectors[:, None]).square_().sum(-1) for _, rows in self.blocks()]
        return _joined(squares).clamp_(max=largest)

    def products(self, vectors: Tensor) -> Tensor:
        """x_n . v for each set's own v (G, C), (G, n). Equal rows give equal bits, wherever they lie."""
        return _joined([row_products(rows, vectors) for _, rows in self.blocks()])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """sum_n weights(n) x_n, (G, n) -> (G, C)."""
        return sum(torch.bmm(weights[:, None, at], rows)[:, 0] for at, rows in self.blocks())  # type: ignore[return-value]

    def take(self, places: Tensor) -> Tensor:
        """Rows (G, k, C) by their numbers (G, k) within the set."""
        return self._from_origin(self.raw[self.each, places].to(self.dtype))


def row_products(rows: Tensor, vectors: Tensor) -> Tensor:
    """rows (G, n, C) . vectors (G, C) -> (G, n), each row by itself."""
    if not rows.is_cpu or not rows.numel():
        return (rows * vectors[:, None]).sum(-1)
    number = torch.arange(len(rows) * rows.shape[1], device="cpu")
    return pair_products(rows.flatten(0, 1), vectors, number, number // rows.shape[1]).view(rows.shape[:2])


def pair_products(rows: Tensor, vectors: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """rows_i . vectors_j of rows (n, C) and vectors (m, C), for places i, j (P,): each pair by itself.

    A matrix product adds up the last rows of a block otherwise than the rest. On CPUs an embedding bag's gradient of
    its weights is such products, made in one read; the plain form reads and writes the rows once more.
    """
    if not rows.is_cpu:
        return (rows[i] * vectors[j]).sum(-1)
    along: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        vectors, rows, i, offsets=j[:0], offset2bag=j, mode=0
    )
    return along


def _joined(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _norms(p: Problem, group: _Group) -> Tensor:
    """|x_n| (G, n); of the Euclidean metric, which has no use for them, 1 for rows that are finite, else NaN."""
    x = _Rows(group.raw)
    return x.finite_marks() if p.euclidean else x.norms()


# --- the steps ----------------------------------------------------------------------------------------------------


class _Pick(NamedTuple):
    """A step's picks of a group."""

    row: Tensor  # (G,) number in the set
    at: Tensor  # (G,) place among this rank's rows; any where it is another's
    here: Tensor  # (G,) whether it is one of these
    score: Tensor  # (G,)
    distance: Tensor  # (G,) to the picks before
    features: Tensor  # (G, C), in the dtype in which rows are summed

    @classmethod
    def of(
        cls, group: _Group, x: "_Rows", at: Tensor, scores: Tensor, distances: Tensor, may: Tensor, ranks: Ranks | None
    ) -> "_Pick":
        """The best row of a group, ``at`` (G,), or that of all ranks; ``may`` (G, n): which can be picked."""
        score, distance, here = (values.gather(1, at[:, None])[:, 0] for values in (scores, distances, may))
        if ranks is None:
            return cls(at, at, torch.ones_like(here), score, distance, x.take(at[:, None])[:, 0])
        first = ranks.first[group.at]
        ours = torch.where(here, first + at, -1)
        best = ranks.agree(Ballot(score, distance, ours, group.raw[x.each[:, 0], at]))
        here = here & (best.row == ours)
        return cls(best.row, at, here, best.score, best.distance, best.features.to(score.dtype))


def _select(p: Problem, group: _Group, out: Selected, ranks: Ranks | None) -> None:
    """The K steps of a group, written to its places in ``out``."""
    norms = _norms(p, group)
    quality = norms if p.quality is None else group.take(p.quality)
    allowed = _takes_part(p, group) & usable(norms, quality)  # (G, n)
    given = before = None  # distances to what was picked earlier, in units of 1 and of 2^shift
    if p.min_distances is not None:
        given = before = group.take(p.min_distances)
        allowed &= given >= 0
    first, count, bounds = _opening(p, group, quality, allowed, ranks)
    counts = count.clamp(max=p.k if p.limits is None else p.limits[group.at])
    open_to = allowed.clone() if p.distinct else allowed  # the rows that may be picked next
    weight, exponent = weights_of(p, quality, allowed, bounds)
    x = _Rows(group.raw, allowed)

    gap, logits, shift = None, quality, None
    if before is not None:
        logits, before = before, _in_units(before, exponent)
    nearest = torch.full_like(quality, -1, dtype=torch.int64)
    picks: list[_Pick] = []
    infinite = norms.new_full((), math.inf)
    most = min(p.k, norms.shape[1] if ranks is None else max(1, int(ranks.all_rows.max())))
    for step, noise in zip(range(most), _noise(p, group, ranks), strict=False):
        scores = _scores(logits, noise, shift, open_to)
        may, place = open_to, _argmax(scores, open_to)
        if step == 0 and first is not None:
            may, place = _marked(first.clamp(min=0), first >= 0, open_to), first.clamp(min=0)
        known = step > 0 or before is not None
        reached = _reached(logits, shift, before, given) if known else infinite.expand_as(logits)
        pick = _Pick.of(group, x, place, scores, reached, may, ranks)
        picks.append(pick)
        made = (step < counts)[:, None]
        if out.kept:
            best = None if ranks is None else pick.score
            group.put(_softmax(scores, shift, float(p.tau), best) * made, out.kept[0][step])
        if step + 1 == most and not out.state:
            break
        if p.distinct:
            open_to &= ~_marked(pick.at, pick.here, open_to)
        fresh = _gaps(p, x, norms, pick, ranks)
        if out.kept and step + 1 < p.k:
            group.put(torch.where(allowed & made, fresh, 0), out.kept[1][step])
        if out.state:
            fresh = torch.where(made, fresh, math.inf)
            least = logits if step else infinite if before is None else before
            nearest = torch.where(fresh * weight < least, step, nearest)
        gap = fresh if gap is None else torch.minimum(gap, fresh)
        logits, shift = gap * weight, exponent
        if before is not None:
            logits = torch.minimum(logits, before)

    _put_picks(p, group, out, picks, counts)
    if out.kept:
        group.put(torch.where(allowed, norms, -1), out.kept[2])
    if out.state:
        # a squared distance times its weight may have left the range: it ends at the largest number
        nearest = torch.where((logits == math.inf) & (counts > 0)[:, None], 0, nearest)
        taken = torch.zeros_like(allowed)
        for step, pick in enumerate(picks if p.distinct else ()):
            taken |= _marked(pick.at, pick.here & (step < counts), taken)
        _put_state(p, group, out, allowed, taken, _reached(logits, shift, before, given), nearest)


def _opening(
    p: Problem, group: _Group, quality: Tensor, allowed: Tensor, ranks: Ranks | None
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The given first picks (G,) or None, how many rows can be picked (G,), and the bounds of their qualities (G, 2)
    where others have rows, too. In a set whose start cannot be picked, no row is ``allowed`` (G, n) from here on."""
    first, bounds, startable = None, None, torch.ones_like(allowed[:, 0])
    if p.start is not None:
        first = p.start[group.at].to(torch.int64) - (0 if ranks is None else ranks.first[group.at])
        in_range = (first >= 0) & (first < group.raw.shape[1])
        first = torch.where(in_range, first, 0)
        startable = in_range & allowed.gather(1, first[:, None])[:, 0]
        first = torch.where(startable, first, -1)
    count = allowed.sum(-1)
    if ranks is not None:
        pool = ranks.pool(Pool.of(quality, allowed, startable))
        count, bounds = pool.usable.to(torch.int64), torch.stack((pool.least, pool.greatest), -1)
        startable = pool.given > 0
    if first is not None:
        allowed &= startable[:, None]
        count = torch.where(startable, count, 0)
    return first, count, bounds


def _marked(at: Tensor, here: Tensor, like: Tensor) -> Tensor:
    """True (G, n) at the places ``at`` (G,) of the sets where they are ``here`` (G,)."""
    return torch.zeros_like(like, dtype=torch.bool).scatter_(1, at[:, None], here[:, None])


def _put_picks(p: Problem, group: _Group, out: Selected, picks: list[_Pick], counts: Tensor) -> None:
    made = torch.arange(len(picks), device=counts.device) < counts[:, None]  # (G, up to K)
    reached = torch.stack([pick.distance for pick in picks], 1).nan_to_num(0.0, math.inf, -math.inf)
    reached[:, 1:].clamp_(max=torch.finfo(reached.dtype).max)  # the first may have no distance
    indices, features = torch.stack([pick.row for pick in picks], 1), torch.stack([pick.features for pick in picks], 1)
    if not made.all():  # where no pick was made, the row in its place may not be finite
        indices, reached = torch.where(made, indices, -1), torch.where(made, reached, 0)
        features = torch.where(made[..., None], features, 0)
    out.indices[group.at, : len(picks)] = indices
    out.distances[group.at, : len(picks)] = reached
    out.features[group.at, : len(picks)] = features.to(p.features.dtype)
    out.counts[group.at] = counts


def _reached(logits: Tensor, shift: Tensor | None, before: Tensor | None, given: Tensor | None) -> Tensor:
    """Distances (G, n) in units of 1; as they were ``given`` where that is what they are."""
    distances = reported(logits, shift)
    if shift is None or before is None or given is None:
        return distances
    return torch.where(logits == before, given, distances)


def _put_state(
    p: Problem, group: _Group, out: Selected, allowed: Tensor, taken: Tensor, least: Tensor, nearest: Tensor
) -> None:
    """Write the running minima (G, n), -inf for rows that are ``taken``, and the picks so near."""
    largest = torch.finfo(least.dtype).max
    alone = least if p.min_distances is not None else math.inf  # where no pick is near
    least = torch.where(nearest >= 0, least.clamp(max=largest), alone)
    least = torch.where(allowed, least, group.take(out.state[0]))
    group.put(torch.where(taken, -math.inf, least), out.state[0])
    group.put(torch.where(allowed, nearest, -1), out.state[1])


def weights_of(
    p: Problem, quality: Tensor, allowed: Tensor, bounds: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """s q^gamma / 2^E (G, n), and E (G, 1) or None: E is 0 unless a set's weights leave 2^-64 to 2^64.

    Dividing a set's weights by one number changes no pick. With noise, which has a scale of its own, small weights are
    left small. ``bounds`` (G, 2) are those of the qualities of allowed rows, where these are not all rows of the set.
    """
    gamma, scale = float(p.gamma), float(p.distance_scale)
    if not math.isfinite(gamma):
        return torch.full_like(quality, math.nan), None
    powers = power(quality, gamma)
    plain, most = scale * powers, 2.0**LARGEST_EXPONENT
    if bounds is None:
        ends, inside = quality, allowed
    else:
        inside = (bounds[:, :1] <= bounds[:, 1:]).expand_as(bounds)  # not so of a set without rows
        ends = torch.where(inside, bounds, 1)
        powers = power(ends, gamma)
    least, largest = (float(bound) for bound in powers.aminmax())
    if least * min(scale, 1) >= 1 / most and largest * max(scale, 1) <= most:  # false if one is NaN
        return plain, None
    exponent = torch.where(inside, gamma * ends.double().log2(), 0)
    widest = torch.maximum(exponent.abs(), (exponent + math.log2(scale)).abs())
    extreme = (torch.where(inside, widest, 0) > LARGEST_EXPONENT).any(-1, keepdim=True)  # (G, 1)
    unit = torch.where(inside, exponent + math.log2(scale), -math.inf).amax(-1, keepdim=True).floor()
    if p.noise is not None or p.seed is not None:
        unit = unit.clamp(min=0)
    shift = torch.where(extreme, unit, 0)
    exponent = torch.where(allowed, gamma * quality.double().log2(), 0) + math.log2(scale)
    weight = torch.where(extreme, _exp2(exponent - shift).to(plain.dtype), plain)
    return torch.where(allowed & (weight >= torch.finfo(weight.dtype).tiny), weight, 0), shift


def power(base: Tensor, exponent: float | Tensor) -> Tensor:
    """base ** exponent, the same bits wherever an element lies. On CPUs the last elements of a block would take
    another path than whole vectors do; where results do not lie side by side, all take that path."""
    if not base.is_cpu:
        return base**exponent
    return torch.pow(base, exponent, out=_apart(base))


def _exp2(exponent: Tensor) -> Tensor:
    """2 ** exponent, likewise."""
    return torch.exp2(exponent, out=_apart(exponent)) if exponent.is_cpu else torch.exp2(exponent)


def _apart(like: Tensor) -> Tensor:
    """Memory for results that do not lie side by side."""
    return like.new_empty(*like.shape, 2)[..., 0]


def _scores(logits: Tensor, noise: Tensor | None, shift: Tensor | None, open_to: Tensor) -> Tensor:
    """What a step compares, in units of 2^shift, (G, n): -inf for NaN and for rows that may not be picked."""
    if noise is not None:
        logits = logits + (noise if shift is None else noise * _exp2(-shift).to(noise.dtype))
    return torch.where(open_to & (logits > -math.inf), logits, -math.inf)


def _argmax(scores: Tensor, open_to: Tensor) -> Tensor:
    """The first row of the highest score that may be picked, (G,); 0 where none may."""
    best, pick = scores.max(-1)
    if best.amin() > -math.inf:
        return pick
    return torch.where(best == -math.inf, open_to.to(torch.uint8).argmax(-1), pick)


def _softmax(scores: Tensor, shift: Tensor | None, tau: float, greatest: Tensor | None = None) -> Tensor:
    """exp(z / tau) / sum exp(z / tau) (G, n); 0 for all where no score is finite. Without the denominator if the
    ``greatest`` (G,) is given, that of all ranks' scores."""
    best = scores.amax(-1, keepdim=True) if greatest is None else greatest[:, None]
    below = torch.where(best.isfinite(), scores - best, -math.inf)
    soft = torch.exp(_shifted(below, shift) / tau)
    return soft / soft.sum(-1, keepdim=True).clamp(min=1) if greatest is None else soft


def _shifted(values: Tensor, shift: Tensor | None) -> Tensor:
    """values * 2^shift (None: as they are) within the dtype's range, 0 for NaN; a float64 holds what is between."""
    if shift is None:
        return values
    largest = torch.finfo(values.dtype).max
    return _scaled(values, shift).nan_to_num(0.0, math.inf, -math.inf).clamp(max=largest).to(values.dtype)


def _in_units(distances: Tensor, shift: Tensor | None) -> Tensor:
    """Distances in units of 2^shift (None: of 1)."""
    return distances if shift is None else _scaled(distances, -shift).to(distances.dtype)


def _scaled(values: Tensor, shift: Tensor) -> Tensor:
    """values * 2^shift, float64."""
    half = _exp2(shift.clamp(-2000, 2000) / 2)  # 2^shift itself may leave a float64's range
    return values.double() * half * half


def reported(distances: Tensor, shift: Tensor | None) -> Tensor:
    """Distances in units of 1; 0 for those that are no normal number in units of 2^shift."""
    if shift is None:
        return distances
    return _shifted(torch.where(distances >= torch.finfo(distances.dtype).tiny, distances, 0), shift)


def _gaps(p: Problem, x: _Rows, norms: Tensor, pick: _Pick, ranks: Ranks | None) -> Tensor:
    """Distances to picked rows without their weights, (G, n): 1 - cos(x_n, row), or |x_n - row|^2.

    Exactly 0 for the pick and its duplicates, whatever their cosine rounds to.
    """
    if p.euclidean:
        return x.squared_distances(pick.features)
    at = pick.at[:, None]
    length = norms.gather(1, at) if ranks is None else row_norms(pick.features)[:, None]
    direction = pick.features if p.normalized else pick.features / length
    cosine = x.products(direction)
    if not p.normalized:
        cosine = cosine / norms
    if ranks is None:
        alike = cosine == cosine.gather(1, at)
    else:
        own = row_products(pick.features[:, None], direction)
        alike = (cosine == (own if p.normalized else own / length)) | _marked(pick.at, pick.here, norms)
    return torch.where(alike, 0, 1 - cosine).clamp_(min=0)


def _noise(p: Problem, group: _Group, ranks: Ranks | None) -> Iterator[Tensor | None]:
    """The Gumbel noise (G, n) of each step in turn, or None for argmax."""
    first = 0 if ranks is None else ranks.first[group.at, None]
    for step in range(p.k):
        if p.noise is not None:
            yield group.take(p.noise[step])
        elif p.seed is None:
            yield None
        else:
            if step % STEPS_PER_DRAW == 0:
                drawn = gumbel_noise(int(p.seed), group.sets, group.raw.shape[1], step // STEPS_PER_DRAW, first)
            yield drawn[step % STEPS_PER_DRAW]


# --- the gradient -------------------------------------------------------------------------------------------------


def _differentiate(
    p: Problem, group: _Group, saved: Saved, grad: Tensor, dx: Tensor, dq: Tensor, ranks: Ranks | None,
    picked: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write the group's dx and dq; returns its part of dgamma.

    The picks are walked from the last to the first, as each one's gradient c_k is complete only when the later ones,
    whose distances it took part in, are done. With y_k the softmax, dz_k = y_k (c_k . x - sum y_k c_k . x) / tau goes
    down the running minimum to the distances d_j, and from there to the rows and to the picks before.
    """
    allowed = (group.take(saved.norms) > 0) & _takes_part(p, group)  # (G, n)
    norms = torch.where(allowed, group.take(saved.norms), 1)
    quality = norms if p.quality is None else torch.where(allowed, group.take(p.quality), 1)
    gaps, softmax = (torch.where(allowed, group.take(kept), 0) for kept in (saved.gaps, saved.softmax))
    made = saved.indices[group.at] >= 0  # (G, K)
    places = saved.indices[group.at]  # of the picks among our rows; -1: none
    if ranks is not None:
        places = ranks.places(saved.indices)[group.at]
    total = (lambda values: values) if ranks is None else ranks.sum
    arriving = torch.where(made[..., None], grad[group.at].to(norms.dtype), 0)  # c, (G, K, C)
    rows = _Rows(group.raw).take(places.clamp(min=0)) if picked is None else picked[group.at].to(norms.dtype)
    rows = torch.where(made[..., None], rows, 0)  # (G, K, C)
    # differences are the same from any origin, and small from a near one
    origin = rows[:, 0] if p.euclidean else None
    x = _Rows(group.raw, allowed, origin)
    if p.euclidean:
        rows = torch.where(made[..., None], rows - rows[:, :1], 0)
    projected = not (p.normalized or p.euclidean)
    pick_norms = torch.where(made, row_norms(rows), 1) if projected else torch.ones_like(rows[..., 0])
    units = rows / pick_norms[..., None]  # u_j, (G, K, C)
    weight, exponent = weights_of(p, quality, allowed)
    shares = _shares(gaps)
    if p.min_distances is not None:
        before = group.take(p.min_distances)
        distances = gaps * weight
        before = _in_units(before, exponent)
        shares = torch.where(distances < before, shares, torch.where(distances == before, shares.clamp(max=0.5), 0))
    weight = _shifted(weight, None if exponent is None else exponent.clamp(max=LARGEST_GRADIENT_EXPONENT))
    gamma = float(p.gamma)
    if not math.isfinite(gamma):
        gamma, weight = 0.0, torch.zeros_like(weight)

    # Of cosines; where distances are squared, twice their gradients: dx_n = sum_j dcos_j(n) (x_j - x_n).
    dcos = torch.zeros_like(gaps)  # (K - 1, G, n)
    weight_term = torch.zeros_like(norms)  # w dw
    chain = torch.zeros_like(norms)  # the gradient of the running minimum
    for step in range(p.k - 1, 0, -1):
        pick = step - 1
        chain = chain + _softmax_gradient(p, x, arriving[:, step], softmax[step], rows[:, step], total)
        ddistance = chain * shares[pick]
        chain = chain - ddistance
        if not p.normalized:  # a pick is 0 away from itself, wherever it moves
            ddistance = ddistance.masked_fill(_marked(places[:, pick].clamp(min=0), places[:, pick] >= 0, allowed), 0)
        weight_term += ddistance * gaps[pick] * weight
        dcos[pick] = (-2 if p.euclidean else -1) * weight * ddistance
        pull = x.weighted_sum(dcos[pick] / norms if projected else dcos[pick])
        if p.euclidean:
            pull = pull - dcos[pick].sum(-1, keepdim=True) * units[:, pick]
        elif projected:
            along = (pull * units[:, pick]).sum(-1, keepdim=True)
            pull = (pull - along * units[:, pick]) / pick_norms[:, pick, None]
        arriving[:, pick] += total(pull)

    dquality = gamma * weight_term / quality
    if p.by_quality:  # else the first pick's softmax is none of the quality
        dquality += _softmax_gradient(p, x, arriving[:, 0], softmax[0], rows[:, 0], total)
    radial = torch.zeros_like(norms)  # dx_n has radial(n) u_n
    if p.euclidean:
        radial = -dcos.sum(0)
    elif projected:
        radial = -(dcos * (1 - gaps)).sum(0) / norms
    if p.quality is None:
        radial += dquality
    _write_rows(p, group, x, dx, norms, dcos, radial, units, arriving, places)
    group.put(torch.where(allowed, dquality, 0), dq)
    return (weight_term * quality.log()).sum()


def _softmax_gradient(
    p: Problem, x: _Rows, arriving: Tensor, softmax: Tensor, row: Tensor, total: Callable[[Tensor], Tensor]
) -> Tensor:
    """dz(n) = y(n) (x_n . c - sum_m y(m) x_m . c) / tau for the gradient c (G, C) at the picked ``row``, (G, n).

    The mean is the same from any origin. Taken from the pick's own product, whose softmax is nearly 1 where tau is
    small, little is lost in the differences.
    """
    along = x.products(arriving)
    along = torch.where(softmax > 0, along - row_products(row[:, None], arriving), 0)
    dz = softmax * (along - total((softmax * along).sum(-1, keepdim=True))) / float(p.tau)
    return torch.where(softmax > 0, dz, 0)  # also where the mean is infinite


def _shares(gaps: Tensor) -> Tensor:
    """The part of d(running minimum) that goes to each distance: 1 where it is the least so far, 1/2 at a tie, or 0."""
    before = torch.cat((torch.full_like(gaps[:1], math.inf), gaps.cummin(0).values[:-1]))
    return torch.heaviside(before - gaps, gaps.new_full((), 0.5))


def _write_rows(
    p: Problem, group: _Group, x: _Rows, dx: Tensor, norms: Tensor, dcos: Tensor, radial: Tensor, units: Tensor,
    arriving: Tensor, places: Tensor,
) -> None:  # fmt: skip
    """dx_n = sum_j dcos_j(n) u_j / |x_n| + radial(n) u_n, and on the picked rows their own gradients."""
    each = torch.arange(len(places), device=places.device)
    if not p.normalized:
        dcos = dcos / norms
    tiny = bool((norms < SMALL_NORM).any())  # then radial(n) / |x_n| may be infinite where dx is not
    out = group.rows_in(dx)
    for at, rows in x.blocks():
        scale = radial[:, at] if tiny else radial[:, at] / norms[:, at]
        place = None if out is None else out[:, at]
        part = torch.mul(rows / norms[:, at, None] if tiny else rows, scale[..., None], out=place)
        part.baddbmm_(dcos[:, :, at].permute(1, 2, 0), units[:, : p.k - 1])
        for step in range(p.k):
            number = torch.where(places[:, step] < 0, -1, places[:, step] - at.start)
            here = (number >= 0) & (number < part.shape[1])
            part[each, torch.where(here, number, 0)] += torch.where(here[:, None], arriving[:, step], 0)
        if place is None:
            group.put_rows(part, at, dx)
