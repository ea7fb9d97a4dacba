"""Set attention in PyTorch operations, a block of rows at a time: the backend for CPUs and for float64.

Encodings and keys exist for one block, which fits the cache; an online softmax runs from block to block, and backward
makes the blocks again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fcn_kernels.attention.encoding import sinusoid, sinusoid_backward, waves
from fcn_kernels.attention.inputs import DROPOUT_STREAM, Arriving, Gradients, Inputs, Outputs
from fcn_kernels.noise import STEPS_PER_DRAW, philox
from fcn_kernels.sets import row_norms, usable

# Rows, their sinusoids and their keys have to stay in the last-level cache, and a block to outweigh the
# host's cost: 4 MiB of each measured best of 1/2 to 8 on an EPYC with 32 MiB of shared L3, C = 512, float32.
BLOCK_BYTES = 4 << 20


class _Group(NamedTuple):
    """Some sets, side by side."""

    numbers: Tensor  # (G,)
    sets: slice | Tensor  # the same, as a slice if they follow one another at equal distances
    lengths: Tensor  # (G,)
    starts: Tensor  # (G,)
    stride: int  # rows from one set to the next, if `sets` is a slice
    longest: int

    def rows(self, values: Tensor, first: int, last: int) -> Tensor:
        """Rows first to last of each set, (G, last - first, ...); past a set's end, any row or padding."""
        if isinstance(self.sets, slice):
            row = values.stride(0)
            shape = (self.numbers.numel(), last - first, *values.shape[1:])
            where = values.storage_offset() + (int(self.starts[0]) + first) * row
            return values.as_strided(shape, (self.stride * row, row, *values.stride()[1:]), where)
        return values[self._places(first, last, len(values))]

    def put(self, out: Tensor, first: int, last: int, values: Tensor, valid: Tensor) -> None:
        """Write rows (G, last - first, ...) to their places."""
        if isinstance(self.sets, slice):
            self.rows(out, first, last).copy_(values)
        else:
            out[self._places(first, last, len(out))[valid]] = values[valid].to(out.dtype)

    def _places(self, first: int, last: int, rows: int) -> Tensor:
        row = torch.arange(first, last, device=self.starts.device)
        # a set with no row left has any, of all `rows` there are
        within = torch.minimum(row, self.lengths[:, None] - 1).clamp_(min=0)
        return (self.starts[:, None] + within).clamp_(max=rows - 1)


class _Block(NamedTuple):
    """Rows first to last of each set of a group, in the dtype of the sums; rows left out are zero."""

    first: int
    last: int
    valid: Tensor  # (G, l)
    features: Tensor  # (G, l, C)
    quality: Tensor  # (G, l)
    wave: Tensor  # (G, l, C), the norms' sinusoids
    mean: Tensor  # (G, l, 1), their mean and reciprocal deviation
    rstd: Tensor
    key: Tensor  # (G, l, C)


def _block_rows(p: Inputs) -> int:
    return max(1, BLOCK_BYTES // (p.features.shape[1] * p.queries.dtype.itemsize))


def _groups(p: Inputs) -> Iterator[_Group]:
    """Sets in groups of like length, at most a block of rows when padded to the longest, or one longer set."""
    ordered, order = torch.sort(p.lengths, stable=True)
    counts, starts = ordered.tolist(), p.offsets[order]
    rows = _block_rows(p)
    stride = torch.where(order.diff() == 1, starts.diff(), -1).tolist()
    first = 0
    for last in range(1, len(counts) + 1):
        if last < len(counts) and (last + 1 - first) * counts[last] <= rows:
            continue
        numbers, steps = order[first:last], set(stride[first : last - 1]) or {counts[last - 1]}
        even = len(steps) == 1 and min(steps) >= counts[last - 1]
        sets = slice(int(numbers[0]), int(numbers[-1]) + 1) if even else numbers
        yield _Group(numbers, sets, ordered[first:last], starts[first:last], min(steps), counts[last - 1])
        first = last


def _blocks(p: Inputs, group: _Group) -> Iterator[_Block]:
    dim, dtype, device = p.features.shape[1], p.queries.dtype, p.features.device
    table, step = waves(dim, dtype, device), _block_rows(p)
    for first in range(0, group.longest, step):
        last = min(first + step, group.longest)
        rows = group.rows(p.features, first, last).to(dtype)
        norms = group.rows(p.quality, first, last)
        inside = torch.arange(first, last, device=device) < group.lengths[:, None]
        valid = inside & usable(row_norms(rows), norms)
        if not valid.all():
            rows = rows.where(valid[..., None], 0)
            norms = norms.where(valid, 0)
        wave = sinusoid(norms, table)
        encoding, mean, rstd = torch.native_layer_norm(wave, (dim,), p.encoding_weight, None, p.encoding_eps)
        key = encoding.addcmul_(norms[..., None], rows)
        yield _Block(first, last, valid, rows, norms, wave, mean, rstd, key)


def keep_mask(p: Inputs, sets: Tensor, rows: Tensor) -> Tensor:
    """Which attention weights dropout keeps, (G, H, l) bool: a function of seed, set, query and row alone."""
    assert p.seed is not None
    seed, queries = int(p.seed), p.queries.shape[1]
    draws = [philox(seed, rows, block, sets, DROPOUT_STREAM) for block in range(-(-queries // STEPS_PER_DRAW))]
    return torch.cat(draws)[:queries].transpose(0, 1) >= p.threshold


def _kept(p: Inputs, group: _Group, block: _Block, weight: Tensor) -> Tensor:
    """Attention weights (G, H, l) after dropout."""
    if p.seed is None:
        return weight
    rows = torch.arange(block.first, block.last, device=weight.device)
    return weight * keep_mask(p, group.numbers, rows) / (1 - p.dropout)


def forward(p: Inputs) -> Outputs:
    """Attend; an online softmax carries each query's maximum, total and sums from block to block."""
    out, weight_sum = torch.zeros_like(p.queries), p.queries.new_zeros(p.queries.shape[:2])
    lse = torch.full_like(weight_sum, -torch.inf)
    for group in _groups(p):
        sets = group.sets
        query, top = p.queries[sets], lse[sets]
        total, kept_total, weighted = weight_sum[sets], weight_sum[sets], out[sets]
        for block in _blocks(p, group):
            score = (query @ block.key.mT).masked_fill_(~block.valid[:, None], -torch.inf)  # (G, H, l)
            new_top = torch.maximum(top, score.amax(-1))
            reference = new_top.masked_fill(new_top == -torch.inf, 0)  # inf - inf where there is no row yet
            shrink = (top - reference).exp_()
            weight = score.sub_(reference[..., None]).exp_()
            kept = _kept(p, group, block, weight)
            total = total * shrink + weight.sum(-1)
            kept_total = kept_total * shrink + kept.sum(-1)
            weighted = weighted * shrink[..., None] + (kept * block.quality[:, None]) @ block.features
            top = new_top
        share = total.reciprocal().masked_fill_(total == 0, 0)
        out[sets], weight_sum[sets] = weighted * share[..., None], kept_total * share
        lse[sets] = top + total.log()
    return Outputs(out, weight_sum, lse)


def backward(p: Inputs, arriving: Arriving) -> Gradients:
    """The blocks again, and what arrives taken back through softmax, keys and values."""
    dim = p.features.shape[1]
    table = waves(dim, p.queries.dtype, p.features.device)
    grads = Gradients(*(torch.zeros_like(tensor) for tensor in p[:4]))
    for group in _groups(p):
        sets = group.sets
        query, grad = p.queries[sets], arriving.out[sets]
        for block in _blocks(p, group):
            weight = (query @ block.key.mT).sub_(arriving.lse[sets][..., None]).exp_()
            weight.masked_fill_(~block.valid[:, None], 0)  # (G, H, l)
            kept = _kept(p, group, block, weight)
            reach = (grad @ block.features.mT).mul_(block.quality[:, None]).add_(arriving.weight_sum[sets][..., None])
            grad_score = kept * reach - weight * arriving.delta[sets][..., None]
            grads.queries[sets] += grad_score @ block.key
            grad_key = grad_score.mT @ query  # (G, l, C)
            grad_wave, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
                grad_key, block.wave, (dim,), block.mean, block.rstd, p.encoding_weight, None, (True, True, False)
            )
            grads.encoding_weight.add_(grad_weight)
            grad_row = torch.baddbmm(grad_key, kept.mT, grad)  # of x = q f
            grad_norm = (grad_row * block.features).sum(-1) + sinusoid_backward(grad_wave, block.wave, table)
            place = block.first, block.last
            group.put(grads.quality, *place, grad_norm.where(block.valid, 0), block.valid)
            group.put(grads.features, *place, grad_row.mul_(block.quality[..., None]), block.valid)
    return grads
