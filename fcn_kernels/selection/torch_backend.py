"""Coreset selection in PyTorch operations: the backend of whatever has neither Triton nor a C++ compiler.

What makes it fast is what makes the kernels fast: no one-hot products, no unit rows, and memory order. A group of
sets that fits the cache goes through all K steps before the next group starts; a larger set is walked in blocks.
With gap(n) = |x_n| (1 - max_j cos_j(n)) a step is one product, one minimum and one maximum over the set.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fcn_kernels.noise import STEPS_PER_DRAW, gumbel_noise
from fcn_kernels.selection.problem import Gradients, Problem, Saved, Selected
from fcn_kernels.selection.rows import Rows
from fcn_kernels.sets import GROUP_BYTES, accumulator

# Sets of a packed batch share a padded group only if none is padded to more than twice its length.
MAX_PADDING = 2


def forward(p: Problem, keep: bool) -> Selected:
    """Select; with ``keep``, also keep what :func:`backward` reads."""
    out: Selected | None = None
    with _no_autocast(p.features.device.type):
        for group in _groups(p):
            part = _select(p, group, keep)
            if isinstance(group.at, slice) and group.sets.numel() == p.sets:
                return part
            out = out or _nothing(p, keep)
            for whole, of_sets in zip(out[:4], part[:4], strict=True):
                whole[group.at] = of_sets
            for kept, of_sets in zip(out.kept, part.kept, strict=True):
                group.put(of_sets.unflatten(-1, group.raw.shape[:2]), kept)
    return out or _nothing(p, keep)


def _nothing(p: Problem, keep: bool) -> Selected:
    """What sets without a row give."""
    out = Selected.empty(p, keep, normalizers=False)
    for tensor in (*out[:4], *out.kept):
        tensor.zero_()
    for tensor in (out.indices, *out.kept[2:]):  # no pick; of the rows' norms, that they cannot be picked
        tensor.fill_(-1)
    return out


def backward(p: Problem, grad: Tensor, saved: Saved) -> Gradients:
    """Straight-through gradients, given ``grad`` (B, K, C) of the picked rows.

    The picks are walked from the last to the first, as each one's gradient is complete only when the later ones,
    whose distances it took part in, are done. With c_k the gradient at pick k and y_k its softmax,
    dz_k = y_k (x.c_k - sum y_k x.c_k) / tau goes down the running minimum to the cosines, and from there to the
    rows and to the picks before.
    """
    dx = torch.empty_like(p.features, memory_format=torch.contiguous_format)
    dq = torch.zeros_like(saved.norms)
    dgamma = saved.norms.new_zeros(())
    with _no_autocast(p.features.device.type):
        for group in _groups(p):
            dgamma += _backpropagate(p, group, saved, grad, dx, dq)
    return Gradients(dx, dq, dgamma)


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Products in the dtype of their operands; where autocast is off, without the cost of entering it."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


def unpickable_row(p: Problem) -> tuple[int, int, str] | None:
    """The first row that takes part and cannot be picked: its set, its number and the reason."""
    found: list[tuple[int, int, str]] = []
    for group in _groups(p):
        norms = Rows(group.raw).norms()
        quality = norms if p.quality is None else group.take(p.quality)
        bad, takes_part = ~_usable(norms, quality), _takes_part(p, group)
        if takes_part is not None:
            bad &= takes_part
        if bad.any():
            # numbers of sets do not fall within a padded group, but do within a packed one, sorted by length
            at = min(bad.nonzero().tolist(), key=lambda place: (int(group.sets[place[0]]), place[1]))
            q, norm = float(quality[*at]), float(norms[*at])
            if not norm < torch.inf:
                reason = "its features are not finite"
            elif norm == 0:
                reason = "its features are all zero"
            else:
                reason = f"its quality is {q:g}, expected finite and above 0"
            found.append((int(group.sets[at[0]]), at[1], reason))
    return min(found, default=None)


class _Group(NamedTuple):
    """Some sets, side by side."""

    sets: Tensor  # (G,) their numbers
    at: slice | Tensor  # their places among the B
    where: slice | Tensor  # their rows among all R: a slice, or (G, n) positions, -1 for padding
    raw: Tensor  # (G, n, C) as given

    def take(self, values: Tensor) -> Tensor:
        """(..., R) -> (..., G, n); padding takes some other row's value."""
        if isinstance(self.where, slice):
            return values[..., self.where].view(*values.shape[:-1], *self.raw.shape[:2])
        return values.index_select(-1, self.where.flatten().clamp(min=0)).view(*values.shape[:-1], *self.where.shape)

    def put(self, values: Tensor, out: Tensor) -> None:
        """Write (..., G, n) to its place in (..., R)."""
        if isinstance(self.where, slice):
            out[..., self.where] = values.flatten(-2)
        else:
            real = self.where >= 0
            out[..., self.where[real]] = values[..., real]


def _groups(p: Problem) -> Iterator[_Group]:
    """The sets in groups of about GROUP_BYTES, the packed ones sorted by length."""
    accumulate = accumulator(p.features.dtype)
    row_bytes = p.dim * accumulate.itemsize
    if p.cu_seqlens is None:
        sets, n = p.features.shape[:2]
        step = max(1, GROUP_BYTES // max(1, n * row_bytes))
        for first in range(0, sets if n else 0, step):
            last = min(first + step, sets)
            numbers = torch.arange(first, last, device=p.features.device)
            yield _Group(numbers, slice(first, last), slice(first * n, last * n), p.features[first:last])
        return
    starts = p.cu_seqlens.to(torch.int64)
    lengths = starts.diff()
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
            column = torch.arange(longest, device=p.features.device)
            where = starts[numbers, None] + column
            where = where.masked_fill_(column >= lengths[numbers, None], -1)
            yield _Group(numbers, numbers, where, p.features[where])
        first = last


def _select(p: Problem, group: _Group, keep: bool) -> Selected:
    x = Rows(group.raw)
    norms = x.norms()
    quality = norms if p.quality is None else group.take(p.quality)
    sets, n = norms.shape
    each = torch.arange(sets, device=norms.device)
    pickable = _pickable(p, group, norms, quality)
    first = None
    if p.start is not None:
        first = p.start[group.at].to(torch.int64)
        inside = (first >= 0) & (first < n)
        first = torch.where(inside, first, 0)
        pickable = torch.ones_like(norms, dtype=torch.bool) if pickable is None else pickable
        pickable &= (inside & pickable[each, first])[:, None]
    if pickable is None:
        fewest, barred = min(n, p.k), None  # None saves a pass a step
        counts = torch.full((sets,), fewest, device=norms.device)
    else:
        counts, barred = pickable.sum(-1).clamp_(max=p.k), ~pickable
        fewest = int(counts.min())
    coefficient = _coefficient(p, quality, norms)

    steps_kept, n_kept = (p.k, n) if keep else (0, 0)
    gaps = norms.new_empty(max(0, steps_kept - 1), sets, n_kept)
    softmax = norms.new_empty(steps_kept, sets, n_kept)
    gap, logits = norms, quality
    picks, distances = [], []
    steps = range(p.k)
    for step, noise in zip(steps, _noise(p, group, steps), strict=True):
        logits = logits if barred is None else logits.masked_fill(barred, -torch.inf)
        perturbed = logits if noise is None else logits + noise
        pick = perturbed.argmax(-1) if step or first is None else first  # the first of equals
        place = pick if sets == 1 else torch.add(pick, each, alpha=n)
        picks.append(pick)
        distances.append(logits.take(place) if step else logits.new_full((sets,), torch.inf))
        if keep:  # not its normalizer alone: at small tau, rounding in that makes a softmax that does not sum to 1
            torch.softmax(perturbed if p.tau == 1 else perturbed / p.tau, -1, out=softmax[step])
        if step + 1 == p.k:
            break
        if p.distinct:
            barred = torch.zeros_like(norms, dtype=torch.bool) if barred is None else barred
            barred.view(-1).index_fill_(0, place, True)
        direction = x.take(place).to(norms.dtype)
        if fewest <= step:  # there is no pick, and the row in its place may not be finite
            direction = torch.where((step < counts)[:, None], direction, 0)
        products = x.products(direction)
        if p.normalized:
            fresh = torch.rsub(products, 1.0)
        else:
            fresh = torch.addcdiv(norms, products, norms.take(place)[:, None], value=-1)
        fresh.clamp_(min=0)  # rounding can take it below the 0 that a picked row has to itself
        if keep:
            gaps[step] = fresh
        gap = fresh if step == 0 else torch.minimum(gap, fresh)
        logits = gap * coefficient

    indices, distance = torch.stack(picks, 1), torch.stack(distances, 1)
    features = x.take(torch.add(indices, each[:, None], alpha=n)).to(p.features.dtype)
    if fewest < p.k:
        there = torch.arange(p.k, device=counts.device) < counts[:, None]
        indices = torch.where(there, indices, -1)
        distance = torch.where(there, distance, 0)
        features = torch.where(there[..., None], features, 0)
        if keep:
            nothing = ~there.T[..., None]
            gaps.masked_fill_(nothing[:-1], 0)
            softmax.masked_fill_(nothing, 0)
    if keep and pickable is not None:
        gaps.masked_fill_(~pickable, 0)
        unusable = ~(norms < torch.inf) | (norms == 0)
        norms = torch.where(pickable, norms, -1.0).masked_fill_(unusable, torch.nan)
    return Selected(
        features=features,
        distances=distance,
        indices=indices,
        counts=counts,
        kept=[softmax.flatten(1), gaps.flatten(1), norms.flatten()] if keep else [],
    )


def _backpropagate(p: Problem, group: _Group, saved: Saved, grad: Tensor, dx: Tensor, dq: Tensor) -> Tensor:
    """Write the group's dx and dq; returns its part of dgamma.

    Every pass over the rows is a product with one vector a set. The projections (I - u u^T) need no pass: the cosines
    that they take are known.
    """
    norms, gaps, softmax = group.take(saved.norms), group.take(saved.gaps), group.take(saved.softmax)
    quality = norms if p.quality is None else group.take(p.quality)
    raw = group.raw
    if isinstance(group.where, Tensor) or not _all_usable(norms):
        pickable = norms > 0
        if isinstance(group.where, Tensor):
            pickable &= group.where >= 0
            gaps, softmax = torch.where(pickable, gaps, 0), torch.where(pickable, softmax, 0)
        if bool(norms.isnan().any()):
            raw = torch.where(pickable[..., None], raw, 0)  # 0 * NaN is NaN: they must not meet the products below
        norms, quality = torch.where(pickable, norms, 1.0), torch.where(pickable, quality, 1.0)
    indices = saved.indices[group.at]
    arriving = grad[group.at].to(norms.dtype, copy=True)  # (G, K, C)
    if int(indices[:, -1].min()) < 0:
        arriving.masked_fill_((indices < 0)[..., None], 0)
        indices = indices.clamp(min=0)
    places = indices + (torch.arange(len(indices), device=indices.device) * norms.shape[1])[:, None]
    x = Rows(raw)
    picked = x.take(places).to(norms.dtype)  # (G, K, C)

    coefficient = _coefficient(p, quality, norms)
    to_mix = (-coefficient).expand_as(gaps)
    if not p.normalized:
        pick_norms = norms.take(places[:, :-1].T)[..., None]  # (K - 1, G, 1)
        to_mix = to_mix / pick_norms
        onto_pick = (norms - gaps) / pick_norms  # x_n . u_j / |x_j|: x_n projected on x_j is so many times x_j
    shares = _shares(gaps)
    ddistances = torch.empty_like(gaps)  # dd_j(n)
    mix = torch.empty_like(gaps)  # dcos_j(n) / (|x_n| |x_j|)
    chain = torch.zeros_like(norms)  # gradient that the running minimum carries down from the later steps
    for step in range(p.k - 1, 0, -1):
        chain = chain + _softmax_gradient(p, x, arriving[:, step], softmax[step])
        this = step - 1
        if this > 0:
            torch.mul(chain, shares[this - 1], out=ddistances[this])
            chain = chain - ddistances[this]
        else:
            ddistances[0] = chain
        torch.mul(ddistances[this], to_mix[this], out=mix[this])
        arriving[:, this] += x.weighted_sum(mix[this])
        if not p.normalized:
            projected = (mix[this] * onto_pick[this]).sum(-1, keepdim=True)
            arriving[:, this].addcmul_(picked[:, this], projected, value=-1)

    weight_term = (ddistances * gaps).sum(0).mul_(coefficient)  # w dw, as every d_j is proportional to w = q^gamma
    dquality = float(p.gamma) * weight_term / quality
    if p.start is None:  # a given first pick was not chosen: no softmax
        dquality += _softmax_gradient(p, x, arriving[:, 0], softmax[0])
    radial = torch.zeros_like(norms)  # dx_n has radial(n) x_n
    if not p.normalized:
        radial = (ddistances.sum(0) * coefficient * norms - weight_term) / norms.square()
    if p.quality is None:
        radial += dquality / norms
    in_place = isinstance(group.where, slice) and dx.dtype == norms.dtype
    out = dx.view(-1, p.dim)[group.where].view(group.raw.shape) if in_place else None
    for where, rows in x.blocks():
        part = torch.mul(rows, radial[:, where, None], out=None if out is None else out[:, where])
        if p.k > 1:
            part.baddbmm_(mix[:, :, where].permute(1, 2, 0), picked[:, :-1])
        _add_picks(part, arriving, places, where)
        if out is None:
            _write_rows(dx, part, group.where, where)
    group.put(dquality, dq)
    return (weight_term * quality.log()).sum()


def _softmax_gradient(p: Problem, x: Rows, arriving: Tensor, softmax: Tensor) -> Tensor:
    """dz(n) = y(n) (x_n . c - sum_m y(m) x_m . c) / tau for the gradient c (G, C) at the pick, (G, n)."""
    along = x.products(arriving)
    dz: Tensor = torch.ops.aten._softmax_backward_data(along, softmax, -1, along.dtype)
    return dz if p.tau == 1 else dz / p.tau


def _shares(gaps: Tensor) -> Tensor:
    """The part of d(running minimum) that goes to each distance but the first: 1, 0, or 1/2 at an exact tie."""
    if len(gaps) < 2:
        return gaps[1:]
    nearest = gaps.cummin(0).values[:-1]
    return torch.heaviside(nearest - gaps[1:], gaps.new_full((), 0.5))


def _add_picks(part: Tensor, arriving: Tensor, places: Tensor, where: slice) -> None:
    """Add the picks' gradients (G, K, C) to their rows, where these are in this part of the rows."""
    if part.shape[0] == 1:
        here = ((places >= where.start) & (places < where.stop))[0]
        places, arriving = places[:, here] - where.start, arriving[:, here]
    part.view(-1, part.shape[-1]).index_add_(0, places.flatten(), arriving.flatten(0, 1))


def _write_rows(dx: Tensor, part: Tensor, rows: slice | Tensor, where: slice) -> None:
    """Put rows ``where`` of a group, (G, m, C), to their places."""
    flat = dx.view(-1, dx.shape[-1])
    if isinstance(rows, slice):
        flat[rows].unflatten(0, (part.shape[0], -1))[:, where] = part.to(dx.dtype)
    else:
        real = rows[:, where] >= 0
        flat[rows[:, where][real]] = part[real].to(dx.dtype)


def _coefficient(p: Problem, quality: Tensor, norms: Tensor) -> Tensor:
    """What |x_n| (1 - cos) is multiplied by to give a distance."""
    weight = quality ** float(p.gamma)
    if p.distance_scale != 1:
        weight *= p.distance_scale
    return weight if p.normalized else weight.div_(norms)


def _pickable(p: Problem, group: _Group, norms: Tensor, quality: Tensor) -> Tensor | None:
    """(G, n) bool: rows that take part and are usable; None for all of them."""
    takes_part = _takes_part(p, group)
    if takes_part is None and _all_usable(norms) and (p.quality is None or _all_usable(quality)):
        return None
    usable = _usable(norms, quality)
    return usable if takes_part is None else usable & takes_part


def _all_usable(values: Tensor) -> bool:
    """Whether all are finite and above 0: NaN, which is neither, goes through to the least and the greatest."""
    least, greatest = values.aminmax()
    return float(least) > 0 and float(greatest) < math.inf


def _usable(norms: Tensor, quality: Tensor) -> Tensor:
    """(G, n) bool: finite rows, with a direction, of positive finite quality."""
    return (torch.minimum(norms, quality) > 0) & (torch.maximum(norms, quality) < torch.inf)  # NaN is neither


def _takes_part(p: Problem, group: _Group) -> Tensor | None:
    """(G, n) bool: rows that are neither padding nor masked; None for all of them."""
    if isinstance(group.where, Tensor):
        return group.where >= 0
    if p.mask is not None:
        return group.take(p.mask)
    if p.lengths is not None:
        return torch.arange(group.raw.shape[1], device=group.raw.device) < p.lengths[group.sets, None]
    return None


def _noise(p: Problem, group: _Group, steps: range) -> Iterator[Tensor | None]:
    """The Gumbel noise (G, n) of each step in turn, or None for argmax."""
    block = -1
    for step in steps:
        if p.noise is not None:
            yield group.take(p.noise[step])
        elif p.seed is None:
            yield None
        else:
            if step // STEPS_PER_DRAW != block:
                block = step // STEPS_PER_DRAW
                drawn = gumbel_noise(int(p.seed), group.sets, group.raw.shape[1], block)
            yield drawn[step % STEPS_PER_DRAW]
