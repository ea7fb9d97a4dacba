"""For users of ``pointnet2_ops.pointnet2_utils.furthest_point_sample``; pointnet2_ops is never imported."""

from __future__ import annotations

import torch
from torch import Tensor

from fcn_kernels.integrations.sampling import farthest_points


def furthest_point_sample(xyz: Tensor, npoint: int) -> Tensor:
    """Indices of npoint points of each cloud, the first and then each the farthest from those before it.

    Args:
        xyz: ``(B, N, 3)``, or of any other number of columns.
        npoint: points to pick, at least 1. Beyond the points of a cloud that are apart, its point 0 is repeated.

    Returns:
        ``(B, npoint)`` int32, without a gradient.

    Raises:
        TypeError, ValueError: xyz is not ``(B, N, C)`` of a floating dtype, is without points, or npoint is below 1.

    What differs: it runs on CPUs; points within 0.03 of the origin can be picked, which theirs passes over; at ties the
    lowest point is picked, in theirs the one of the lowest thread; point 0 has to be finite, and others that are not
    are passed by.

    Source: pointnet2_ops 3.0, pointnet2_utils.furthest_point_sample.

    Example:
        >>> furthest_point_sample(torch.tensor([[[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [5.0, 0.0, 0.0]]]), 2)
        tensor([[0, 2]], dtype=torch.int32)
    """
    if xyz.ndim != 3 or xyz.shape[1] == 0:
        raise ValueError(f"expected xyz of shape (B, N, 3) with N above 0, got {tuple(xyz.shape)}")
    if not xyz[:, 0].isfinite().all():
        raise ValueError("expected point 0 of each cloud to be finite, got one that is not")
    return farthest_points(xyz, npoint, start=0).indices.clamp(min=0).to(torch.int32)
