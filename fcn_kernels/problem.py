"""One selection call, validated and flattened: what the op, the backends and every tier agree on."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fcn_kernels.rows import accumulator


class Problem(NamedTuple):
    """The inputs of a call in the form that the backends take.

    "R rows" counts the rows of all sets: R = B * N for padded sets, T for packed ones, and a tensor of row values is
    flat over it. Rows whose saved norm is not > 0 can never be picked: -1 for padding, masked rows and rows of
    unusable quality, NaN for rows whose features are not finite or all zero (-1 for these, too, in C++).
    """

    features: Tensor  # (B, N, C) padded, or (T, C) packed
    quality: Tensor | None  # (R,) float32 or float64; None: the rows' norms
    gamma: Tensor  # 0-d, on the features' device or the CPU
    noise: Tensor | None  # (K, R), Gumbel samples
    seed: Tensor | None  # 0-d int64, on the features' device or the CPU; noise is drawn from it
    start: Tensor | None  # (B,) int64, the first pick
    mask: Tensor | None  # (R,) bool
    lengths: Tensor | None  # (B,) int32 or int64
    cu_seqlens: Tensor | None  # (B + 1,) int32 or int64; the features are packed
    k: int
    tau: float
    distance_scale: float
    normalized: bool
    distinct: bool

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
    softmax: Tensor  # triton: (B, K) log sum_n exp(z_k(n) / tau); others: (K, R) the softmaxes themselves
    # (K - 1, R). triton: 1 - max cosine to the picks so far; sign bit: this step tied with those before it.
    # others: |x_n| (1 - cosine to this step's pick)
    gaps: Tensor
    norms: Tensor  # (R,), the rows' norms and the marks above


class Selected(NamedTuple):
    """What a backend's forward pass gives; the last three, and so Saved, are empty unless they were asked for.

    Values are float32, or float64 for float64 rows.
    """

    features: Tensor  # (B, K, C), dtype of the features
    distances: Tensor  # (B, K)
    indices: Tensor
    counts: Tensor
    softmax: Tensor
    gaps: Tensor
    norms: Tensor

    @classmethod
    def empty(cls, p: Problem, keep: bool, normalizers: bool) -> "Selected":
        """Not filled in yet; ``normalizers``: these are saved of the softmaxes, as triton does."""
        new, accumulate = p.features.new_empty, accumulator(p.features.dtype)
        steps, rows = (p.k, p.rows) if keep else (0, 0)
        return cls(
            features=new(p.sets, p.k, p.dim),
            distances=new(p.sets, p.k, dtype=accumulate),
            indices=new(p.sets, p.k, dtype=torch.int64),
            counts=new(p.sets, dtype=torch.int64),
            softmax=new((p.sets, steps) if normalizers else (steps, rows), dtype=accumulate),
            gaps=new(max(steps - 1, 0), rows, dtype=accumulate),
            norms=new(rows, dtype=accumulate),
        )


class Gradients(NamedTuple):
    """What a backend's backward pass gives."""

    features: Tensor
    quality: Tensor  # (R,); to be ignored when the quality was the rows' norms
    gamma: Tensor  # 0-d
