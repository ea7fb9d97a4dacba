"""The calls of clustering, as their operators, backends and kernels agree on them.

Rows lie flat: T rows, and sets (or the chunks that sets are cut in) own ``offsets[b]`` to ``offsets[b] + lengths[b]``
of them. Sums are float32, or float64 for float64 rows; so is every tensor here but the rows themselves.
"""

from typing import NamedTuple

import torch
from torch import Tensor

EPS_NORM = 1e-5  # added to a row's norm before the row is divided by it
EPS_LAYER_NORM = 1e-5
CODES = 61  # a norm's code is 0 to 60


class Sums(NamedTuple):
    """Shares a of each row among centers, and the sums weighted by them.

    a_mn = softmax over m of weight_m . k_n + bias_m. A row with a value that is not finite takes no part.
    """

    values: Tensor  # (T, C), of any floating dtype
    keys: Tensor | None  # (T, d); None: the values
    scale: Tensor | None  # (T,), of the values; None: 1
    weight: Tensor  # (M + ghosts, d)
    bias: Tensor  # (M + ghosts,)
    offsets: Tensor  # (B + 1,) int64
    lengths: Tensor  # (B,) int64
    valid: Tensor | None  # (T,) bool, rows that take part; None: all
    ghosts: int  # the last centers, which take shares and give no sums

    @property
    def centers(self) -> int:
        """M."""
        return self.weight.shape[0] - self.ghosts


class Summed(NamedTuple):
    """What comes of them."""

    sums: Tensor  # (B, M, C), sum_n a_mn scale_n values_n
    key_sums: Tensor  # (B, M, d), sum_n a_mn k_n; (B, M, 0) without keys
    masses: Tensor  # (B, M), sum_n a_mn


class SumsGradients(NamedTuple):
    """Of the inputs that have one; those that the call lacks, or that were not asked for, have no elements."""

    values: Tensor
    keys: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor


class Chunks(NamedTuple):
    """Rows to sums with everything between: norm code, blocks, shares.

    A chunk's tokens are its rows h_n = [styles_n ; table[code(r_n)]], then the M centers. L blocks let all tokens of a
    chunk attend to each other. With x_hat the LayerNorm (without weight and bias) of a row's last token, a is as in
    :class:`Sums` with x_hat as keys, and the values are u_n = features_n / (r_n + 1e-5), or features_n r_n /
    (r_n + 1e-5) where r_n = quality_n is given. A row whose features, style or quality is not finite, or whose quality
    is below 0, takes no part. LayerNorms' weights are folded into what follows them; the queries are scaled.
    """

    features: Tensor  # (T, C), of any floating dtype
    quality: Tensor | None  # (T,), the rows' norms r; None: |features_n|
    styles: Tensor | None  # (T, d - p); None: p = d
    table: Tensor  # (61, p)
    edges: Tensor  # (60,), rising; the code of r is the number of edges <= r
    tokens: Tensor  # (M, d), the centers
    qkv_weight: Tensor  # (L, 3 d, d), queries, keys and values, each head-major
    qkv_bias: Tensor  # (L, 3 d)
    proj_weight: Tensor  # (L, d, d)
    proj_bias: Tensor  # (L, d)
    fc1_weight: Tensor  # (L, 4 d, d)
    fc1_bias: Tensor  # (L, 4 d)
    fc2_weight: Tensor  # (L, d, 4 d)
    fc2_bias: Tensor  # (L, d)
    weight: Tensor  # (M, d), of the shares' logits on x_hat
    bias: Tensor  # (M,)
    residual: Tensor | None  # (L, 2, P), factors of a block's attention and MLP in a chunk (0: dropped); None: 1
    offsets: Tensor  # (P + 1,) int64
    lengths: Tensor  # (P,) int64
    valid: Tensor | None  # (T,) bool, rows that take part; None: all
    heads: int
    longest: int  # no length is above it: T, unless the host knows better

    @property
    def depth(self) -> int:
        """L."""
        return self.qkv_weight.shape[0]


class Clustered(NamedTuple):
    """What comes of chunks."""

    sums: Tensor  # (P, M, C), sum_n a_mn u_n
    key_sums: Tensor  # (P, M, d), sum_n a_mn x_hat_n
    masses: Tensor  # (P, M), sum_n a_mn
    shares: Tensor  # (T, M), a; 0 for rows that take no part
    counts: Tensor  # (P,) int64, rows that took part
    # (L, T + P M, d), the tokens after each block, those of chunk p from row offsets[p] + p M on; no elements unless
    # kept for the backward pass
    hidden: Tensor

    @classmethod
    def empty(cls, p: Chunks, keep: bool) -> "Clustered":
        """Not filled in yet."""
        new, (centers, dim), rows, chunks = p.tokens.new_empty, p.tokens.shape, p.features.shape[0], p.lengths.shape[0]
        return cls(
            new(chunks, centers, p.features.shape[1]),
            new(chunks, centers, dim),
            new(chunks, centers),
            new(rows, centers),
            new(chunks, dtype=torch.int64),
            new((p.depth, rows + chunks * centers, dim) if keep else (0,)),
        )


class ChunksGradients(NamedTuple):
    """Of the inputs that have one; those that the call lacks, and rows that are frozen, have no elements."""

    features: Tensor
    quality: Tensor
    styles: Tensor
    table: Tensor
    tokens: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    weight: Tensor
    bias: Tensor
