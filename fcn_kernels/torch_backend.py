"""Coreset selection in PyTorch operations: the backend of CPUs, float64 and any device without Triton.

What makes it fast is what makes the kernels fast: no one-hot products, no unit rows, and memory order. A group of
sets that fits the cache goes through all K steps before the next group starts; a larger set is walked in blocks.
With gap(n) = |x_n| (1 - max_j cos_j(n)) a step is one product, one minimum and one maximum over the set.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fcn_kernels.noise import STEPS_PER_DRAW, gumbel_noise
from fcn_kernels.problem import Gradients, Problem, Saved, Selected

# A group has to stay in the last-level cache through its K steps, beside what else is there: a quarter of the 32 MiB
# that the cores of a socket share on common servers.
GROUP_BYTES = 8 << 20
# Sets of a packed batch share a padded group only if none is padded to more than twice its length.
MAX_PADDING = 2


def forward(p: Problem, keep: bool) -> Selected:
    """Select; with ``keep``, also save what :func:`backward` reads (else those tensors are empty)."""
    out: Selected | None = None
    with torch.no_grad(), torch.autocast(p.features.device.type, enabled=False):
        for group in _groups(p):
            part = _select(p, group, keep)
            if isinstance(group.at, slice) and group.sets.numel() == p.sets:
                return part
            out = out or _nothing(p, keep)
            for whole, of_sets in zip(out[:5], part[:5], strict=True):
                whole[group.at] = of_sets
            if keep:
                group.put(part.gaps.unflatten(-1, group.raw.shape[:2]), out.gaps)
                group.put(part.norms.unflatten(-1, group.raw.shape[:2]), out.norms)
    return out or _nothing(p, keep)


def _nothing(p: Problem, keep: bool) -> Selected:
    """What sets without a row give."""
    rows, device, accumulate = p.rows if keep else 0, p.features.device, accumulator(p.features.dtype)
    return Selected(
        features=p.features.new_zeros(p.sets, p.k, p.dim),
        distances=torch.zeros(p.sets, p.k, dtype=accumulate, device=device),
        indices=torch.full((p.sets, p.k), -1, device=device),
        counts=torch.zeros(p.sets, dtype=torch.int64, device=device),
        log_normalizers=torch.zeros(p.sets, 0, dtype=accumulate, device=device),
        gaps=torch.zeros(p.k - 1 if keep else 0, rows, dtype=accumulate, device=device),
        norms=torch.full((rows,), -1.0, dtype=accumulate, device=device),
    )


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
    with torch.no_grad(), torch.autocast(p.features.device.type, enabled=False):
        for group in _groups(p):
            dgamma += _backpropagate(p, group, saved, grad, dx, dq)
    return Gradients(dx, dq, dgamma)


def unpickable_row(p: Problem) -> tuple[int, int, str] | None:
    """The first row that takes part and cannot be picked: its set, its number and the reason."""
    found: list[tuple[int, int, str]] = []
    for group in _groups(p):
        norms = _Rows(group.raw).norms()
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


class _Rows:
    """A group's rows in the accumulation dtype; a large set in half precision is converted block by block."""

    def __init__(self, raw: Tensor) -> None:
        self.dtype = accumulator(raw.dtype)
        self.block = max(1, GROUP_BYTES // (raw.shape[-1] * self.dtype.itemsize))
        self.rows = raw.to(self.dtype) if raw.shape[0] > 1 or raw.shape[1] <= self.block else raw

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows that fit the cache, converted."""
        for first in range(0, self.rows.shape[1], self.block):
            where = slice(first, first + self.block)
            yield where, self.rows[:, where].to(self.dtype)

    def pick(self, which: tuple[Tensor, ...]) -> Tensor:
        """Some rows, by (set, row)."""
        return self.rows[which].to(self.dtype)

    def norms(self) -> Tensor:
        """|x_n|, (G, n)."""
        blocks = [self.rows] if self.rows.dtype == self.dtype else (x for _, x in self.blocks())
        norms: list[Tensor] = [torch.linalg.vector_norm(x, dim=-1) for x in blocks]
        return norms[0] if len(norms) == 1 else torch.cat(norms, 1)

    def products(self, vectors: Tensor) -> Tensor:
        """x_n . v for each set's own v (G, C), (G, n)."""
        if self.rows.dtype == self.dtype:
            return _products(self.rows, vectors)
        return torch.cat([_products(x, vectors) for _, x in self.blocks()], 1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """sum_n weights(n) x_n for weights (G, n), (G, C)."""
        if self.rows.dtype == self.dtype:
            return _weighted_sum(self.rows, weights)
        return torch.stack([_weighted_sum(x, weights[:, where]) for where, x in self.blocks()]).sum(0)


def _select(p: Problem, group: _Group, keep: bool) -> Selected:
    x = _Rows(group.raw)
    norms = x.norms()
    quality = norms if p.quality is None else group.take(p.quality)
    pickable, takes_part = _usable(norms, quality), _takes_part(p, group)
    if takes_part is not None:
        pickable &= takes_part
    each = torch.arange(group.sets.numel(), device=norms.device)
    if p.start is not None:
        first = p.start[group.at].to(torch.int64)
        inside = (first >= 0) & (first < pickable.shape[-1])
        first = torch.where(inside, first, 0)
        pickable &= (inside & pickable[each, first])[:, None]
    fewest, counts = pickable.shape[-1], torch.full_like(each, pickable.shape[-1])
    barred = None  # saves a pass a step
    if not pickable.all():
        barred, counts = ~pickable, pickable.sum(-1)
        fewest = int(counts.min())
    counts.clamp_(max=p.k)
    coefficient = p.distance_scale * _weight(quality, p.gamma)
    if not p.normalized:
        coefficient = coefficient / norms

    gaps = norms.new_empty(p.k - 1 if keep else 0, *norms.shape)
    gap = fresh = norms
    logits = quality
    picks, distances, rows = [], [], []
    steps = range(p.k)
    for step, noise in zip(steps, _noise(p, group, steps), strict=True):
        logits = logits if barred is None else logits.masked_fill(barred, -torch.inf)
        perturbed = logits if noise is None else logits + noise
        best, pick = perturbed.max(-1)  # the first of equals, which argmax does not promise
        if step == 0:
            best = torch.full_like(best, torch.inf)
            pick = pick if p.start is None else first
        elif noise is not None:
            best = logits[each, pick]
        picks.append(pick)
        distances.append(best)
        rows.append(_take_rows(group.raw, each, pick))
        if p.distinct:
            barred = torch.zeros_like(pickable) if barred is None else barred.clone()
            barred[each, pick] = True
        if step + 1 == p.k:
            break
        direction = rows[-1].to(norms.dtype)
        if not p.normalized:
            direction = direction / norms.view(-1).index_select(0, each * norms.shape[1] + pick)[:, None]
        if fewest <= step:  # there is no pick, and the row in its place may not be finite
            direction = torch.where((step < counts)[:, None], direction, 0)
        # |x| (1 - cos); rounding can take it below the 0 that a picked row has to itself
        fresh = torch.rsub(x.products(direction), 1.0 if p.normalized else norms).clamp_(min=0)
        nearest = fresh if step == 0 else torch.minimum(gap, fresh)
        if keep:
            unit = torch.where(pickable, nearest if p.normalized else nearest / norms, 0)
            gaps[step] = unit if step == 0 else torch.where(fresh == gap, -unit, unit)
        gap = nearest
        logits = gap * coefficient

    indices, distance, features = torch.stack(picks, 1), torch.stack(distances, 1), torch.stack(rows, 1)
    if fewest < p.k:
        there = torch.arange(p.k, device=counts.device) < counts[:, None]
        indices = torch.where(there, indices, -1)
        distance = torch.where(there, distance, 0)
        features = torch.where(there[..., None], features, 0)
    marks = norms.new_empty(0)
    if keep:
        unusable = ~(norms < torch.inf) | (norms == 0)
        marks = torch.where(pickable, norms, -1.0).masked_fill(unusable, torch.nan)
    return Selected(
        features=features,
        distances=distance,
        indices=indices,
        counts=counts,
        log_normalizers=norms.new_empty(len(counts), 0),
        gaps=gaps.flatten(1) if keep else norms.new_empty(0, 0),
        norms=marks.flatten(),
    )


def _backpropagate(p: Problem, group: _Group, saved: Saved, grad: Tensor, dx: Tensor, dq: Tensor) -> Tensor:
    """Write the group's dx and dq; returns its part of dgamma."""
    norms = group.take(saved.norms)
    pickable = norms > 0
    if isinstance(group.where, Tensor):
        pickable &= group.where >= 0
    # 0 * NaN is NaN: rows that are not finite must not meet the products below
    x = _Rows(torch.where(pickable[..., None], group.raw, 0) if bool(norms.isnan().any()) else group.raw)
    norms = torch.where(pickable, norms, 1.0)
    quality = norms if p.quality is None else torch.where(pickable, group.take(p.quality), 1.0)
    scale = p.distance_scale * _weight(quality, p.gamma)
    each = torch.arange(group.sets.numel(), device=norms.device)
    indices = saved.indices[group.at]
    there, picks = indices >= 0, indices.clamp(min=0)
    gaps = group.take(saved.gaps)  # (K - 1, G, n)
    arriving = torch.where(there[..., None], grad[group.at].to(norms.dtype), 0)  # (G, K, C)
    directions = x.pick((each[:, None], picks))  # (G, K, C)
    pick_norms = norms[each[:, None], picks][..., None]
    if not p.normalized:
        directions = directions / pick_norms

    dcos = torch.zeros_like(gaps)
    chain = torch.zeros_like(norms)  # gradient that the running minimum carries down from the later steps
    dquality = torch.zeros_like(norms)
    steps = range(p.k - 1, -1 if p.start is None else 0, -1)  # a given first pick was not chosen: no softmax
    for step, noise in zip(steps, _noise(p, group, steps), strict=True):
        logits = gaps[step - 1].abs() * scale if step else quality
        perturbed = logits if noise is None else logits + noise
        open_to = pickable.scatter(-1, picks[:, :step], False) if p.distinct else pickable
        # Not from a saved normalizer: small taus make its rounding large, and then the softmax does not sum to 1.
        soft = torch.softmax((perturbed / p.tau).masked_fill_(~open_to, -torch.inf), -1)
        soft = torch.where(there[:, step, None], soft, 0)
        along = x.products(arriving[:, step])
        dlogits = soft * (along - (soft * along).sum(-1, keepdim=True)) / p.tau
        if step == 0:
            dquality = dlogits
            break
        chain = chain + dlogits
        to_this = chain * _share(gaps, step - 1)
        chain = chain - to_this
        dcos[step - 1] = to_this * -scale
        pull = x.weighted_sum(dcos[step - 1] if p.normalized else dcos[step - 1] / norms)
        if not p.normalized:
            u = directions[:, step - 1]
            pull = (pull - (pull * u).sum(-1, keepdim=True) * u) / pick_norms[:, step - 1]
        arriving[:, step - 1] += pull

    # every d_j is proportional to w = q^gamma, so w dw is one sum; where dcos_j is not 0, cos_j = 1 - gap_j
    weight_term = -(gaps.abs() * dcos).sum(0)
    dquality = dquality + p.gamma.to(norms) * weight_term / quality
    radial = torch.zeros_like(norms)  # dx_n has radial(n) x_n
    if not p.normalized:
        radial = -(dcos.sum(0) + weight_term) / norms.square()
        dcos = dcos / norms
    if p.quality is None:
        radial = radial + dquality / norms
    for where, rows in x.blocks():
        part = rows * radial[:, where, None]
        if p.k > 1:
            part.baddbmm_(dcos[:, :, where].permute(1, 2, 0), directions[:, :-1])
        _add_picks(part, arriving, picks - where.start, each)
        _write_rows(dx, part, group.where, where)
    group.put(dquality, dq)
    return (weight_term * quality.log()).sum()


def _take_rows(rows: Tensor, each: Tensor, pick: Tensor) -> Tensor:
    """Row pick(b) of each set, (G, C). index_select costs a third of an advanced index, where sets are adjacent."""
    if rows.stride(0) == rows.shape[1] * rows.stride(1):
        return rows.flatten(0, 1).index_select(0, each * rows.shape[1] + pick)
    return rows[each, pick]


def _add_picks(part: Tensor, arriving: Tensor, picks: Tensor, each: Tensor) -> None:
    """Add each pick's gradient to its row, where that row is in this part. One pick at a time: rows may repeat."""
    for step in range(picks.shape[1]):
        pick = picks[:, step]
        inside = (pick >= 0) & (pick < part.shape[1])
        part[each, torch.where(inside, pick, 0)] += torch.where(inside[:, None], arriving[:, step], 0)


def _write_rows(dx: Tensor, part: Tensor, rows: slice | Tensor, where: slice) -> None:
    """Put rows ``where`` of a group, (G, m, C), to their places."""
    flat = dx.view(-1, dx.shape[-1])
    if isinstance(rows, slice):
        flat[rows].unflatten(0, (part.shape[0], -1))[:, where] = part.to(dx.dtype)
    else:
        real = rows[:, where] >= 0
        flat[rows[:, where][real]] = part[real].to(dx.dtype)


def _share(gaps: Tensor, step: int) -> Tensor | float:
    """The part of d(running minimum) that goes to this step's distance: 1, 0, or 1/2 at an exact tie."""
    if step == 0:
        return 1.0
    nearer = (gaps[step].abs() < gaps[step - 1].abs()).to(gaps.dtype)
    return nearer.masked_fill_(gaps[step].signbit(), 0.5)


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


def _weight(quality: Tensor, gamma: Tensor) -> Tensor:
    return quality ** gamma.to(quality)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of ``dtype`` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _products(x: Tensor, vectors: Tensor) -> Tensor:
    """(G, n, C), (G, C) -> (G, n). One set is split between the threads, as PyTorch's products run a set on one."""
    sets, n = x.shape[:2]
    threads = torch.get_num_threads()
    if sets > 1 or n < 2 * threads:
        return torch.bmm(vectors[:, None], x.transpose(1, 2))[:, 0]
    even = n - n % threads
    shared = torch.bmm(vectors[:, None].expand(threads, -1, -1), x[0, :even].unflatten(0, (threads, -1)).mT)
    return torch.cat((shared.flatten(), x[0, even:] @ vectors[0]))[None]


def _weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """(G, n, C), (G, n) -> (G, C), split between the threads likewise."""
    sets, n = x.shape[:2]
    threads = torch.get_num_threads()
    if sets > 1 or n < 2 * threads:
        return torch.bmm(weights[:, None], x)[:, 0]
    even = n - n % threads
    shared = torch.bmm(weights[0, :even].view(threads, 1, -1), x[0, :even].unflatten(0, (threads, -1)))
    return (shared.sum(0) + weights[0, even:] @ x[0, even:]).view(1, -1)
