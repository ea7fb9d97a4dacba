"""The aggregation head of FaceCoresetNet (Shapira and Keller, AAAI 2024, section 3 and figure 2), plainly.

Every row of the set is projected to keys and values, every pick is a one-hot product, one set has the same
number of rows as the next. The submodules bear the names of ``fcn_kernels.CoresetAggregator``, so that one's
state dict loads into the other.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.listing import coreset_listing


def norm_encoding(norms: Tensor, dim: int) -> Tensor:
    """The sinusoid of a row's norm, as of a position in a sequence: (..., ) -> (..., dim).

    e(r)_2i = sin(2 pi r / 10000^(2i / dim)), e(r)_2i+1 = cos of the same.
    """
    channel = torch.arange(dim, device=norms.device, dtype=torch.float64)
    wavelength = 10000 ** (2 * (channel // 2) / dim)
    angle = norms[..., None] * (2 * math.pi / wavelength).to(norms.dtype)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


def attention(query: Tensor, key: Tensor, value: Tensor, layer: nn.MultiheadAttention, training: bool) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V of each head: query (B, K, C), key and value (B, N, C) -> (B, K, C)."""
    heads = layer.num_heads
    weights = layer.in_proj_weight.chunk(3)
    biases = layer.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(rows, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, rows, d)
        for rows, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    probability = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    probability = F.dropout(probability, layer.dropout, training)
    return layer.out_proj((probability @ v).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class ReferenceHead(nn.Module):
    """Unit features (B, N, C) and their norms (B, N) to descriptors (B, C) and their norms (B,)."""

    def __init__(
        self, dim: int = 512, k: int = 3, num_heads: int = 8, dropout: float = 0.1, gamma: float = 0.01
    ) -> None:
        super().__init__()
        self.k = k
        self.gamma = nn.Parameter(torch.tensor(float(gamma)))
        self.encoding_norm = nn.LayerNorm(dim)
        self.self_attention = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attention = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.cross_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def encode(self, norms: Tensor) -> Tensor:
        dim = self.encoding_norm.normalized_shape[0]
        return self.encoding_norm(norm_encoding(norms, dim))  # type: ignore[no-any-return]

    def forward(self, features: Tensor, quality: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = quality[..., None] * features
        k = min(self.k, rows.shape[1])
        core = coreset_listing(rows, quality, k, self.gamma, noise=noise, distance_scale=0.5).features
        target = core + self.encode(core.norm(dim=-1))
        attended = attention(target, target, target, self.self_attention, self.training)
        target = self.self_norm(target + self.dropout(attended))
        keys = rows + self.encode(quality)
        attended = attention(target, keys, rows, self.cross_attention, self.training)
        delta = self.cross_norm(core + self.dropout(attended))
        aggregate = (core + delta).mean(dim=1)
        norm = aggregate.norm(dim=-1)
        return aggregate / norm[:, None], norm
