"""Cluster and Aggregate (Kim, Liu, Jain and Liu, NeurIPS 2022), plainly: one set at a time, chunk after chunk.

Style input maker (SIM), cluster network (CN) and aggregation network (AGN) as the paper draws them, with the running
mean of its sequential inference. The submodules bear the names of ``fcn_kernels.ClusterAggregate``, so that one's state
dict loads into the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Cluster(NamedTuple):
    """What is known of a set after some of its chunks."""

    means: Tensor  # (M, C), of the unit rows of each center
    styles: Tensor  # (M, d), of their tokens
    masses: Tensor  # (M,), how many rows each center has


class Result(NamedTuple):
    """Of a set."""

    aggregate: Tensor  # (C,), the descriptor before it is made unit
    cluster: Cluster
    confidence: Tensor  # (M, C) or (M, 1)
    shares: Tensor  # (N, M), of the rows among the centers


class StyleInput(nn.Module):
    """SIM: z (N, S, 2), mean and deviation of S channels, to styles (N, 64)."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(channels, 2))
        self.prelu = nn.PReLU()
        self.linear = nn.Linear(channels, dim)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, z: Tensor) -> Tensor:
        return self.norm(self.linear(self.prelu((z * self.mix).sum(-1))))  # type: ignore[no-any-return]


class NormCode(nn.Module):
    """Norms (N,) to rows of a table (N, 64) of sinusoids: 61 steps of a tenth of the norms' deviation."""

    table: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1, affine=False)
        self.scale = nn.Parameter(torch.ones(()))
        angle = torch.arange(61.0)[:, None] * 10000 ** (-torch.arange(0, dim, 2) / dim)
        self.register_buffer("table", torch.stack([angle.sin(), angle.cos()], -1).flatten(1))

    def forward(self, norms: Tensor) -> Tensor:
        score = self.norm(norms.detach()[:, None])[:, 0]
        code = (10 * score.clamp(-3, 3)).long() + 30  # towards 0
        return self.scale * self.table[code]


class Block(nn.Module):
    """A transformer block over the tokens (n + M, d) of a chunk."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)  # (heads, n + M, d_h)
        attention = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        h = h + self.proj((attention @ v).transpose(0, 1).flatten(1))
        return h + self.fc2(F.gelu(self.fc1(self.norm2(h))))  # type: ignore[no-any-return]


class Assign(nn.Module):
    """Rows' tokens (n, d) shared out among the centers (M, d): the rows as keys (n, d), and shares (n, M)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.center_norm, self.key_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, h: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        k = self.key_norm(h)
        logits = self.key(k) @ self.query(self.center_norm(centers)).T / k.shape[-1] ** 0.5
        return k, logits.softmax(-1)


class Mixer(nn.Module):
    """A layer of the AGN: tokens (M, 2 d) mixed across the centers, then across the channels."""

    def __init__(self, centers: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(()))
        self.norm = nn.LayerNorm(width)  # one for both
        self.token1, self.token2 = nn.Linear(centers, 2 * centers), nn.Linear(2 * centers, centers)
        self.channel1, self.channel2 = nn.Linear(width, width // 2), nn.Linear(width // 2, width)

    def forward(self, t: Tensor) -> Tensor:
        t = self.gate * t + self.token2(F.gelu(self.token1(self.norm(t).T))).T
        return t + self.channel2(F.gelu(self.channel1(self.norm(t))))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two layers."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, out)

    def forward(self, t: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(t)))  # type: ignore[no-any-return]


class ReferenceClusterAggregate(nn.Module):
    """Rows (N, C), not normalized, and their styles to one aggregate (C,)."""

    def __init__(
        self,
        dim: int = 512,
        clusters: int = 4,
        depth: int = 2,
        style_dim: int = 64,
        norm_dim: int = 64,
        num_heads: int = 8,
        channelwise: bool = True,
        style_channels: int = 384,
    ) -> None:
        super().__init__()
        width = style_dim + norm_dim
        if style_dim and style_channels:
            self.style = StyleInput(style_channels, style_dim)
        self.norm_code = NormCode(norm_dim)
        self.centers = nn.Parameter(torch.randn(clusters, width) / width**0.5)
        self.blocks = nn.ModuleList([Block(width, num_heads) for _ in range(depth)])
        self.assign = Assign(width)
        self.mixers = nn.ModuleList([Mixer(clusters, 2 * width) for _ in range(depth)])
        self.confidence = Mlp(2 * width, dim if channelwise else 1)

    def forward(self, features: Tensor, styles: Tensor | None = None, sizes: Sequence[int] | None = None) -> Result:
        """The set's rows in chunks of these sizes, or in one.

        Styles: (N, 64) or (N, S, 2), or None for a head without styles.
        """
        if styles is not None and styles.ndim == 3:
            styles = self.style(styles)
        pieces = [len(features)] if sizes is None else list(sizes)
        parts = features.split(pieces), [None] * len(pieces) if styles is None else styles.split(pieces)
        cluster, shares = None, []
        for x, s in zip(*parts, strict=True):
            cluster, share = self.update(x, s, cluster)
            shares.append(share)
        assert cluster is not None
        aggregate, confidence = self.finish(cluster)
        return Result(aggregate, cluster, confidence, torch.cat(shares))

    def update(self, x: Tensor, styles: Tensor | None, before: Cluster | None) -> tuple[Cluster, Tensor]:
        """One more chunk: rows (n, C), styles (n, 64); what is known now, and the rows' shares (n, M)."""
        norms = x.norm(dim=-1)
        unit = x / (norms + 1e-5)[:, None]
        code = self.norm_code(norms)
        h = torch.cat([code if styles is None else torch.cat([styles, code], -1), self.centers])
        for block in self.blocks:
            h = block(h)
        key, share = self.assign(h[: len(x)], self.centers)  # what the blocks made of the centers is dropped
        masses = share.sum(0)
        weight = (share / masses.detach().clamp(min=1)).T  # a center with less than one row does not get a whole mean
        cluster = Cluster(weight @ unit, weight @ key, masses)
        return cluster if before is None else merge(before, cluster), share

    def finish(self, cluster: Cluster) -> tuple[Tensor, Tensor]:
        """AGN: the aggregate (C,) and the confidence (M, C) or (M, 1)."""
        t = torch.cat([self.centers, cluster.styles], -1)
        for mixer in self.mixers:
            t = mixer(t)
        confidence = self.confidence(t).softmax(0)
        return (confidence * cluster.means).sum(0), confidence


def merge(a: Cluster, b: Cluster) -> Cluster:
    """The running mean, weighted by mass."""
    masses = a.masses + b.masses

    def mean(x: Tensor, y: Tensor) -> Tensor:
        return (a.masses[:, None] * x + b.masses[:, None] * y) / masses.clamp(min=1e-6)[:, None]

    return Cluster(mean(a.means, b.means), mean(a.styles, b.styles), masses)
