"""Set attention in PyTorch operations, a block of rows at a time: the backend of CPUs and of float64.

Encodings and keys exist for a block that fits the cache, with an online softmax from block to block; backward
makes the blocks again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fcn_kernels.encoding import sinusoid, sinusoid_backward, waves
from fcn_kernels.noise import STEPS_PER_DRAW, philox

# Rows, their sinusoids and their keys have to stay in the last-level cache, and a block to outweigh the
# host's cost: 4 MiB of each measured best of 1/2 to 4 on an EPYC with 32 MiB of shared L3, C = 512, float32.
BLOCK_BYTES = 4 << 20
DROPOUT_STREAM = 1  # of the counter-based noise; the selection draws from stream 0


class RowSets(NamedTuple):
    """Where sets lie among T rows: set b owns offsets[b] to offsets[b + 1]; its first lengths[b] take part."""

    offsets: Tensor  # (B + 1,) int64
    lengths: Tensor  # (B,) int64

    @classmethod
    def padded(cls, sets: int, rows: int, lengths: Tensor | None, device: torch.device) -> "RowSets":
        """Sets of (B, N, C), flattened; `lengths` (B,) or all N rows of each."""
        offsets = torch.arange(sets + 1, device=device) * rows
        return cls(offsets, offsets.diff() if lengths is None else lengths.to(device, torch.int64))

    @classmethod
    def packed(cls, cu_seqlens: Tensor, device: torch.device) -> "RowSets":
        """Sets that follow one another in (T, C)."""
        offsets = cu_seqlens.to(device, torch.int64)
        return cls(offsets, offsets.diff())

    def take(self, values: Tensor, indices: Tensor) -> Tensor:
        """Values (T,) of rows numbered within their set, (B, K); 0 where the number is -1."""
        places = torch.where(indices < 0, values.shape[0], self.offsets[:-1, None] + indices)
        return torch.nn.functional.pad(values, (0, 1))[places]


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
        return values[self._places(first, last)]

    def put(self, out: Tensor, first: int, last: int, values: Tensor, valid: Tensor) -> None:
        """Write rows (G, last - first, ...) to their places."""
        if isinstance(self.sets, slice):
            self.rows(out, first, last).copy_(values)
        else:
            out[self._places(first, last)[valid]] = values[valid].to(out.dtype)

    def _places(self, first: int, last: int) -> Tensor:
        row = torch.arange(first, last, device=self.starts.device)
        return self.starts[:, None] + torch.minimum(row, self.lengths[:, None] - 1).clamp_(min=0)


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


def _block_rows(dim: int, dtype: torch.dtype) -> int:
    return max(1, BLOCK_BYTES // (dim * dtype.itemsize))


def _groups(offsets: Tensor, lengths: Tensor, rows: int) -> Iterator[_Group]:
    """Sets in groups of like length, at most `rows` rows when padded to the longest, or one longer set."""
    ordered, order = torch.sort(lengths, stable=True)
    counts, starts = ordered.tolist(), offsets[order]
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


def _blocks(group: _Group, features: Tensor, quality: Tensor, weight: Tensor, eps: float) -> Iterator[_Block]:
    dim = features.shape[1]
    table = waves(dim, weight.dtype, features.device)
    step = _block_rows(dim, weight.dtype)
    for first in range(0, group.longest, step):
        last = min(first + step, group.longest)
        rows = group.rows(features, first, last).to(weight.dtype)
        norms = group.rows(quality, first, last)
        inside = torch.arange(first, last, device=features.device) < group.lengths[:, None]
        size = rows.sum(-1)
        if (size == 0).any():  # may be a row of zeros, which never takes part
            size = rows.abs().sum(-1)
        valid = inside & (norms > 0) & norms.isfinite() & (size != 0) & size.isfinite()
        if not valid.all():
            rows = rows.where(valid[..., None], 0)
            norms = norms.where(valid, 0)
        wave = sinusoid(norms, table)
        encoding, mean, rstd = torch.native_layer_norm(wave, (dim,), weight, None, eps)
        key = encoding.addcmul_(norms[..., None], rows)
        yield _Block(first, last, valid, rows, norms, wave, mean, rstd, key)


def keep_mask(seed: int, sets: Tensor, rows: Tensor, queries: int, dropout: float) -> Tensor:
    """Which attention weights dropout keeps, (G, H, l) bool: a function of seed, set, query and row alone."""
    draws = [
        philox(seed, rows, block, sets, DROPOUT_STREAM) for block in range(-(-queries // STEPS_PER_DRAW))
    ]
    return torch.cat(draws)[:queries].transpose(0, 1) >= round(dropout * 2**32)


def _kept(weight: Tensor, group: _Group, block: _Block, seed: Tensor | None, dropout: float) -> Tensor:
    """Attention weights (G, H, l) after dropout."""
    if seed is None:
        return weight
    rows = torch.arange(block.first, block.last, device=weight.device)
    return weight * keep_mask(int(seed), group.numbers, rows, weight.shape[1], dropout) / (1 - dropout)


def forward(
    queries: Tensor,
    features: Tensor,
    quality: Tensor,
    encoding_weight: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    seed: Tensor | None,
    dropout: float,
    encoding_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Out, mass and the log-normalisers (B, H), -inf for a set with no row to attend to."""
    out, mass = torch.zeros_like(queries), queries.new_zeros(queries.shape[:2])
    log_normalizer = torch.full_like(mass, -torch.inf)
    for group in _groups(offsets, lengths, _block_rows(features.shape[1], queries.dtype)):
        sets = group.sets
        query, top = queries[sets], log_normalizer[sets]
        total, kept_total, weighted = mass[sets], mass[sets], out[sets]
        for block in _blocks(group, features, quality, encoding_weight, encoding_eps):
            score = (query @ block.key.mT).masked_fill_(~block.valid[:, None], -torch.inf)  # (G, H, l)
            new_top = torch.maximum(top, score.amax(-1))
            reference = new_top.masked_fill(new_top == -torch.inf, 0)  # inf - inf where there is no row yet
            shrink = (top - reference).exp_()
            weight = score.sub_(reference[..., None]).exp_()
            kept = _kept(weight, group, block, seed, dropout)
            total = total * shrink + weight.sum(-1)
            kept_total = kept_total * shrink + kept.sum(-1)
            weighted = weighted * shrink[..., None] + (kept * block.quality[:, None]) @ block.features
            top = new_top
        share = total.reciprocal().masked_fill_(total == 0, 0)
        out[sets], mass[sets] = weighted * share[..., None], kept_total * share
        log_normalizer[sets] = top + total.log()
    return out, mass, log_normalizer


def backward(
    queries: Tensor,
    features: Tensor,
    quality: Tensor,
    encoding_weight: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    seed: Tensor | None,
    dropout: float,
    encoding_eps: float,
    log_normalizer: Tensor,
    grad_out: Tensor,
    grad_mass: Tensor,
    mean_grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first four arguments; mean_grad (B, H) is sum_n p'(n) dp'(n)."""
    dim = features.shape[1]
    table = waves(dim, queries.dtype, features.device)
    grad_queries, grad_features = torch.zeros_like(queries), torch.zeros_like(features)
    grad_quality, grad_weight = torch.zeros_like(quality), torch.zeros_like(encoding_weight)
    for group in _groups(offsets, lengths, _block_rows(dim, queries.dtype)):
        sets = group.sets
        query, grad = queries[sets], grad_out[sets]
        for block in _blocks(group, features, quality, encoding_weight, encoding_eps):
            weight = (query @ block.key.mT).sub_(log_normalizer[sets][..., None]).exp_()
            weight.masked_fill_(~block.valid[:, None], 0)  # (G, H, l)
            kept = _kept(weight, group, block, seed, dropout)
            reach = (grad @ block.features.mT).mul_(block.quality[:, None]).add_(grad_mass[sets][..., None])
            grad_score = kept * reach - weight * mean_grad[sets][..., None]
            grad_queries[sets] += grad_score @ block.key
            grad_key = grad_score.mT @ query  # (G, l, C)
            grad_wave, grad_gain, _ = torch.ops.aten.native_layer_norm_backward(
                grad_key,
                block.wave,
                (dim,),
                block.mean,
                block.rstd,
                encoding_weight,
                None,
                (True, True, False),
            )
            grad_weight += grad_gain
            grad_row = torch.baddbmm(grad_key, kept.mT, grad)  # of x = q f
            grad_norm = (grad_row * block.features).sum(-1) + sinusoid_backward(grad_wave, block.wave, table)
            place = block.first, block.last
            group.put(grad_quality, *place, grad_norm.where(block.valid, 0), block.valid)
            group.put(grad_features, *place, grad_row.mul_(block.quality[..., None]), block.valid)
    return grad_queries, grad_features, grad_quality, grad_weight
