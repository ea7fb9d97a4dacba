"""Verification (1:1): do two templates show the same identity? ROC, and TAR at given FAR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fcn_kernels.extras import require

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class Roc(NamedTuple):
    """Every operating point of a verifier, strictest first: accept pairs that score at least `threshold`."""

    far: Tensor
    """(P,) float64, false accept rate: accepted share of the pairs that show two identities."""
    tar: Tensor
    """(P,) float64, true accept rate: accepted share of the pairs that show one identity."""
    threshold: Tensor
    """(P,) float64; inf for the first point, which accepts nothing."""
    negatives: int
    """Number of pairs that show two identities: FAR comes in steps of 1 / negatives."""

    def tar_at(self, fars: Sequence[float] = FARS) -> list[float]:
        """Best TAR that keeps FAR at or below each of `fars`, without interpolation.

        NaN for a FAR below 1 / negatives: that many pairs cannot tell it from zero.
        """
        wanted = torch.tensor(fars, dtype=torch.float64)
        if not ((wanted > 0) & (wanted <= 1)).all():
            raise ValueError(f"expected FARs above 0 and at most 1, got {list(fars)}")
        points = torch.searchsorted(self.far, wanted, right=True) - 1
        tars = self.tar[points].masked_fill(wanted < 1 / self.negatives, math.nan)
        return tars.tolist()


def roc(scores: Tensor, genuine: Tensor) -> Roc:
    """ROC of pairs that score (P,), of which genuine (P,) bool show one identity; by scikit-learn.

    Raises ValueError where the scores are not finite, or where all pairs are genuine or none is.
    """
    if scores.ndim != 1 or scores.shape != genuine.shape or genuine.dtype != torch.bool:
        got = f"{tuple(scores.shape)} and {tuple(genuine.shape)} of {genuine.dtype}"
        raise ValueError(f"expected scores (P,) and genuine (P,) of torch.bool, got {got}")
    if not scores.isfinite().all():
        raise ValueError(f"expected finite scores, got {int((~scores.isfinite()).sum())} that are not")
    negatives = int((~genuine).sum())
    if negatives in (0, len(genuine)):
        raise ValueError(f"expected pairs of both kinds, got {len(genuine) - negatives} genuine of {len(genuine)}")
    curve = require("sklearn.metrics", "demo").roc_curve(
        genuine.cpu().numpy(), scores.detach().cpu().double().numpy(), drop_intermediate=False
    )
    far, tar, threshold = (torch.as_tensor(axis, dtype=torch.float64) for axis in curve)
    return Roc(far, tar, threshold, negatives)
