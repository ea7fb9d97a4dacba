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
) -> Selection:
    """K rows of each set, best quality first, then farthest from the picks in quality-weighted cosine distance.

    ``features`` (B, N, C) with 1 <= k <= N, ``quality`` (B, N) > 0, ``noise`` (K, B, N) Gumbel samples or None for
    argmax, ``start`` (B,) fixes the first pick. ``distance_scale`` is 1 in the paper, 1/2 in the authors' code;
    ``normalized`` says that rows are unit length, as the paper assumes. Any float dtype, float64 included.
    """
    unit = features if normalized else features / features.norm(dim=-1, keepdim=True)
    weight = quality**gamma
    logits = quality
    taken = torch.zeros_like(quality, dtype=torch.bool)
    rows, indices, distances = [], [], []
    nearest = None
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
        distances.append(first if step == 0 else logits.detach().gather(-1, index[:, None])[:, 0])
        taken = taken.scatter(-1, index[:, None], 1)
        if step + 1 == k:
            break
        direction = row if normalized else row / row.norm(dim=-1, keepdim=True)
        cosine = (unit @ direction[:, :, None])[..., 0]  # (B, N)
        distance = distance_scale * weight * (1 - cosine)
        nearest = distance if nearest is None else torch.minimum(nearest, distance)
        logits = nearest
    return Selection(torch.stack(rows, 1), torch.stack(indices, 1), torch.stack(distances, 1))
