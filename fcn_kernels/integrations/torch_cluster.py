"""For users of ``torch_cluster.fps``, ``torch_geometric.nn.fps`` and ``pyg_lib.ops.fps``; none of them is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fcn_kernels.integrations.sampling import complete, farthest_points, set_offsets


def fps(
    src: Tensor,
    batch: Tensor | None = None,
    ratio: float | Tensor | None = None,
    random_start: bool = True,
    batch_size: int | None = None,
    ptr: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """A share of the points of each set, each the farthest from those before it.

    Args:
        src: ``(T, ...)``, the points of all sets.
        batch: ``(T,)``, in ascending order, the set of each point. None: one set.
        ratio: above 0 and up to 1, a number or one for each set: of n points ceil(float32(n) * ratio) are picked.
            None: 0.5.
        random_start: begin at a random point of each set, which ``torch.manual_seed`` repeats (theirs is C's rand),
            instead of at its first.
        batch_size: number of sets, where the last ones may be without points.
        ptr: ``(B + 1,)``, offsets of the sets, instead of batch.

    Returns:
        Numbers of the picked points among all T, int64, set by set.

    Raises:
        ValueError: a ratio is not above 0 and up to 1, the batch is not of T numbers in ascending order, or a set has
            fewer points to pick, finite ones, than its share.

    What differs: float16 and bfloat16 are summed in float32 (theirs in the points' dtype); on a GPU theirs begins with
    distances of 5e4, so that points farther apart are equals to it; it does not run in TorchScript.

    Source: torch-cluster 1.6.3, torch_cluster.fps.

    Example:
        >>> points = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
        >>> fps(points, torch.tensor([0, 0, 1, 1]), ratio=0.5, random_start=False)
        tensor([0, 2])
    """
    if batch is not None and ptr is None:
        if batch.shape != src.shape[:1] or (batch.diff() < 0).any():
            raise ValueError(f"expected batch of {len(src)} numbers in ascending order, got {tuple(batch.shape)}")
        ptr = set_offsets(batch, batch_size)
    offsets = torch.as_tensor([0, len(src)] if ptr is None else ptr, dtype=torch.int64, device=src.device)
    share = ratio if isinstance(ratio, Tensor) else src.new_tensor(0.5 if ratio is None else ratio)
    if not ((share > 0) & (share <= 1)).all():
        raise ValueError(f"expected a ratio above 0 and up to 1, got {ratio}")
    sizes = offsets.diff()
    picks = (sizes.float() * share).ceil().long()
    start = (torch.rand(sizes.shape, device=src.device) * sizes).long() if random_start else torch.zeros_like(sizes)
    start = start.minimum(sizes - 1).clamp(min=0)  # a product may round up to the size
    points = src.reshape(len(src), math.prod(src.shape[1:]))
    found = farthest_points(points, picks, cu_seqlens=offsets, start=start)
    indices = complete(found, picks)
    return (indices + offsets[:-1, None])[indices >= 0]


def pyg_lib_fps(src: Tensor, ptr: Tensor, ratio: float = 0.5, random_start: bool = True) -> Tensor:
    """``pyg_lib.ops.fps``: :func:`fps` with offsets in the second place.

    Source: pyg-lib 0.5, pyg_lib.ops.fps.

    Example:
        >>> pyg_lib_fps(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 3]), ratio=0.5, random_start=False)
        tensor([0, 2])
    """
    return fps(src, ptr=ptr, ratio=ratio, random_start=random_start)
