"""One selection call, validated and flattened: what the op, the backends and every tier agree on."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fcn_kernels.sets import accumulator


class Problem(NamedTuple):
    """The inputs of a call in the form that the backends take.

    "R rows" counts the rows of all sets: R = B * N for padded sets, T for packed ones, and a tensor of row values is
    flat over it. Rows whose saved norm is not > 0 can never be picked.
    """

    features: Tensor  # (B, N, C) padded, or (T, C) packed
    quality: Tensor | None = None  # (R,) or (B, N), float32 or float64; None: the rows' norms
    gamma: Tensor = torch.tensor(0.0, device="cpu")  # 0-d, on the features' device or the CPU
    tau: Tensor = torch.tensor(1.0, device="cpu")  # 0-d, on the features' device or the CPU
    noise: Tensor | None = None  # (K, R), Gumbel samples
    seed: Tensor | None = None  # 0-d int64, on the features' device or the CPU; noise is drawn from it
    start: Tensor | None = None  # (B,) int64, the first pick
    mask: Tensor | None = None  # (R,) bool
    lengths: Tensor | None = None  # (B,) int32 or int64
    cu_seqlens: Tensor | None = None  # (B + 1,) int32 or int64; the features are packed
    limits: Tensor | None = None  # (B,) int64, at most k: picks of each set
    min_distances: Tensor | None = None  # (R,) of quality's dtype, to what was picked before; -inf: never to be picked
    k: int = 1
    distance_scale: float = 1.0
    normalized: bool = False
    distinct: bool = False
    metric: str = "cosine"
    return_state: bool = False

    @property
    def euclidean(self) -> bool:
        """Whether distances are squared Euclidean ones; the quality is given then."""
        return self.metric == "sqeuclidean"

    @property
    def flat(self) -> "Problem":
        """With a quality (R,). Not so from the start: under autograd a view costs more than a call's other checks."""
        return self if self.quality is None else self._replace(quality=self.quality.reshape(-1))

    @property
    def quality_shape(self) -> Sequence[int]:
        """Of the quality and its gradient; (R,) where it is the rows' norms."""
        return (self.rows,) if self.quality is None else self.quality.shape

    @property
    def by_quality(self) -> bool:
        """Whether the first pick is the row of best quality; not so if it is given, or others were picked before."""
        return self.start is None and self.min_distances is None

    @property
    def sets(self) -> int:
        """B."""
        return self.features.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def rows(self) -> int:
        """R."""
        return math.prod(self.features.shape[:-1])  # Size.numel() would fix symbols

    @property
    def dim(self) -> int:
        """C."""
        return self.features.shape[-1]


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass; nothing of it is of size N x C."""

    indices: Tensor  # (B, K) int64, -1 where there is no pick
    counts: Tensor  # (B,) int64
    softmax: (
        Tensor  # triton: (B, K, 3) best score, sum_n exp((z - best) / tau), unit's exponent; others: (K, R) softmaxes
    )
    # (K - 1, R) distances without their weights: 1 - cosine, or |x_n - x_i|^2. triton: the least of the picks so far;
    # sign bit: this step tied with those before it. others: this step's pick's
    gaps: Tensor
    norms: Tensor  # (R,), the rows' norms and the marks above; of the Euclidean metric 1 instead of a norm


class Selected(NamedTuple):
    """What a backend's forward pass gives. Values are float32, or float64 for float64 rows."""

    features: Tensor  # (B, K, C), dtype of the features
    distances: Tensor  # (B, K)
    indices: Tensor
    counts: Tensor
    state: Sequence[Tensor]  # (R,) least distances and (R,) int64 picks that are so near, or nothing
    kept: Sequence[Tensor]  # softmax, gaps and norms of Saved, or nothing if that was not asked for

    @property
    def saved(self) -> Saved:
        """What was kept, for the backward pass."""
        return Saved(self.indices, self.counts, *self.kept)

    @classmethod
    def empty(cls, p: Problem, keep: bool, normalizers: bool) -> "Selected":
        """Not filled in yet; ``normalizers``: these are kept of the softmaxes, as triton does."""
        features = p.features
        new, sets, rows, k, dtype = features.new_empty, p.sets, p.rows, p.k, accumulator(features.dtype)
        kept = []
        if keep:
            softmax = new(sets, k, 3, dtype=dtype) if normalizers else new(k, rows, dtype=dtype)
            kept = [softmax, new(k - 1, rows, dtype=dtype), new(rows, dtype=dtype)]
        return cls(
            new(sets, k, features.shape[-1]),
            new(sets, k, dtype=dtype),
            new(sets, k, dtype=torch.int64),
            new(sets, dtype=torch.int64),
            cls._no_state(p) if p.return_state else [],
            kept,
        )

    @staticmethod
    def _no_state(p: Problem) -> list[Tensor]:
        """As it is of rows that cannot be picked."""
        least = p.features.new_zeros(p.rows, dtype=accumulator(p.features.dtype))
        if p.min_distances is not None:
            least = least.masked_fill(p.min_distances < 0, -math.inf)
        return [least, p.features.new_full((p.rows,), -1, dtype=torch.int64)]


class Gradients(NamedTuple):
    """What a backend's backward pass gives."""

    features: Tensor
    quality: Tensor  # as the quality, or (R,); to be ignored when the quality was the rows' norms
    gamma: Tensor  # 0-d
