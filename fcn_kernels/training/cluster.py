"""The losses that Cluster and Aggregate is trained with: all sets of a step in one packed call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fcn_kernels import checks
from fcn_kernels.heads.cluster_aggregate import ClusterAggregate
from fcn_kernels.heads.cluster_state import ClusterState

EPS_COSINE = 1e-5  # added to the norms that a cosine is divided by


class ClusterLosses(NamedTuple):
    """Of a step; both 0-d, with their graph."""

    center: Tensor
    """Mean distance of the aggregates from their class centers."""
    memory: Tensor
    """Mean distance of what a sequence of two chunks gives from what one shot gives."""


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - a . b / ((|a| + 1e-5) (|b| + 1e-5)), (..., C) -> (...)."""
    norms = [torch.linalg.vector_norm(t, dim=-1) + EPS_COSINE for t in (a, b)]
    distance: Tensor = 1 - (a * b).sum(-1) / (norms[0] * norms[1])
    return distance


def cluster_losses(
    head: ClusterAggregate,
    features: Tensor,
    styles: Tensor | None,
    class_centers: Tensor,
    quality: Tensor | None = None,
    *,
    step: int = 2,
) -> ClusterLosses:
    r"""Center loss over prefixes, and memory loss, of B identities with two groups of n images each.

    With agg(.) what the head makes of a set before it is made unit, p_gk the first k images of group g, k = step,
    2 step, ..., n, and c the class center::

        sequence = finish(state(p_1n) + state(p_2n)),   single = agg(all 2 n images)
        center = 1/4 (mean_k D(agg(p_1k), c) + mean_k D(agg(p_2k), c) + D(sequence, c) + D(single, c))
        memory = D(sequence, single)                         D(a, b) = 1 - cos(a, b), mean over the identities

    Where the authors run the head once for each prefix and chunk, here all sets are packed in one call. The states of
    the sequence are those of the longest prefixes, so that an identity takes 176 rows instead of 208 (n = 16), which
    batch normalization sees as one batch.

    Args:
        head: in ``train()``.
        features: (B, 2, n, C). styles: (B, 2, n, style_dim) or (B, 2, n, S, 2), or None.
        class_centers: (B, C), of each identity, of any length.
        quality: (B, 2, n), the norms of unit features, or None.
        step: images from one prefix to the next; divides n.

    The authors' loss is ``center + memory / B``: their memory loss is divided by the batch once more than meant.

    Raises:
        TypeError, ValueError: a shape does not fit; or as the head.

    Source: Kim et al., "Cluster and Aggregate: Face Recognition with Large Probe Set", NeurIPS 2022, section 3.4.

    Example:
        >>> head = ClusterAggregate(dim=32, drop_path=0.0)
        >>> x, styles, centers = torch.randn(4, 2, 6, 32), torch.randn(4, 2, 6, 64), torch.randn(4, 32)
        >>> losses = cluster_losses(head, x, styles, centers)
        >>> (losses.center + losses.memory).backward()
    """
    if not isinstance(features, Tensor):
        raise TypeError(f"expected features to be a Tensor, got {type(features).__name__}")
    if features.ndim != 4 or features.shape[1] != 2:
        raise ValueError(f"expected features of shape (B, 2, n, C), got {tuple(features.shape)}")
    identities, _, n, dim = features.shape
    # rows are taken by their places: those of other groups would pass for these
    for name, given in (("styles", styles), ("quality", quality)):
        if given is not None and tuple(given.shape[:3]) != (identities, 2, n):
            raise ValueError(f"expected {name} of shape {(identities, 2, n)} and more, got {tuple(given.shape)}")
    if checks.at_least_one("step", step) > n or n % step:
        raise ValueError(f"expected step to divide the n = {n} images of a group, got {step}")
    if tuple(class_centers.shape) != (identities, dim):
        raise ValueError(f"expected class_centers of shape {(identities, dim)}, got {tuple(class_centers.shape)}")
    lengths = range(step, n + 1, step)
    spans = [(first, first + k) for first in (0, n) for k in lengths] + [(0, 2 * n)]
    sets = [torch.arange(*span, device="cpu") for span in spans]
    rows = torch.cat(sets).to(features.device)
    sizes = torch.tensor([len(rows_of) for rows_of in sets], device="cpu").repeat(identities)
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(features.device)

    def packed(t: Tensor) -> Tensor:
        return t.flatten(1, 2)[:, rows].flatten(0, 1)

    s, q = (None if t is None else packed(t) for t in (styles, quality))
    state = head.update(packed(features), s, q, cu_seqlens=offsets)
    last = torch.arange(identities, device=features.device) * len(sets) + len(lengths) - 1
    sequence = state[last] + state[last + len(lengths)]
    both = ClusterState(**{name: torch.cat([t, getattr(sequence, name)]) for name, t in vars(state).items()})
    fused = head.finish(both)
    aggregate = fused.descriptor.to(fused.norm.dtype) * fused.norm[:, None]
    each, joined = aggregate[: len(state)].unflatten(0, (identities, len(sets))), aggregate[len(state) :]
    from_center = cosine_distance(each, class_centers[:, None])
    prefixes, single = from_center[:, :-1].unflatten(1, (2, -1)).mean((0, 2)), from_center[:, -1].mean()
    center = (prefixes.sum() + single + cosine_distance(joined, class_centers).mean()) / 4
    return ClusterLosses(center, cosine_distance(joined, each[:, -1]).mean())
