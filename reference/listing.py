"""Differentiable coreset selection as in Listing 1 of FaceCoresetNet (Shapira and Keller, AAAI 2024).

Every pick is a one-hot row vector, every gather a matrix product, and autograd does the gradient: slow, and
simple enough to be held against the paper line by line.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """What :func:`coreset_listing` returns; shapes as in ``fcn_kernels.Coreset``."""

    features: Tensor  # (B, K, C)
    indices: Tensor  # (B, K) int64
    distances: Tensor  # (B, K)
    min_distances: Tensor | None = None  # (B, N), to all picks, if asked for
    nearest: Tensor | None = None  # (B, N) int64, the pick that is so near; -1 where none is nearer than what was given


def straight_through(logits: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """One-hot argmax in the forward pass, softmax(logits / tau) in the backward pass, with the argmax."""
    soft = torch.softmax(logits / tau, dim=-1)
    index = logits.argmax(dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, index[..., None], 1.0)
    return hard - soft.detach() + soft, index


def coreset_listing(
    features: Tensor,
    quality: Tensor,
    k: int,
    gamma: Tensor | float = 0.0,
    *,
    tau: float = 1.0,
    noise: Tensor | None = None,
    distance_scale: float = 1.0,
    normalized: bool = False,
    distinct: bool = False,
    start: Tensor | None = None,
    metric: str = "cosine",
    min_distances: Tensor | None = None,
    return_min_distances: bool = False,
) -> Selection:
    """K rows of each set, best quality first, then farthest from the picks in quality-weighted distance.

    ``features`` (B, N, C) with 1 <= k <= N, ``quality`` (B, N) > 0, ``noise`` (K, B, N) Gumbel samples or None for
    argmax, ``start`` (B,) fixes the first pick. ``distance_scale`` is 1 in the paper, 1/2 in the authors' code;
    ``normalized`` says that rows are unit length, as the paper assumes. ``metric`` is "cosine", the paper's, or
    "sqeuclidean". ``min_distances`` (B, N) are distances to what was picked before: then the farthest comes first.
    ``return_min_distances`` asks for those to what was picked now, too. Any float dtype, float64 included.
    """
    euclidean = metric == "sqeuclidean"
    unit = features if normalized or euclidean else features / features.norm(dim=-1, keepdim=True)
    weight = quality**gamma
    logits = quality if min_distances is None else min_distances.detach()
    taken = torch.zeros_like(quality, dtype=torch.bool)
    rows, indices, distances = [], [], []
    nearest = None if min_distances is None else min_distances.detach()
    owner = torch.full_like(quality, -1, dtype=torch.int64)
    for step in range(k):
        perturbed = logits if noise is None else logits + noise[step]
        if distinct:
            perturbed = perturbed.masked_fill(taken, -torch.inf)
        onehot, index = straight_through(perturbed, tau)
        if step == 0 and start is not None:
            index = start
            onehot = torch.zeros_like(quality).scatter_(-1, start[:, None], 1.0)
        row = (onehot[:, None, :] @ features)[:, 0]  # (B, C)
        rows.append(row)
        indices.append(index)
        first = torch.full_like(index, torch.inf, dtype=quality.dtype)
        distances.append(first if nearest is None else logits.detach().gather(-1, index[:, None])[:, 0])
        taken = taken.scatter(-1, index[:, None], 1)
        if step + 1 == k and not return_min_distances:
            break
        if euclidean:
            gap = (features - row[:, None]).square().sum(-1)  # (B, N)
        else:
            direction = row if normalized else row / row.norm(dim=-1, keepdim=True)
            gap = 1 - (unit @ direction[:, :, None])[..., 0]
        distance = distance_scale * weight * gap
        owner = torch.where(distance < (torch.inf if nearest is None else nearest), step, owner)
        nearest = distance if nearest is None else torch.minimum(nearest, distance)
        logits = nearest
    picked = torch.stack(rows, 1), torch.stack(indices, 1), torch.stack(distances, 1)
    return Selection(*picked, logits.detach(), owner) if return_min_distances else Selection(*picked)
