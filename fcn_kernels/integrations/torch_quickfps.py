"""For users of torch-quickfps: the same calls on our kernels. torch-quickfps is never imported."""

from __future__ import annotations

import torch
from torch import Tensor

from fcn_kernels.integrations.sampling import complete, farthest_points, gather_rows


def sample(
    x: Tensor,
    k: int,
    h: int | None = None,
    start_idx: int | None = None,
    mask: Tensor | None = None,
    low_d: int | None = None,
    return_points: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """k points of each set, each the farthest from those before it, and their indices.

    Args:
        x: ``(..., N, C)``, any batch dimensions.
        k: points to pick, from 1 to N.
        h, low_d: taken for torch-quickfps's sake: there are no buckets here.
        start_idx: the first pick of all sets. None: a random one, that of torch-quickfps with the same seed; with a
            mask the first point of it.
        mask: ``(..., N)`` bool or uint8, the points that may be picked.
        return_points: give the points too, with their gradient, which reaches nothing else.

    Returns:
        Points ``(..., k, C)`` and indices ``(..., k)`` int64, or the indices alone.

    Raises:
        RuntimeError: x has one dimension, k is not from 1 to N, the mask is of another size, dtype or device, has
            fewer than k points, or is without the start; or the start is not in [0, N).
        ValueError: a set has fewer than k finite points.

    What differs: no point is picked twice, which holds for ``sample_baseline`` there, while ``sample`` repeats a point
    when only copies are left, and takes another than the first point on ties; points that are not finite are passed by.

    Source: torch-quickfps 2.1, torch_quickfps.sample.

    Example:
        >>> x = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [5.0, 0.0]], [[0.0, 0.0], [0.0, 9.0], [0.0, 4.0]]])
        >>> points, indices = sample(x, 2, start_idx=0)
        >>> indices.tolist(), points.shape
        ([[0, 2], [0, 1]], torch.Size([2, 2, 2]))
    """
    indices = sample_idx(x, k, h, start_idx, mask, low_d)
    if not return_points:
        return indices
    points = gather_rows(x.reshape(-1, *x.shape[-2:]), indices.reshape(-1, k))
    return points.reshape(*x.shape[:-2], k, x.shape[-1]), indices


def sample_idx(
    x: Tensor,
    k: int,
    h: int | None = None,
    start_idx: int | None = None,
    mask: Tensor | None = None,
    low_d: int | None = None,
) -> Tensor:
    """The indices ``(..., k)`` of :func:`sample`.

    Example:
        >>> sample_idx(torch.tensor([[0.0], [1.0], [5.0]]), 2, start_idx=1)
        tensor([1, 2])
    """
    if x.ndim < 2:
        raise RuntimeError(f"x must have at least 2 dims, but got shape: {tuple(x.shape)}")
    sets = x.reshape(-1, *x.shape[-2:])
    count, rows, _ = sets.shape
    if not 1 <= k <= rows:
        raise RuntimeError(f"k must be >= 1 and <= N. Got k={k} N={rows}")
    if start_idx is not None and not 0 <= start_idx < rows:
        raise RuntimeError(f"start_idx out of range: {start_idx} for N={rows}")
    if mask is not None:
        mask = _checked_mask(mask, sets, k, start_idx)
    if start_idx is not None:
        start = torch.full((count,), start_idx, device=x.device)
    elif mask is not None:
        start = mask.long().argmax(1)
    else:
        start = torch.randint(0, rows, (count,), device=x.device)
    found = farthest_points(sets, k, start=start, mask=mask, distinct=True)
    return complete(found, k).reshape(*x.shape[:-2], k)


def _checked_mask(mask: Tensor, sets: Tensor, k: int, start: int | None) -> Tensor:
    count, rows, _ = sets.shape
    if mask.device != sets.device or mask.dtype not in (torch.bool, torch.uint8) or mask.numel() != count * rows:
        raise RuntimeError(
            f"mask must be bool or uint8, of numel={count * rows} and on {sets.device}, got {mask.dtype}, "
            f"numel={mask.numel()} on {mask.device}"
        )
    mask = mask.to(torch.bool).reshape(count, rows)
    if (mask.sum(1) < k).any():
        raise RuntimeError(f"mask has fewer than k valid points in at least one batch. k={k}")
    if start is not None and not mask[:, start].all():
        raise RuntimeError(f"mask disallows start_idx={start} in at least one batch")
    return mask


sample_baseline, sample_idx_baseline = sample, sample_idx
