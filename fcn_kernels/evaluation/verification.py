"""Verification (1:1): do two templates show the same identity? ROC, TAR at given FAR, equal error rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fcn_kernels.extras import require

if TYPE_CHECKING:
    import numpy as np

    Scores = np.ndarray[Any, np.dtype[np.floating[Any]]]

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class Roc(NamedTuple):
    """Operating points of a verifier, strictest first: accept pairs that score at least `threshold`.

    The corners of the curve, to which every other point adds nothing: as many as there are genuine scores, or twice.
    """

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
        return self._at(self.tar, fars)

    def threshold_at(self, fars: Sequence[float] = FARS) -> list[float]:
        """The highest threshold of that TAR; inf if it accepts nothing, NaN as above."""
        return self._at(self.threshold, fars)

    def eer(self) -> float:
        """Equal error rate: where FAR is 1 - TAR, on the lines between the points."""
        gap = self.far - (1 - self.tar)
        k = int((gap >= 0).int().argmax())  # never 0: the first point accepts nothing
        return float(self.far[k - 1].lerp(self.far[k], gap[k - 1] / (gap[k - 1] - gap[k])))

    def _at(self, axis: Tensor, fars: Sequence[float]) -> list[float]:
        wanted = torch.tensor(fars, dtype=torch.float64)
        if not ((wanted > 0) & (wanted <= 1)).all():
            raise ValueError(f"expected FARs above 0 and at most 1, got {list(fars)}")
        points = torch.searchsorted(self.far, wanted, right=True) - 1
        points = torch.searchsorted(self.tar, self.tar[points])  # the strictest with this TAR
        return axis[points].masked_fill(wanted < 1 / self.negatives, math.nan).tolist()


def roc(scores: Tensor, genuine: Tensor) -> Roc:
    """ROC of pairs that score (P,), of which genuine (P,) bool show one identity.

    Raises ValueError where the scores are not finite, or where all pairs are genuine or none is.
    """
    if scores.ndim != 1 or scores.shape != genuine.shape or genuine.dtype != torch.bool:
        got = f"{tuple(scores.shape)} and {tuple(genuine.shape)} of {genuine.dtype}"
        raise ValueError(f"expected scores (P,) and genuine (P,) of torch.bool, got {got}")
    scores, genuine = scores.detach().cpu(), genuine.cpu()
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return roc_of(scores[genuine].numpy(), scores[~genuine].numpy())


def roc_of(genuine: Scores, impostor: Scores, missed: int = 0) -> Roc:
    """ROC of the scores (G,) of pairs that show one identity and (I,) of pairs that show two, of one dtype.

    Both are sorted in place, and nothing else of their size is made.

    Args:
        missed: pairs of one identity that are never accepted, whatever the threshold.
    """
    np = require("numpy", "tool")
    if not len(genuine) + missed or not len(impostor):
        raise ValueError(
            f"expected pairs of both kinds, got {len(genuine) + missed} genuine and {len(impostor)} of two identities"
        )
    genuine.sort()
    impostor.sort()
    for ascending in (genuine, impostor):  # NaN sorts last
        if len(ascending) and not np.isfinite(ascending[[0, -1]]).all():
            raise ValueError(f"expected finite scores, got {int((~np.isfinite(ascending)).sum())} that are not")
    places = np.unique(genuine)
    next_above = np.searchsorted(impostor, places, side="right")
    corners = (places, impostor[next_above[next_above < len(impostor)]], impostor[:1])
    thresholds = np.unique(np.concatenate(corners))[::-1]

    def accepted(ascending: Scores, total: int) -> Tensor:
        shares = (len(ascending) - np.searchsorted(ascending, thresholds)) / total
        return torch.from_numpy(np.append(0.0, shares))

    return Roc(
        accepted(impostor, len(impostor)),
        accepted(genuine, len(genuine) + missed),
        torch.from_numpy(np.append(math.inf, thresholds.astype("float64"))),
        len(impostor),
    )
