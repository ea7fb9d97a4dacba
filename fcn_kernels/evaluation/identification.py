"""Identification (1:N): who of a gallery is it, if anyone? Ranks, and TPIR at given FPIR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_kernels.evaluation.verification import Roc, roc_of
from fcn_kernels.extras import require

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

BLOCK = 1024  # probes; 14 MB of scores against IJB-C's galleries
PRODUCT_ROWS = 16  # a product with one row gives equal columns unequal scores, and ties are none


class Search(NamedTuple):
    """How a gallery was searched."""

    ranks: Array
    """(M,) of the probes whose subject is in the gallery: 1 + other subjects that score as high as their own."""
    strangers: int
    """Probes whose subject is not in the gallery."""
    roc: Roc | None
    """FPIR and TPIR: a probe whose subject is not there is a false positive where its best score is accepted, one whose
    subject is there a true positive where its own is and has rank 1. None if either kind of probe is missing."""

    def within(self, rank: int) -> float:
        """Share of the probes in the gallery whose rank is at most `rank`; NaN if there are none."""
        return float((self.ranks <= rank).mean()) if len(self.ranks) else float("nan")


def search(gallery: Tensor, names: Array, probes: Tensor, probe_names: Array) -> Search:
    """Search the gallery for every probe; a subject scores as the best of its templates does.

    Args:
        gallery: (G, C) unit rows. names: (G,) their subjects.
        probes: (P, C) unit rows. probe_names: (P,) their subjects.

    Raises ValueError where the scores are not finite.
    """
    np = require("numpy", "tool")
    order = np.argsort(names, kind="stable")
    known, starts = np.unique(names[order], return_index=True)
    columns = gallery[torch.from_numpy(order)].T
    own = np.searchsorted(known, probe_names).clip(max=len(known) - 1)
    there = known[own] == probe_names
    ranks, genuine, impostor = [], [], []
    for first in range(0, len(probes), BLOCK):
        part = slice(first, first + BLOCK)
        rows = probes[part]
        products = (F.pad(rows, (0, 0, 0, -len(rows) % PRODUCT_ROWS)) @ columns)[: len(rows)]
        scores = np.maximum.reduceat(products.numpy(), starts, axis=1)  # [p, s]
        if not np.isfinite(scores).all():  # NaN would have rank 0
            raise ValueError(f"expected finite scores, got {int((~np.isfinite(scores)).sum())} that are not")
        impostor.append(scores[~there[part]].max(1))
        mated = scores[there[part]]
        genuine.append(mated[np.arange(len(mated)), own[part][there[part]]])
        ranks.append((mated >= genuine[-1][:, None]).sum(1))
    rank, score, best = (np.concatenate(parts) for parts in (ranks, genuine, impostor))
    curve = roc_of(score[rank == 1], best, missed=int((rank > 1).sum())) if len(rank) and len(best) else None
    return Search(rank, len(best), curve)
