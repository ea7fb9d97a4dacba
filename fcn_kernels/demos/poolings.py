"""Ways to make one descriptor of a template's embeddings.

Each takes packed unit features (T, C), their norms (T,) and cu_seqlens (B + 1,), and gives unit descriptors (B, C)
and the norms (B,) that they had, as :class:`fcn_kernels.heads.facecoresetnet.CoresetAggregator` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fcn_kernels import coreset_select
from fcn_kernels.heads.cluster_aggregate import ClusterAggregate
from fcn_kernels.heads.facecoresetnet import CoresetAggregator

Pooling = Callable[..., Any]
OURS, CLUSTERS = "coreset (ours)", "clusters (ours)"


def split_norm(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., C) as unit rows (..., C) and their norms (...,)."""
    norm = rows.norm(dim=-1)
    return rows / norm[..., None], norm


def average(features: Tensor, quality: Tensor, *, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the unit embeddings: every image counts the same."""
    return split_norm(_means(features, cu_seqlens))


def norm_weighted(features: Tensor, quality: Tensor, *, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the raw embeddings: an image counts by its quality."""
    return split_norm(_means(features * quality[:, None], cu_seqlens))


def best_quality(features: Tensor, quality: Tensor, *, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Embedding of the one best image, to which alone the gradient flows."""
    best = coreset_select(features.detach(), 1, quality.detach(), cu_seqlens=cu_seqlens).indices[:, 0]
    rows = cu_seqlens[:-1] + best
    return features[rows], quality[rows]


class Clusters(nn.Module):
    """Cluster and Aggregate without styles: what it knows of an image is the norm of its embedding."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.head = ClusterAggregate(dim, style_dim=0)

    def forward(self, features: Tensor, quality: Tensor, *, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Descriptors and norms."""
        fused = self.head(features, quality=quality, cu_seqlens=cu_seqlens)
        return fused.descriptor, fused.norm


def poolings(dim: int, k: int, gamma: float) -> dict[str, Pooling]:
    """All ways that the demo compares, by their names; k and gamma are the coreset's."""
    return {
        "average": average,
        "norm-weighted": norm_weighted,
        "best quality": best_quality,
        CLUSTERS: Clusters(dim),
        OURS: CoresetAggregator(dim, k, gamma=gamma),
    }


def _means(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.segment_reduce(rows, "mean", lengths=cu_seqlens.diff().long())
