"""Clustering in PyTorch's operations: the backend for CPUs and for float64, and the plain form to read first.

Sets of equal length run side by side. A set's sums do not see its batch: matrix products of PyTorch's CPU libraries
give a row the same bits wherever it stands if they get a multiple of 16 rows (measured: 4 and more on one thread, 12
and more on two), and batched ones a matrix the same bits if its rows are a multiple of 4.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_kernels.clustering.norm_code import norm_codes
from fcn_kernels.clustering.problem import (
    CODES,
    EPS_LAYER_NORM,
    EPS_NORM,
    Chunks,
    ChunksGradients,
    Clustered,
    Summed,
    Sums,
    SumsGradients,
)
from fcn_kernels.sets import row_norms

# Rows of a group: their tokens and the widest of what is made of them, 4 d values each, stay in the last-level cache.
GROUP_ROWS = 2048
PRODUCT_ROWS, BATCHED_ROWS = 16, 4  # of the matrix products, see above


class _Group(NamedTuple):
    """Some sets of n rows each, in the order of the sets."""

    sets: Tensor  # (G,)
    places: Tensor  # (G, n), their rows
    even: tuple[int, int] | None  # first row, and rows from one set to the next, if that is always the same

    def rows(self, values: Tensor) -> Tensor:
        """(T, ...) to (G, n, ...), a view if sets lie evenly."""
        if self.even is None:
            return values[self.places]
        first, step = self.even
        row = values.stride(0)
        shape = (*self.places.shape, *values.shape[1:])
        return values.as_strided(shape, (step * row, *values.stride()), values.storage_offset() + first * row)

    def put(self, out: Tensor, values: Tensor) -> None:
        """Rows (G, n, ...) to their places in (T, ...)."""
        if self.even is None:
            out[self.places] = values.to(out.dtype)
        else:
            self.rows(out).copy_(values)


def _groups(offsets: Tensor, lengths: Tensor, extra: int = 0) -> Iterator[_Group]:
    """Sets with rows, grouped by their number; with `extra` rows after each set, which then count as theirs."""
    ordered, order = torch.sort(lengths, stable=True)
    counts, first = ordered.tolist(), int((ordered == 0).sum())
    starts = offsets[:-1] + extra * torch.arange(len(lengths), device=offsets.device)
    while first < len(counts):
        n = counts[first]
        last = min(first + max(1, GROUP_ROWS // n), int(torch.searchsorted(ordered, n, right=True)))
        sets = order[first:last]
        begin = starts[sets]
        steps = set(begin.diff().tolist()) or {n + extra}
        step = min(steps)
        even = (int(begin[0]), step) if len(steps) == 1 and step >= n + extra else None
        yield _Group(sets, begin[:, None] + torch.arange(n + extra, device=offsets.device), even)
        first = last


class _Taking(NamedTuple):
    """The rows that take part, as sets without gaps where some do not."""

    places: Tensor | None  # (R,) their places among T; None: all rows inside the lengths
    offsets: Tensor
    lengths: Tensor

    def of(self, values: Tensor) -> Tensor:
        return values if self.places is None else values[self.places]

    def spread(self, values: Tensor, rows: int) -> Tensor:
        """Back to all T rows, 0 for those that take no part."""
        if self.places is None:
            return values
        return values.new_zeros((rows, *values.shape[1:])).index_copy_(0, self.places, values)


def _taking(usable: Tensor, valid: Tensor | None, offsets: Tensor, lengths: Tensor) -> _Taking:
    if valid is not None:
        usable = usable & valid
    if usable.all():
        return _Taking(None, offsets, lengths)
    # rows in no set, between a length and the next offset, are dropped too
    row = torch.arange(usable.shape[0], device=usable.device)
    owner = torch.searchsorted(offsets, row, right=True) - 1
    inside = (owner >= 0) & (owner < len(lengths))
    owner = owner.clamp(0, len(lengths) - 1)
    places = (usable & inside & (row - offsets[owner] < lengths[owner])).nonzero()[:, 0]
    counts = torch.bincount(owner[places], minlength=len(lengths))
    return _Taking(places, F.pad(counts.cumsum(0), (1, 0)), counts)


def _spread(p: Any, found: Any, taking: _Taking, rows: int, wanted: bool) -> dict[str, Tensor]:
    """The gradients of rows, which come first, over all T of them."""
    first, *others = found._fields[:3]
    present = [first] * wanted + [name for name in others if getattr(p, name) is not None]
    return {name: taking.spread(getattr(found, name), rows) for name in present}


def finite_rows(rows: Tensor) -> Tensor:
    """Which rows (T, ...) have finite elements alone; in two reductions without a copy."""
    if rows.ndim == 1:
        return rows.isfinite()
    return (rows.amax(-1) < torch.inf) & (rows.amin(-1) > -torch.inf)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., d) to (..., o), with as many rows as the products want."""
    flat = rows.reshape(-1, rows.shape[-1])
    short = -flat.shape[0] % PRODUCT_ROWS
    out = F.linear(F.pad(flat, (0, 0, 0, short)) if torch.compiler.is_compiling() or short else flat, weight, bias)
    return out[: flat.shape[0]].view(*rows.shape[:-1], out.shape[-1])


def _sum(shares: Tensor, rows: Tensor) -> Tensor:
    """sum_n shares_nm rows_n of each set: (G, n, M), (G, n, C) -> (G, M, C)."""
    short = -shares.shape[-1] % BATCHED_ROWS
    return ((F.pad(shares, (0, short)) if short else shares).mT @ rows)[:, : shares.shape[-1]]


def _masses(shares: Tensor) -> Tensor:
    """(G, n, M) -> (G, M); by a product, as a sum's order may depend on the batch."""
    return _sum(shares, shares.new_ones(1, 1, BATCHED_ROWS).expand(*shares.shape[:2], -1))[..., 0]


def sums_forward(p: Sums) -> Summed:
    """A group of sets at a time."""
    taking, dtype, sets, centers = _sums_taking(p), p.weight.dtype, p.lengths.shape[0], p.centers
    values, keys, scale = (None if t is None else taking.of(t) for t in (p.values, p.keys, p.scale))
    assert values is not None
    out = Summed(
        p.weight.new_zeros(sets, centers, values.shape[1]),
        p.weight.new_zeros(sets, centers, 0 if keys is None else keys.shape[1]),
        p.weight.new_zeros(sets, centers),
    )
    for group in _groups(taking.offsets, taking.lengths):
        x = group.rows(values).to(dtype)
        k = x if keys is None else group.rows(keys)
        a = linear(k, p.weight, p.bias).softmax(-1)[..., :centers]
        out.masses[group.sets] = _masses(a)
        if keys is not None:
            out.key_sums[group.sets] = _sum(a, k)
        out.sums[group.sets] = _sum(a if scale is None else a * group.rows(scale)[..., None], x)
    return out


def sums_backward(p: Sums, grad: Summed, wanted: bool) -> SumsGradients:
    """The shares again, and what arrives taken back through them. Not `wanted`: the values are frozen."""
    taking, dtype, centers, rows = _sums_taking(p), p.weight.dtype, p.centers, p.values.shape[0]
    values, keys, scale = (None if t is None else taking.of(t) for t in (p.values, p.keys, p.scale))
    assert values is not None
    none = p.weight.new_empty(0)
    out = SumsGradients(
        torch.zeros_like(values) if wanted else values.new_empty(0),
        none if keys is None else torch.zeros_like(keys),
        none if scale is None else torch.zeros_like(scale),
        torch.zeros_like(p.weight),
        torch.zeros_like(p.bias),
    )
    for group in _groups(taking.offsets, taking.lengths):
        x = group.rows(values).to(dtype)
        k = x if keys is None else group.rows(keys)
        a = linear(k, p.weight, p.bias).softmax(-1)  # (G, n, M + ghosts)
        q = None if scale is None else group.rows(scale)
        arriving = Summed(*(t[group.sets] for t in grad))
        da, reach = _shares_gradient(arriving, x, None if keys is None else k, q)
        dz = _softmax_gradient(a, F.pad(da, (0, p.ghosts)))
        out.weight.add_(dz.flatten(0, 1).mT @ k.flatten(0, 1))
        out.bias.add_(dz.sum((0, 1)))
        dk, real = dz @ p.weight, a[..., :centers]
        if scale is not None:
            group.put(out.scale, (real * reach).sum(-1))
        if keys is not None:
            group.put(out.keys, dk + real @ arriving.key_sums)
        if wanted:
            dx = (real if q is None else real * q[..., None]) @ arriving.sums
            group.put(out.values, dx + dk if keys is None else dx)
    return out._replace(**_spread(p, out, taking, rows, wanted))


def _sums_taking(p: Sums) -> _Taking:
    usable = finite_rows(p.values)
    for tensor in (p.keys, p.scale):
        if tensor is not None:
            usable = usable & finite_rows(tensor)
    return _taking(usable, p.valid, p.offsets, p.lengths)


def _shares_gradient(grad: Summed, x: Tensor, keys: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradient of the shares (G, n, M); and x . grad.sums (G, n, M), from which that of the scale follows."""
    reach = x @ grad.sums.mT
    da = grad.masses[:, None] + (reach if scale is None else reach * scale[..., None])
    return da if keys is None else da + keys @ grad.key_sums.mT, reach


def _softmax_gradient(a: Tensor, da: Tensor) -> Tensor:
    return a * (da - (a * da).sum(-1, keepdim=True))


class _Rows(NamedTuple):
    """What chunks have of the rows that take part."""

    taking: _Taking
    features: Tensor  # (R, C)
    norms: Tensor  # (R,)
    scale: Tensor  # (R,), what makes features unit rows
    styles: Tensor | None  # (R, d - p)


def usable_rows(
    features: Tensor, quality: Tensor | None, styles: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Which rows (T,) can take part in chunks, and their norms (T,) in dtype."""
    norms = row_norms(features.to(dtype)) if quality is None else quality
    usable = (norms >= 0) & (norms < torch.inf)
    if quality is not None:
        usable = usable & finite_rows(features)
    if styles is not None:
        usable = usable & finite_rows(styles)
    return usable, norms


def _rows(p: Chunks) -> _Rows:
    usable, norms = usable_rows(p.features, p.quality, p.styles, p.tokens.dtype)
    taking = _taking(usable, p.valid, p.offsets, p.lengths)
    norms = taking.of(norms)
    scale = (norms + EPS_NORM).reciprocal()
    if p.quality is not None:
        scale = norms * scale
    styles = None if p.styles is None else taking.of(p.styles)
    return _Rows(taking, taking.of(p.features), norms, scale, styles)


class _Weights(NamedTuple):
    """Of one block; and their gradients."""

    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor

    @classmethod
    def of(cls, p: Chunks | ChunksGradients, block: int) -> "_Weights":
        return cls(*(getattr(p, name)[block] for name in cls._fields))


class _Block(NamedTuple):
    """A block on the way, all that its backward pass takes. G chunks of t tokens, of which u attend.

    What is not of heads lies flat, with rows after it that mean nothing (:class:`_Tokens`), until :meth:`apart`.
    """

    y: Tensor  # (G, t, d), the first LayerNorm
    mean1: Tensor
    rstd1: Tensor
    q: Tensor  # (G, heads, u, d / heads)
    k: Tensor  # (G, heads, t, d / heads)
    v: Tensor
    attended: Tensor  # (G, heads, u, d / heads)
    lse: Tensor
    middle: Tensor  # (G, u, d), after attention
    y2: Tensor
    mean2: Tensor
    rstd2: Tensor
    wide: Tensor  # (G, u, 4 d), before gelu
    active: Tensor
    out: Tensor  # (G, u, d)

    def apart(self) -> "_Block":
        """By chunks, without the rows after them."""
        (chunks, _, queries, _), length = self.q.shape, self.k.shape[2]
        heads = ("q", "k", "v", "attended", "lse")
        rows = dict.fromkeys(self._fields, queries) | dict.fromkeys(self._fields[:3], length)
        return _Block(
            *(
                t if name in heads else t[: chunks * rows[name]].view(chunks, rows[name], -1)
                for name, t in self._asdict().items()
            )
        )


def _layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_layer_norm(x, (x.shape[-1],), None, None, EPS_LAYER_NORM)


def _layer_norm_gradient(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    back = torch.ops.aten.native_layer_norm_backward
    dx: Tensor = back(grad, x, (x.shape[-1],), mean, rstd, None, None, (True, False, False))[0]
    return dx


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T) v and its log-sum-exps."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=1.0)  # type: ignore[no-any-return]
    score = q @ k.mT
    return score.softmax(-1) @ v, score.logsumexp(-1)


def _attend_gradient(grad: Tensor, b: _Block) -> tuple[Tensor, Tensor, Tensor]:
    if grad.device.type == "cpu":
        back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return back(grad, b.q, b.k, b.v, b.attended, b.lse, 0.0, False, scale=1.0)  # type: ignore[no-any-return]
    weight = (b.q @ b.k.mT - b.lse[..., None]).exp()
    score = _softmax_gradient(weight, grad @ b.v.mT)
    return score @ b.k, score.mT @ b.q, weight.mT @ grad


class _Tokens:
    """Tokens of G chunks, flat, with rows of 0 after them as the products want: so that no product has to copy them."""

    def __init__(self, like: Tensor, chunks: int, length: int, width: int) -> None:
        rows = chunks * length
        self.flat = like.new_empty(rows + -rows % PRODUCT_ROWS, width)
        self.flat[rows:] = 0
        self.sets = self.flat[:rows].view(chunks, length, width)
        """(G, length, width), to be filled."""

    @classmethod
    def of(cls, values: Tensor) -> "_Tokens":
        """A copy of values (G, length, ...), of which what follows lies flat."""
        tokens = cls(values, values.shape[0], values.shape[1], values[0, 0].numel())
        tokens.sets.view(values.shape).copy_(values)
        return tokens


def _run_block(h: Tensor, w: _Weights, heads: int, shape: tuple[int, int, int], factor: Tensor | None) -> _Block:
    """Tokens, flat, of G chunks of t (:class:`_Tokens`) through a block; what becomes of the first u of each chunk."""
    chunks, length, queries = shape
    d, whole = h.shape[-1], queries == length

    def sets(flat: Tensor, rows: int = queries) -> Tensor:
        return flat[: chunks * rows].view(chunks, rows, -1)

    def heads_of(flat: Tensor, rows: int, parts: int) -> Any:
        return sets(flat, rows).unflatten(-1, (parts, heads, d // heads)).permute(2, 0, 3, 1, 4).unbind()

    y, mean1, rstd1 = _layer_norm(h)
    if whole:
        q, k, v = heads_of(F.linear(y, w.qkv_weight, w.qkv_bias), length, 3)
    else:
        asking = _Tokens.of(sets(y, length)[:, :queries]).flat
        (q,) = heads_of(F.linear(asking, w.qkv_weight[:d], w.qkv_bias[:d]), queries, 1)
        k, v = heads_of(F.linear(y, w.qkv_weight[d:], w.qkv_bias[d:]), length, 2)
        h = _Tokens.of(sets(h, length)[:, :queries]).flat
    attended, lse = _attend(q, k, v)
    added = F.linear(_Tokens.of(attended.transpose(1, 2)).flat, w.proj_weight, w.proj_bias)
    middle = _scaled(added, factor, 0, queries).add_(h)
    y2, mean2, rstd2 = _layer_norm(middle)
    wide = F.linear(y2, w.fc1_weight, w.fc1_bias)
    active = F.gelu(wide)
    out = _scaled(F.linear(active, w.fc2_weight, w.fc2_bias), factor, 1, queries).add_(middle)
    return _Block(y, mean1, rstd1, q, k, v, attended, lse, middle, y2, mean2, rstd2, wide, active, out)


def _scaled(added: Tensor, factor: Tensor | None, part: int, queries: int) -> Tensor:
    """What a part of a block adds to flat tokens, by the factors (G, 2) of their chunks."""
    if factor is None:
        return added
    rows = factor[:, part].repeat_interleave(queries)
    return added * F.pad(rows, (0, added.shape[0] - rows.shape[0]))[:, None]


def _block_gradient(grad: Tensor, h: Tensor, b: _Block, w: _Weights, sums: _Weights, factor: Tensor | None) -> Tensor:
    """Gradient (G, t, d) of a block's tokens from that of its output; those of the weights are added to `sums`."""
    queries = grad.shape[1]

    def through(dy: Tensor, x: Tensor, weight: Tensor, dweight: Tensor, dbias: Tensor) -> Tensor:
        dweight.add_(dy.flatten(0, 1).mT @ x.flatten(0, 1))
        dbias.add_(dy.sum((0, 1)))
        return dy @ weight

    down = grad if factor is None else grad * factor[:, 1, None, None]
    dactive = through(down, b.active, w.fc2_weight, sums.fc2_weight, sums.fc2_bias)
    dwide = torch.ops.aten.gelu_backward(dactive, b.wide)
    dy2 = through(dwide, b.y2, w.fc1_weight, sums.fc1_weight, sums.fc1_bias)
    dmiddle = grad + _layer_norm_gradient(dy2, b.middle, b.mean2, b.rstd2)
    down = dmiddle if factor is None else dmiddle * factor[:, 0, None, None]
    gathered = b.attended.transpose(1, 2).flatten(2)
    dgathered = through(down, gathered, w.proj_weight, sums.proj_weight, sums.proj_bias)
    heads = b.q.shape[1]
    dq, dk, dv = _attend_gradient(dgathered.unflatten(-1, (heads, -1)).transpose(1, 2), b)
    d = h.shape[-1]
    dq, dk, dv = (t.transpose(1, 2).flatten(2) for t in (dq, dk, dv))
    dy = through(torch.cat([dk, dv], -1), b.y, w.qkv_weight[d:], sums.qkv_weight[d:], sums.qkv_bias[d:])
    dy[:, :queries] += through(dq, b.y[:, :queries], w.qkv_weight[:d], sums.qkv_weight[:d], sums.qkv_bias[:d])
    dh = _layer_norm_gradient(dy, h, b.mean1, b.rstd1)
    dh[:, :queries] += dmiddle
    return dh


def _tokens(p: Chunks, rows: _Rows, group: _Group) -> _Tokens:
    """(G, n + M, d): what goes into the first block."""
    (centers, d), (chunks, n) = p.tokens.shape, group.places.shape
    h = _Tokens(p.tokens, chunks, n + centers, d)
    h.sets[:, :n, d - p.table.shape[1] :] = p.table[norm_codes(group.rows(rows.norms), p.edges)]
    if rows.styles is not None:
        h.sets[:, :n, : rows.styles.shape[1]] = group.rows(rows.styles)
    h.sets[:, n:] = p.tokens
    return h


def _factor(p: Chunks, block: int, group: _Group) -> Tensor | None:
    """(G, 2)"""
    return None if p.residual is None else p.residual[block, :, group.sets].mT


def chunks_forward(p: Chunks, keep: bool) -> Clustered:
    """A group of chunks of equal length at a time, through everything."""
    rows, centers = _rows(p), p.tokens.shape[0]
    offsets, lengths = rows.taking.offsets, rows.taking.lengths
    out = Clustered(*(torch.zeros_like(t) for t in Clustered.empty(p, keep)))
    shares = p.tokens.new_zeros(rows.norms.shape[0], centers)
    kept = _groups(offsets, lengths, centers) if keep else repeat(None)
    for group, tokens in zip(_groups(offsets, lengths), kept, strict=keep):
        h, (chunks, n) = _tokens(p, rows, group).flat, group.places.shape
        queries = n + centers
        for block in range(p.depth):
            queries = n if block == p.depth - 1 else n + centers  # what the last block makes of the centers is dropped
            shape = (chunks, n + centers, queries)
            h = _run_block(h, _Weights.of(p, block), p.heads, shape, _factor(p, block, group)).out
            if tokens is not None:
                made = h[: chunks * queries].view(chunks, queries, -1)
                tokens.put(out.hidden[block], F.pad(made, (0, 0, 0, n + centers - queries)))
        x_hat = _layer_norm(h[: chunks * queries].view(chunks, queries, -1)[:, :n])[0]
        a = linear(x_hat, p.weight, p.bias).softmax(-1)
        scaled = a * group.rows(rows.scale)[..., None]
        out.sums[group.sets] = _sum(scaled, group.rows(rows.features).to(a.dtype))
        out.key_sums[group.sets] = _sum(a, x_hat)
        out.masses[group.sets] = _masses(a)
        group.put(shares, a)
    return out._replace(shares=rows.taking.spread(shares, p.features.shape[0]), counts=lengths.clone())


def chunks_backward(p: Chunks, grad: Summed, out: Clustered, wanted: bool) -> ChunksGradients:
    """Blocks again from their inputs, one at a time, last to first. Not `wanted`: the features are frozen."""
    rows, centers = _rows(p), p.tokens.shape[0]
    offsets, lengths = rows.taking.offsets, rows.taking.lengths
    none = p.tokens.new_empty(0)
    found = ChunksGradients(
        torch.zeros_like(rows.features) if wanted else rows.features.new_empty(0),
        none if p.quality is None else torch.zeros_like(rows.norms),
        none if rows.styles is None else torch.zeros_like(rows.styles),
        *(torch.zeros_like(getattr(p, name)) for name in ChunksGradients._fields[3:]),
    )
    for group, tokens in zip(_groups(offsets, lengths), _groups(offsets, lengths, centers), strict=True):
        n = group.places.shape[1]
        inputs = [_tokens(p, rows, group).sets, *(tokens.rows(hidden) for hidden in out.hidden[: p.depth])]
        dh = _shares_backward(p, rows, group, inputs[-1][:, :n], Summed(*(t[group.sets] for t in grad)), found)
        for block in reversed(range(p.depth)):
            h, w, factor = inputs[block], _Weights.of(p, block), _factor(p, block, group)
            made = _run_block(_Tokens.of(h).flat, w, p.heads, (*h.shape[:2], dh.shape[1]), factor).apart()
            dh = _block_gradient(dh, h, made, w, _Weights.of(found, block), factor)
        if p.depth:
            found.tokens.add_(dh[:, n:].sum(0))
        width = dh.shape[-1] - p.table.shape[1]
        codes = norm_codes(group.rows(rows.norms), p.edges).flatten()
        found.table.add_(F.one_hot(codes, CODES).to(dh.dtype).mT @ dh[:, :n, width:].flatten(0, 1))
        if rows.styles is not None:
            group.put(found.styles, dh[:, :n, :width])
    return found._replace(**_spread(p, found, rows.taking, p.features.shape[0], wanted))


def _shares_backward(
    p: Chunks, rows: _Rows, group: _Group, last: Tensor, grad: Summed, found: ChunksGradients
) -> Tensor:
    """From the sums' gradients to that of the last tokens (G, n, d); and all others on the way."""
    x_hat, mean, rstd = _layer_norm(last)
    a = linear(x_hat, p.weight, p.bias).softmax(-1)
    x, norms, scale = (group.rows(t) for t in (rows.features, rows.norms, rows.scale))
    x = x.to(a.dtype)
    da, reach = _shares_gradient(grad, x, x_hat, scale)
    dz = _softmax_gradient(a, da)
    found.weight.add_(dz.flatten(0, 1).mT @ x_hat.flatten(0, 1))
    found.bias.add_(dz.sum((0, 1)))
    dscale, denominator = (a * reach).sum(-1), norms + EPS_NORM
    if p.quality is not None:
        group.put(found.quality, dscale * EPS_NORM / denominator.square())
    if found.features.numel():
        dx = (a * scale[..., None]) @ grad.sums
        if p.quality is None:
            along = dscale / (denominator.square() * torch.where(norms > 0, norms, 1))
            dx = dx - x * along[..., None]
        group.put(found.features, dx)
    return _layer_norm_gradient(dz @ p.weight + a @ grad.key_sums, last, mean, rstd)
