"""One call of the statistics, validated: what the operator and its backends agree on.

N rows x_i stand against a bank of M rows b_j. With u = x / |x| and v = b / |b|, s_ij = u_i . v_j, and S_i are the j of
the largest s_ij, lowest j first on ties, among the usable bank rows of other identities. Sums are float32, or float64
for float64 rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fcn_kernels.sets import accumulator

NO_CAP = -torch.inf
"""A min_cosine that leaves nothing out: rounded cosines may be a little below -1."""


class Problem(NamedTuple):
    """The inputs of a call in the form that the backends take."""

    rows: Tensor  # (N, C)
    bank: Tensor  # (M, C), of the rows' dtype or another
    ids: Tensor | None = None  # (N,) int64; bank rows of the same id take no part
    bank_ids: Tensor | None = None  # (M,) int64, with ids
    k: int = 0  # rows of S_i at most; 0: no limit, and no indices are given
    min_cosine: float = NO_CAP  # least s_ij, in the dtype of the sums
    normalized: bool = False  # rows are of unit length, and taken as they are

    @property
    def dtype(self) -> torch.dtype:
        """Of sums, and of what comes of them."""
        return accumulator(torch.promote_types(self.rows.dtype, self.bank.dtype))


class Statistics(NamedTuple):
    """What comes of it, n_i = |S_i|. 0 where S_i is empty."""

    mean: Tensor  # (N,), mu_i = sum_S s_ij / n_i
    std: Tensor  # (N,), sqrt(sum_S (s_ij - mu_i)^2 / n_i)
    counts: Tensor  # (N,) int64
    indices: Tensor  # (N, k) int64, best first, -1 from n_i on

    @classmethod
    def empty(cls, p: Problem) -> "Statistics":
        """Not filled in yet."""
        new, n = p.rows.new_empty, p.rows.shape[0]
        mean, std = (new(n, dtype=p.dtype) for _ in range(2))
        return cls(mean, std, new(n, dtype=torch.int64), new(n, p.k, dtype=torch.int64))


class Gradients(NamedTuple):
    """What a backend's backward pass gives, in the dtype of each; no elements where it was not asked for."""

    rows: Tensor  # (N, C)
    bank: Tensor  # (M, C)


class Arriving(NamedTuple):
    """What arrives at the backward pass."""

    mean: Tensor  # (N,), gradients
    std: Tensor  # (N,)
