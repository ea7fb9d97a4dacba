"""What adapters to farthest-point samplers share: the selection that they all mean, and the forms of its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fcn_kernels.selection.select import Coreset, CoresetState, coreset_select


def farthest_points(points: Tensor, k: int | Sequence[int] | Tensor, **options: Any) -> Coreset | CoresetState:
    """Farthest-point sampling by Euclidean distance, lowest row on ties; nothing of it is differentiated."""
    return coreset_select(points.detach(), k, metric="sqeuclidean", **options)


def complete(coreset: Coreset | CoresetState, k: int | Tensor) -> Tensor:
    """The indices, once each set has its k picks.

    Raises:
        ValueError: a set has fewer rows that can be picked, finite ones, or begins at one that cannot.
    """
    if (short := coreset.counts < k).any():
        where = f" of set {int(short.nonzero()[0])}" if short.ndim else ""
        wanted, got = (
            int(torch.as_tensor(number, device=short.device).expand_as(short)[short][0])
            for number in (k, coreset.counts)
        )
        raise ValueError(f"expected {wanted} rows{where} to be picked, got {got}: others, or the start, are not finite")
    return coreset.indices


def gather_rows(points: Tensor, indices: Tensor) -> Tensor:
    """Rows (B, K, C) of points (B, N, C), with their gradient; zero where the index is -1."""
    rows = points.gather(1, indices.clamp(min=0)[..., None].expand(-1, -1, points.shape[-1]))
    return rows.masked_fill((indices < 0)[..., None], 0.0)


def set_offsets(batch: Tensor, sets: int | None) -> Tensor:
    """Offsets (B + 1,) of rows (T,) that name their set, in ascending order; B is the last set's number and 1."""
    sizes = torch.bincount(batch, minlength=sets or 0)
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
