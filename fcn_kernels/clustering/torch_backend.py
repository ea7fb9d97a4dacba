"""Clustering in PyTorch's operations: the backend for CPUs and for float64, and the plain form to read first.

Sets of equal length run side by side; chunks of all lengths go through the blocks as flat tokens, and only attention
and sums are one call for each length (64 sets of 1 to 20 rows: 1.8 times as fast as length by length).

A set's sums do not see its batch: matrix products of PyTorch's CPU libraries give a row the same bits wherever it
stands if they get a multiple of 16 rows (measured: 4 and more on one thread, 12 and more on two), and batched ones a
matrix the same bits if its rows are a multiple of 4.
"""

from collections.abc import Iterator
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
from fcn_kernels.sets import RowSets, row_norms

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


def _taking(usable: Tensor, valid: Tensor | None, sets: RowSets) -> _Taking:
    offsets, lengths = sets
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


def _sets(p: Sums | Chunks) -> RowSets:
    return RowSets(p.offsets, p.lengths).within(p[0].shape[0])


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
    return _taking(usable, p.valid, _sets(p))


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
    taking = _taking(usable, p.valid, _sets(p))
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


class _Heads(NamedTuple):
    """Attention of one group of chunks on the way: G chunks of t tokens, of which u attend."""

    q: Tensor  # (G, heads, u, d / heads)
    k: Tensor  # (G, heads, t, d / heads)
    v: Tensor
    attended: Tensor  # (G, heads, u, d / heads)
    lse: Tensor


class _Block(NamedTuple):
    """A block on the way, all that its backward pass takes: T tokens, of which U attend, flat."""

    y: Tensor  # (T, d), the first LayerNorm
    mean1: Tensor
    rstd1: Tensor
    asking: Tensor  # (U, d), of y
    heads: list[_Heads]
    gathered: Tensor  # (U, d)
    middle: Tensor  # (U, d), after attention
    y2: Tensor
    mean2: Tensor
    rstd2: Tensor
    wide: Tensor  # (U, 4 d), before gelu
    active: Tensor
    out: Tensor  # (U, d)


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


def _attend_gradient(grad: Tensor, b: _Heads) -> tuple[Tensor, Tensor, Tensor]:
    if grad.device.type == "cpu":
        back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return back(grad, b.q, b.k, b.v, b.attended, b.lse, 0.0, False, scale=1.0)  # type: ignore[no-any-return]
    weight = (b.q @ b.k.mT - b.lse[..., None]).exp()
    score = _softmax_gradient(weight, grad @ b.v.mT)
    return score @ b.k, score.mT @ b.q, weight.mT @ grad


class _Part(NamedTuple):
    """A group of chunks in a batch: where its tokens and rows begin there, and their number in each chunk."""

    group: _Group
    tokens: slice
    rows: slice
    shape: tuple[int, int, int]  # G, n + M, n

    def token_heads(self, flat: Tensor, parts: int, heads: int) -> Tensor:
        """Flat (T, parts d) as (parts, G, heads, n + M, d / heads), a view."""
        (chunks, length, _), width = self.shape, flat.shape[1] // parts // heads
        return flat[self.tokens].view(chunks, length, parts, heads, width).permute(2, 0, 3, 1, 4)

    def row_heads(self, flat: Tensor, heads: int) -> Tensor:
        """Flat (R, d) as (G, heads, n, d / heads), a view."""
        chunks, _, n = self.shape
        return flat[self.rows].view(chunks, n, heads, -1).transpose(1, 2)

    def of_rows(self, flat: Tensor) -> Tensor:
        """Flat (R, ...) as (G, n, ...), a view."""
        chunks, _, n = self.shape
        return flat[self.rows].view(chunks, n, *flat.shape[1:])


class _Batch(NamedTuple):
    """Groups of chunks that go through the blocks together: their tokens lie flat, group after group.

    Only attention and sums are a group's own; all else is one call for all. Flat tensors have as many rows as products
    want, 16 at a time; those past the end are copies of others, or 0, and nothing is read of them.
    """

    parts: list[_Part]
    row_at: Tensor  # (R,), the flat tokens that are rows
    center_at: Tensor  # (P M,), those that are centers
    rows: Tensor  # (R,), where rows lie among all
    hidden: Tensor  # (T,), where tokens lie among those kept
    chunk: Tensor  # (T,), of each token

    @classmethod
    def of(cls, groups: list[tuple[_Group, _Group]], centers: int) -> "_Batch":
        """Groups of rows, and the same of tokens."""
        parts, row_at, center_at, tokens_seen, rows_seen = [], [], [], 0, 0
        for group, kept in groups:
            (chunks, n), length = group.places.shape, kept.places.shape[1]
            tokens, rows = chunks * length, chunks * n
            at = torch.arange(tokens_seen, tokens_seen + tokens, device=group.places.device).view(chunks, length)
            row_at.append(at[:, :n].flatten())
            center_at.append(at[:, n:].flatten())
            spans = slice(tokens_seen, tokens_seen + tokens), slice(rows_seen, rows_seen + rows)
            parts.append(_Part(group, *spans, (chunks, length, n)))
            tokens_seen, rows_seen = tokens_seen + tokens, rows_seen + rows
        return cls(
            parts,
            torch.cat(row_at),
            torch.cat(center_at),
            torch.cat([group.places.flatten() for group, _ in groups]),
            torch.cat([kept.places.flatten() for _, kept in groups]),
            torch.cat([group.sets.repeat_interleave(kept.places.shape[1]) for group, kept in groups]),
        )


def _batches(p: Chunks, taking: _Taking) -> Iterator[_Batch]:
    """Chunks with rows, in batches of about GROUP_ROWS; tokens are kept from where a chunk's rows were given."""
    waiting: list[tuple[_Group, _Group]] = []
    size, centers, lengths = 0, p.tokens.shape[0], taking.lengths
    for group, kept in zip(_groups(taking.offsets, lengths), _groups(_sets(p).offsets, lengths, centers), strict=True):
        if waiting and size + group.places.numel() > GROUP_ROWS:
            yield _Batch.of(waiting, centers)
            waiting, size = [], 0
        waiting.append((group, kept))
        size += group.places.numel()
    if waiting:
        yield _Batch.of(waiting, centers)


def _flat(like: Tensor, rows: int, width: int) -> Tensor:
    """Room for rows (rows and more, width), with 0 past the end."""
    flat = like.new_empty(rows + -rows % PRODUCT_ROWS, width)
    flat[rows:] = 0
    return flat


def _taken(values: Tensor, at: Tensor) -> Tensor:
    """Rows of values at places (n,), and more of them as products want."""
    short = -at.shape[0] % PRODUCT_ROWS
    return values[F.pad(at, (0, short)) if short else at]


def _run_block(h: Tensor, w: _Weights, heads: int, batch: _Batch, last: bool, factor: Tensor | None) -> _Block:
    """Flat tokens through a block; of the last one, only what becomes of the rows."""
    d = h.shape[1]
    y, mean1, rstd1 = _layer_norm(h)
    asking, found = y, []
    if last:  # what the last block makes of the centers is dropped
        asking, h = _taken(y, batch.row_at), _taken(h, batch.row_at)
        q, kv = F.linear(asking, w.qkv_weight[:d], w.qkv_bias[:d]), F.linear(y, w.qkv_weight[d:], w.qkv_bias[d:])
    else:
        qkv = F.linear(y, w.qkv_weight, w.qkv_bias)
    gathered = _flat(y, (batch.row_at if last else batch.hidden).shape[0], d)
    for part in batch.parts:
        if last:
            each = (part.row_heads(q, heads), *part.token_heads(kv, 2, heads))
        else:
            each = tuple(part.token_heads(qkv, 3, heads))
        found.append(_Heads._make((*each, *_attend(*each))))
        place = part.row_heads(gathered, heads) if last else part.token_heads(gathered, 1, heads)[0]
        place.copy_(found[-1].attended)
    middle = _scaled(F.linear(gathered, w.proj_weight, w.proj_bias), factor, 0).add_(h)
    y2, mean2, rstd2 = _layer_norm(middle)
    wide = F.linear(y2, w.fc1_weight, w.fc1_bias)
    active = F.gelu(wide)
    out = _scaled(F.linear(active, w.fc2_weight, w.fc2_bias), factor, 1).add_(middle)
    return _Block(y, mean1, rstd1, asking, found, gathered, middle, y2, mean2, rstd2, wide, active, out)


def _scaled(added: Tensor, factor: Tensor | None, part: int) -> Tensor:
    """What a part of a block adds to flat tokens, by their factors (2, U)."""
    return added if factor is None else added * factor[part, :, None]


def _block_gradient(
    grad: Tensor,
    h: Tensor,
    b: _Block,
    w: _Weights,
    sums: _Weights,
    batch: _Batch,
    last: bool,
    factor: Tensor | None,
) -> Tensor:
    """Gradient of a block's flat tokens from that of its output; those of the weights are added to `sums`."""

    def through(dy: Tensor, x: Tensor, weight: Tensor, dweight: Tensor, dbias: Tensor) -> Tensor:
        dweight.add_(dy.mT @ x)
        dbias.add_(dy.sum(0))
        return dy @ weight

    dactive = through(_scaled(grad, factor, 1), b.active, w.fc2_weight, sums.fc2_weight, sums.fc2_bias)
    dwide = torch.ops.aten.gelu_backward(dactive, b.wide)
    dy2 = through(dwide, b.y2, w.fc1_weight, sums.fc1_weight, sums.fc1_bias)
    dmiddle = grad + _layer_norm_gradient(dy2, b.middle, b.mean2, b.rstd2)
    down = _scaled(dmiddle, factor, 0)
    dgathered = through(down, b.gathered, w.proj_weight, sums.proj_weight, sums.proj_bias)
    heads, d, tokens, rows = b.heads[0].q.shape[1], h.shape[1], batch.hidden.shape[0], batch.row_at.shape[0]
    dqkv, dasking = _flat(h, tokens, (2 if last else 3) * d), _flat(h, rows, d)
    for part, each in zip(batch.parts, b.heads, strict=True):
        arrived = part.row_heads(dgathered, heads) if last else part.token_heads(dgathered, 1, heads)[0]
        dq, *dkv = _attend_gradient(arrived, each)
        if last:
            part.row_heads(dasking, heads).copy_(dq)
        places = part.token_heads(dqkv, 2 if last else 3, heads)
        for place, value in zip(places, dkv if last else (dq, *dkv), strict=True):
            place.copy_(value)
    if not last:
        dy = through(dqkv, b.y, w.qkv_weight, sums.qkv_weight, sums.qkv_bias)
        return _layer_norm_gradient(dy, h, b.mean1, b.rstd1) + dmiddle
    dy = through(dqkv, b.y, w.qkv_weight[d:], sums.qkv_weight[d:], sums.qkv_bias[d:])
    asked = through(dasking, b.asking, w.qkv_weight[:d], sums.qkv_weight[:d], sums.qkv_bias[:d])
    dy[batch.row_at] += asked[:rows]
    dh = _layer_norm_gradient(dy, h, b.mean1, b.rstd1)
    dh[batch.row_at] += dmiddle[:rows]
    return dh


def _tokens(p: Chunks, rows: _Rows, batch: _Batch) -> Tensor:
    """Flat tokens: what goes into the first block."""
    (centers, d), count = p.tokens.shape, batch.hidden.shape[0]
    h = _flat(p.tokens, count, d)
    made = p.table[norm_codes(rows.norms[batch.rows], p.edges)]
    h[batch.row_at] = made if rows.styles is None else torch.cat([rows.styles[batch.rows], made], -1)
    h[batch.center_at] = p.tokens.repeat(len(batch.center_at) // centers, 1)
    return h


def _factor(p: Chunks, block: int, batch: _Batch) -> Tensor | None:
    """(2, U), of the flat tokens, or of the rows in the last block."""
    if p.residual is None:
        return None
    chunk = batch.chunk[batch.row_at] if block == p.depth - 1 else batch.chunk
    return _taken(p.residual[block].mT, chunk).mT


def chunks_forward(p: Chunks, keep: bool) -> Clustered:
    """A batch of chunks at a time, through everything."""
    rows = _rows(p)
    lengths = rows.taking.lengths
    out = Clustered(*(torch.zeros_like(t) for t in Clustered.empty(p, keep)))
    shares = p.tokens.new_zeros(rows.norms.shape[0], p.tokens.shape[0])
    for batch in _batches(p, rows.taking):
        h = _tokens(p, rows, batch)
        for block in range(p.depth):
            last = block == p.depth - 1
            h = _run_block(h, _Weights.of(p, block), p.heads, batch, last, _factor(p, block, batch)).out
            if keep:
                at = batch.hidden[batch.row_at] if last else batch.hidden
                out.hidden[block][at] = h[: len(at)]
        x_hat = _layer_norm(h if p.depth else _taken(h, batch.row_at))[0]
        a = F.linear(x_hat, p.weight, p.bias).softmax(-1)
        scaled = _scale_rows(a, rows.scale[batch.rows])
        for part in batch.parts:
            group, share = part.group, part.of_rows(a)
            out.sums[group.sets] = _sum(part.of_rows(scaled), group.rows(rows.features).to(a.dtype))
            out.key_sums[group.sets] = _sum(share, part.of_rows(x_hat))
            out.masses[group.sets] = _masses(share)
        shares[batch.rows] = a[: len(batch.rows)]
    return out._replace(shares=rows.taking.spread(shares, p.features.shape[0]), counts=lengths.clone())


def _scale_rows(a: Tensor, scale: Tensor) -> Tensor:
    """Flat rows times their scale (R,)."""
    return a * F.pad(scale, (0, a.shape[0] - scale.shape[0]))[:, None]


def chunks_backward(p: Chunks, grad: Summed, out: Clustered, wanted: bool) -> ChunksGradients:
    """Blocks again from their inputs, one at a time, last to first. Not `wanted`: the features are frozen."""
    rows, centers = _rows(p), p.tokens.shape[0]
    none = p.tokens.new_empty(0)
    found = ChunksGradients(
        torch.zeros_like(rows.features) if wanted else rows.features.new_empty(0),
        none if p.quality is None else torch.zeros_like(rows.norms),
        none if rows.styles is None else torch.zeros_like(rows.styles),
        *(torch.zeros_like(getattr(p, name)) for name in ChunksGradients._fields[3:]),
    )
    for batch in _batches(p, rows.taking):
        first = _tokens(p, rows, batch)
        made = _taken(out.hidden[-1], batch.hidden[batch.row_at]) if p.depth else _taken(first, batch.row_at)
        dh = _shares_backward(p, rows, batch, made, grad, found)
        for block in reversed(range(p.depth)):
            h = _taken(out.hidden[block - 1], batch.hidden) if block else first
            w, factor, last = _Weights.of(p, block), _factor(p, block, batch), block == p.depth - 1
            again = _run_block(h, w, p.heads, batch, last, factor)
            dh = _block_gradient(dh, h, again, w, _Weights.of(found, block), batch, last, factor)
        if p.depth:
            found.tokens.add_(dh[batch.center_at].unflatten(0, (-1, centers)).sum(0))
        of_rows = dh[batch.row_at] if p.depth else dh[: len(batch.rows)]
        width = dh.shape[1] - p.table.shape[1]
        codes = norm_codes(rows.norms[batch.rows], p.edges)
        found.table.add_(F.one_hot(codes, CODES).to(dh.dtype).mT @ of_rows[:, width:])
        if rows.styles is not None:
            found.styles[batch.rows] = of_rows[:, :width].to(found.styles.dtype)
    return found._replace(**_spread(p, found, rows.taking, p.features.shape[0], wanted))


def _shares_backward(
    p: Chunks, rows: _Rows, batch: _Batch, last: Tensor, grad: Summed, found: ChunksGradients
) -> Tensor:
    """From the sums' gradients to that of the rows' last tokens, flat; and all others on the way."""
    x_hat, mean, rstd = _layer_norm(last)
    a = F.linear(x_hat, p.weight, p.bias).softmax(-1)
    scale, norms = rows.scale[batch.rows], rows.norms[batch.rows]
    da, reach, dx_hat = torch.zeros_like(a), torch.zeros_like(a), torch.zeros_like(x_hat)
    for part in batch.parts:
        arriving = Summed(*(t[part.group.sets] for t in grad))
        x = part.group.rows(rows.features).to(a.dtype)
        each, reached = _shares_gradient(arriving, x, part.of_rows(x_hat), part.of_rows(scale))
        part.of_rows(da).copy_(each)
        part.of_rows(reach).copy_(reached)
        part.of_rows(dx_hat).copy_(part.of_rows(a) @ arriving.key_sums)
    dz = _softmax_gradient(a, da)
    found.weight.add_(dz.mT @ x_hat)
    found.bias.add_(dz.sum(0))
    dscale, denominator = (a * reach).sum(-1)[: len(norms)], norms + EPS_NORM
    if p.quality is not None:
        found.quality[batch.rows] = dscale * EPS_NORM / denominator.square()
    if found.features.numel():
        along = dscale * scale / torch.where(norms > 0, norms, 1)  # times the scale again, it may leave the range
        scaled = _scale_rows(a, scale)
        for part in batch.parts:
            dx = part.of_rows(scaled) @ grad.sums[part.group.sets]
            if p.quality is None:
                unit = part.group.rows(rows.features).to(a.dtype) * part.of_rows(scale)[..., None]
                dx = dx.addcmul_(unit, part.of_rows(along)[..., None], value=-1)
            part.group.put(found.features, dx)
    return _layer_norm_gradient(dz @ p.weight + dx_hat, last, mean, rstd)
