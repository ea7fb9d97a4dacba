"""For users of ``pytorch3d.ops.sample_farthest_points``: the same call on our kernels. PyTorch3D is never imported."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fcn_kernels.integrations.sampling import farthest_points, gather_rows


def sample_farthest_points(
    points: Tensor,
    lengths: Tensor | None = None,
    K: int | Sequence[int] | Tensor = 50,
    random_start_point: bool = False,
) -> tuple[Tensor, Tensor]:
    """Points of each cloud, each the farthest from those before it, and their indices.

    Args:
        points: ``(N, P, D)``, taken as float32.
        lengths: ``(N,)`` number of points of each cloud, or None for P.
        K: points to sample, a number or one for each cloud.
        random_start_point: begin at a random point, which ``torch.manual_seed`` repeats, instead of at point 0.

    Returns:
        Points ``(N, max K, D)`` float32 and indices ``(N, max K)`` int64, padded with 0.0 and -1. The gradient reaches
        the sampled points alone.

    Raises:
        ValueError: K or lengths are not one for each cloud, or a length is above P.

    What differs: a cloud of which only copies of sampled points are left gives those, each once, where theirs gives a
    point again; points that are not finite are passed by, and the first that is takes the place of such a start; a K of
    0 gives nothing, where theirs gives the start.

    Source: PyTorch3D 0.7, pytorch3d.ops.sample_farthest_points.

    Example:
        >>> clouds = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [4.0, 0.0]], [[2.0, 2.0], [2.0, 3.0], [9.0, 9.0]]])
        >>> points, indices = sample_farthest_points(clouds, lengths=torch.tensor([3, 2]), K=[2, 3])
        >>> indices.tolist(), points.shape
        ([[0, 2, -1], [0, 1, -1]], torch.Size([2, 3, 2]))
    """
    clouds, rows, _ = points.shape
    if lengths is not None and lengths.shape != (clouds,):
        raise ValueError(f"points and lengths must have same batch dimension. Got {clouds} and {tuple(lengths.shape)}")
    if lengths is not None and (lengths > rows).any():
        raise ValueError(f"A value in lengths was too large. Got {int(lengths.max())}, and {rows} points")
    if not isinstance(K, int) and len(K) != clouds:
        raise ValueError(f"K and points must have the same batch dimension. Got {len(K)} and {clouds}")
    lengths = None if lengths is None else lengths.to(torch.int64)
    K = K.to(torch.int64) if isinstance(K, Tensor) else [0] * clouds if K == 0 else K
    start = torch.zeros(clouds, dtype=torch.int64, device=points.device)
    if random_start_point and lengths is None:
        start = torch.randint(high=rows, size=(clouds,), device=points.device)
    elif random_start_point and lengths is not None:
        start = (lengths * torch.rand(clouds, device=points.device)).to(torch.int64)
    points = points.to(torch.float32)
    if rows:
        finite = points.isfinite().all(-1)
        if lengths is not None:
            finite &= torch.arange(rows, device=points.device) < lengths[:, None]
        start = torch.where(finite.gather(1, start[:, None])[:, 0], start, finite.long().argmax(1))
    indices = farthest_points(points, K, lengths=lengths, start=start, distinct=True).indices
    return gather_rows(points, indices), indices
