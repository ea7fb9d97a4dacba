"""Farthest rows of one large set without a pass over it for every pick.

A pick can only lower a row's distance to the nearest pick, so the distance to the earlier ones is an upper bound.
Only the rows of the highest bounds are compared with the new picks; once the best of these is above every other
bound, it is the farthest row. What is picked is exact.
"""

import torch
from torch import Tensor

from fcn_kernels.rows import Rows

# It pays where a pass is long, and a row's product longer than its part in the search for the highest bounds.
# Measured on two cores, with all rows and with these: (8000, 512), K = 3, 3.3 and 2.6 ms; (20000, 1536), K = 200, 1054
# and 350 ms; (5000, 64), K = 16, 4 and 9 ms.
LEAST_ELEMENTS = 2 << 20
LEAST_DIM = 128
FIRST = 64  # rows compared at first; four times as many until they suffice, up to a quarter of the set
MOST_PENDING = 32  # picks that some rows have not met, at most: all of them in one pass cost little more than one


def pay(rows: int, dim: int) -> bool:
    """Whether a set of so many rows is walked faster this way."""
    return rows * dim >= LEAST_ELEMENTS and dim >= LEAST_DIM


class Bounds:
    """Upper bounds of one set's |x_n| (1 - max_j cos_j(n)), which :meth:`lowered_by` makes exact where it matters."""

    def __init__(self, x: Rows, lengths: Tensor, gap: Tensor, coefficient: Tensor) -> None:
        """``lengths`` |x_n|, ``gap`` after the picks so far and ``coefficient``, which makes a gap a logit: (1, n)."""
        self.x, self.lengths, self.gap, self.coefficient = x, lengths[0], gap[0], coefficient[0]
        self.pending: list[Tensor] = []
        self.first = FIRST

    def lowered_by(self, direction: Tensor, barred: Tensor | None) -> Tensor:
        """Logits (1, n) after a pick with unit vector ``direction`` (1, C): upper bounds, but for the greatest.

        ``barred`` (1, n) rows cannot be picked.
        """
        self.pending.append(direction)
        logits = self._logits(slice(None), barred)
        count = self.first
        self.first = FIRST
        while count * 4 <= len(logits) and len(self.pending) < MOST_PENDING:
            highest, places = logits.topk(count + 1)
            places = places[:-1]
            self._meet(places, self.x.take(places).to(self.gap.dtype))
            exact = self._logits(places, barred)
            logits[places] = exact
            if exact.max() > highest[-1]:
                self.first = max(FIRST, count // 4)
                return logits[None]
            count *= 4
        for where, rows in self.x.blocks():
            self._meet(where, rows[0])
        self.pending.clear()
        return self._logits(slice(None), barred)[None]

    def _meet(self, which: slice | Tensor, rows: Tensor) -> None:
        """Lower the bounds of some rows (m, C) by all that is pending: they are exact then."""
        cosines = rows @ torch.cat(self.pending).T  # times |x|
        nearest = (self.lengths[which] - cosines.amax(1)).clamp_(min=0)
        self.gap[which] = torch.minimum(self.gap[which], nearest)

    def _logits(self, which: slice | Tensor, barred: Tensor | None) -> Tensor:
        logits = self.gap[which] * self.coefficient[which]
        return logits if barred is None else logits.masked_fill_(barred[0, which], -torch.inf)
