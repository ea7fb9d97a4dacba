"""For users of torch-fps: the same calls on our kernels. torch-fps is never imported."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Generator, Tensor

from fcn_kernels.integrations.sampling import farthest_points, gather_rows
from fcn_kernels.selection.select import CoresetState


class _Sampled(NamedTuple):
    points: Tensor  # (B, N, D), of the precision asked for
    valid: Tensor  # (B, N), whether a point takes part
    indices: Tensor  # (B, k)
    nearest: Tensor | None  # (B, N), if asked for


def farthest_point_sampling(
    points: Tensor,
    valid_mask: Tensor,
    k: int,
    *,
    start_idx: Tensor | None = None,
    random_start: bool = True,
    generator: Generator | None = None,
    precision: torch.dtype | None = None,
    validate: bool = True,
    assume_finite: bool = False,
) -> Tensor:
    """Indices ``(B, k)`` of points of each set, each the farthest from those before it, and none of them twice.

    Args:
        points: ``(B, N, D)``.
        valid_mask: ``(B, N)`` bool, the points that take part. Those that are not finite do not.
        k: points to pick, 0 or more.
        start_idx: ``(B,)``, the first pick of each set; where that point does not take part, the first that does.
        random_start: without start_idx, begin at a random point, the one that torch-fps begins at with this seed,
            instead of at the first.
        generator: of the random start.
        precision: dtype of the points that are compared; None: float32. Half precision is summed in float32.
        validate: raise if a set has fewer than k points, or a start is outside [0, N), which waits for the device.
            Without it such a set repeats its last pick.
        assume_finite: taken for torch-fps's sake; points are always looked at.

    Raises:
        ValueError: shapes do not match, k is negative, there are no points, or, with ``validate``, as above.

    What differs: bfloat16 runs on CPUs too.

    Source: torch-fps 0.6, torch_fps.farthest_point_sampling.

    Example:
        >>> points = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [5.0, 0.0], [float("nan"), 0.0]]])
        >>> valid = torch.ones(1, 4, dtype=torch.bool)
        >>> farthest_point_sampling(points, valid, 3, random_start=False)
        tensor([[0, 2, 1]])
    """
    return _sampled(points, valid_mask, k, start_idx, random_start, generator, precision, validate).indices


def farthest_point_sampling_with_knn(
    points: Tensor,
    valid_mask: Tensor,
    k: int,
    k_neighbors: int,
    *,
    start_idx: Tensor | None = None,
    random_start: bool = True,
    generator: Generator | None = None,
    precision: torch.dtype | None = None,
    validate: bool = True,
    assume_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`farthest_point_sampling`, and the ``k_neighbors`` points nearest to each pick, itself among them.

    Returns:
        Indices ``(B, k)`` and ``(B, k, k_neighbors)``, nearest first, lowest on ties; where a set has fewer points, the
        pick itself fills up. Distances of all pairs, (B, k, N), are kept while they are sorted.

    Raises:
        ValueError: k_neighbors is not from 1 to N; and as :func:`farthest_point_sampling`.

    Example:
        >>> points = torch.tensor([[[0.0], [1.0], [5.0], [7.0]]])
        >>> valid = torch.ones(1, 4, dtype=torch.bool)
        >>> farthest_point_sampling_with_knn(points, valid, 2, 2, random_start=False)
        (tensor([[0, 3]]), tensor([[[0, 1],
                 [3, 2]]]))
    """
    if k_neighbors <= 0:
        raise ValueError(f"k_neighbors must be positive, got {k_neighbors}")
    if k > 0 and k_neighbors > points.shape[1]:
        raise ValueError(f"k_neighbors ({k_neighbors}) must be <= N ({points.shape[1]})")
    points, valid, indices, _ = _sampled(points, valid_mask, k, start_idx, random_start, generator, precision, validate)
    if k == 0:
        return indices, indices.new_zeros(len(indices), 0, k_neighbors)
    rows = points if points.dtype == torch.float64 else points.float()
    gaps = rows.new_zeros(*indices.shape, rows.shape[1])
    for centers, column in zip(gather_rows(rows, indices).unbind(-1), rows.unbind(-1), strict=True):
        gaps += (centers[:, :, None] - column[:, None]).square()
    gaps, order = gaps.masked_fill(~valid[:, None], torch.inf).sort(dim=-1, stable=True)
    neighbors = torch.where(gaps.isinf(), indices[..., None], order)
    return indices, neighbors[..., :k_neighbors]


def farthest_point_sampling_with_assign(
    points: Tensor,
    valid_mask: Tensor,
    k: int,
    *,
    start_idx: Tensor | None = None,
    random_start: bool = True,
    generator: Generator | None = None,
    precision: torch.dtype | None = None,
    validate: bool = True,
    assume_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`farthest_point_sampling`, and for each point the number of the pick that is nearest, ``(B, N)``.

    The first pick on ties; 0 for points that do not take part.

    Example:
        >>> points = torch.tensor([[[0.0], [1.0], [5.0], [7.0]]])
        >>> valid = torch.ones(1, 4, dtype=torch.bool)
        >>> farthest_point_sampling_with_assign(points, valid, 2, random_start=False)
        (tensor([[0, 3]]), tensor([[0, 0, 1, 1]]))
    """
    sampled = _sampled(
        points, valid_mask, k, start_idx, random_start, generator, precision, validate, return_nearest=True
    )
    return sampled.indices, cast(Tensor, sampled.nearest).clamp(min=0)


def _sampled(
    points: Tensor,
    valid_mask: Tensor,
    k: int,
    start_idx: Tensor | None,
    random_start: bool,
    generator: Generator | None,
    precision: torch.dtype | None,
    validate: bool,
    **state: Any,
) -> _Sampled:
    """What all three calls begin with."""
    if points.ndim != 3 or valid_mask.shape != points.shape[:2]:
        raise ValueError(
            f"points must have shape [B, N, D] and valid_mask [B, N], got {tuple(points.shape)} and "
            f"{tuple(valid_mask.shape)}"
        )
    if k < 0:
        raise ValueError(f"K must be non-negative, got {k}")
    points = points.detach().to(precision or torch.float32)
    valid = valid_mask.to(points.device, torch.bool) & points.isfinite().all(-1)
    if k == 0:
        return _Sampled(
            points, valid, valid.new_zeros(len(points), 0, dtype=torch.int64), torch.zeros_like(valid).long()
        )
    if points.shape[1] == 0:
        raise ValueError("FPS with K > 0 requires at least one point (got N=0)")
    if validate and (valid.sum(1) < k).any():
        raise ValueError(
            f"FPS requires K <= number of valid points. Found batch(es) with K={k} but fewer valid points."
        )
    start = _first(valid, start_idx, random_start, generator, validate)
    found = farthest_points(points, k, start=start, mask=valid, distinct=True, **state)
    last = found.indices.gather(1, (found.counts - 1).clamp(min=0)[:, None])
    last = torch.where(last < 0, start[:, None], last)
    indices = torch.where(found.indices < 0, last, found.indices)
    return _Sampled(points, valid, indices, cast(CoresetState, found).nearest if state else None)


def _first(
    valid: Tensor, start_idx: Tensor | None, random_start: bool, generator: Generator | None, validate: bool
) -> Tensor:
    """The first pick (B,) of each set, as torch-fps chooses it."""
    first = valid.long().argmax(1)
    if start_idx is None:
        if not random_start:
            return first
        scores = torch.rand(valid.shape, device=valid.device, generator=generator)
        return scores.masked_fill(~valid, -torch.inf).argmax(1)
    if start_idx.device != valid.device or start_idx.numel() != len(valid):
        raise ValueError(
            f"start_idx must have shape [B] and be on the same device as points, got {tuple(start_idx.shape)} on "
            f"{start_idx.device}"
        )
    start = start_idx.to(torch.int64).reshape(-1)
    inside = (start >= 0) & (start < valid.shape[1])
    if validate and not inside.all():
        raise ValueError("start_idx values must be within [0, N)")
    start = torch.where(inside, start, 0)
    takes_part = inside & valid.gather(1, start[:, None])[:, 0]
    return torch.where(takes_part | ~valid.any(1), start, first)
