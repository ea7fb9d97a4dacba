"""Scores in context (after Liu et al., "Inter-class Discrepancy Alignment for Face Recognition", 2021), plainly.

The paper's equations could not be had: its abstract says that the discrepancy between an image and its inter-class
neighbors corrects a score. The statistics and :func:`mean_alignment` are our reading of that. CSLS is as in MUSE; Z, T
and AS-norm are as in speaker verification. The whole matrix of cosines is made and sorted.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Context(NamedTuple):
    """Each row's support: the bank rows nearest to it, of other identities."""

    mean: Tensor  # (N,), of the support's cosines; 0 for none
    std: Tensor  # (N,), population
    counts: Tensor  # (N,) int64
    indices: Tensor  # (N, M) int64, best first, lowest index first on ties, -1 past the count


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows over their norms, and which rows are finite and not 0. The others are 0."""
    usable = rows.isfinite().all(-1) & (rows != 0).any(-1)
    rows = rows.where(usable[:, None], 0)
    largest = rows.abs().amax(-1, keepdim=True) if rows.shape[1] else rows.new_ones(len(rows), 1)
    rows = rows / largest.where(usable[:, None], 1).detach()  # so that squares stay in range
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).where(usable[:, None], 1), usable


def context(
    x: Tensor,
    bank: Tensor,
    k: int | None = None,
    min_cosine: float = -torch.inf,
    ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
) -> Context:
    """Sort, leave out, take k, mean and deviation: x (N, C), bank (M, C), ids (N,), bank_ids (M,)."""
    (u, usable), (v, bank_usable) = _unit(x), _unit(bank)
    cosine = u @ v.T  # [N, M]
    member = usable[:, None] & bank_usable & (cosine >= min_cosine)
    if ids is not None and bank_ids is not None:
        member &= ids[:, None] != bank_ids
    order = cosine.masked_fill(~member, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    counts = member.sum(-1).clamp(max=len(bank) if k is None else k)
    taken = torch.arange(len(bank), device=x.device) < counts[:, None]
    support, size = cosine.gather(1, order).where(taken, 0), counts.clamp(min=1)
    mean = support.sum(-1) / size
    variance = ((support - mean[:, None]).where(taken, 0) ** 2).sum(-1) / size
    std = variance.where(variance > 0, 1).sqrt().where(variance > 0, 0)  # whose gradient at 0 is 0
    return Context(mean, std, counts, order.where(taken, -1))


def csls(score: Tensor, mean_a: Tensor, mean_b: Tensor) -> Tensor:
    """2 s - mu_a - mu_b."""
    return 2 * score - mean_a - mean_b


def mean_alignment(score: Tensor, mean_a: Tensor, mean_b: Tensor) -> Tensor:
    """s - (mu_a + mu_b) / 2: half of CSLS."""
    return score - (mean_a + mean_b) / 2


def z_norm(score: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(s - mu) / sigma of the first side; T-norm is the same of the second."""
    return (score - mean) / std


def as_norm(score: Tensor, mean_a: Tensor, std_a: Tensor, mean_b: Tensor, std_b: Tensor) -> Tensor:
    """The mean of Z- and T-norm over supports of k rows; S-norm is the same over the whole bank."""
    return (z_norm(score, mean_a, std_a) + z_norm(score, mean_b, std_b)) / 2
