"""How often the loops of the kernel that leaves out rows turn, simulated in NumPy by that kernel's own rules.

Which rows meet a pick depends on the rows. Here they have equal weights, no noise, and none is extreme.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fcn_kernels.selection.kernels.lazy import NEAR, ROWS_A_TILE

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]

NOBODY = -1.0  # the score of a row that is not exact, or no bound
WINDOW = 8  # tiles whose products are made at once; those behind the last that the kernel makes are not counted


class Turns(NamedTuple):
    """What parts do from one exchange to the next, in all turns of a call."""

    settles: npt.NDArray[np.bool_]  # [turns], whether it is a step's second round
    refreshes: Counts  # [turns, parts], rows that meet picks
    tiles: Counts  # [turns, parts], of picks that they meet
    picks: list[int]


def gaussian(rows: int, dim: int, seed: int = 0) -> Floats:
    """Unit rows."""
    x = np.random.default_rng(seed).standard_normal((rows, dim), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def count_turns(x: Floats, k: int, parts: int, block_n: int, eager: int, late: int) -> Turns:
    """Pick ``k`` of the unit rows ``x``: ``eager`` as ever, the others in ``parts``, ``late`` at a time to a row."""
    return _Simulation(x, k, parts, block_n, eager, late).run()


class _Simulation:
    """Names are the kernel's. Rows lie by parts, [parts, share], those past the end as if they were taken."""

    def __init__(self, x: Floats, k: int, parts: int, block_n: int, eager: int, late: int) -> None:
        (rows, dim), self.x, self.k, self.late = x.shape, x, k, late
        self.share = math.ceil(math.ceil(rows / parts) / block_n) * block_n
        self.sizes = np.clip(rows - self.share * np.arange(parts), 0, self.share)
        self.directions = np.empty((k, dim), np.float32)
        self.nearest = np.full((parts, self.share), NOBODY, np.float32)
        self.nearest.reshape(-1)[:rows] = np.inf
        self.met = np.full((parts, self.share), eager, np.int64)
        self.picks: list[int] = []
        row, known = 0, self.nearest.reshape(-1)[:rows]
        for _ in range(eager):
            self._make_pick(row)
            np.minimum(known, _gaps(x, self.directions[len(self.picks) - 1]), out=known)
            known[self.picks] = 0
            row = int(known.argmax())
        self._scan()

    def run(self) -> Turns:
        """Turn after turn, as `take_turn` does."""
        settles, refreshes, tiles = [], [], []
        settle = False
        while True:
            best, bound = (int(scores.argmax()) for scores in (self.exact, self.bound))
            best_score, floor = self.exact.flat[best], self.exact.flat[best]
            leader = None
            if settle or self.bound.flat[bound] < best_score:  # it is decided
                following = self._next_best(best)
                self._make_pick(best)
                if len(self.picks) == self.k:
                    return Turns(np.array(settles), np.array(refreshes), np.array(tiles), self.picks)
                settle, leader = False, following
                floor = self.nearest.flat[leader] * np.float32(1 - NEAR.value)
                self._scan()
            else:
                settle = True
            parts = [self._refresh_part(part, settle, floor, leader) for part in range(len(self.sizes))]
            settles.append(settle)
            refreshes.append([count for count, _ in parts])
            tiles.append([count for _, count in parts])

    def _scan(self) -> None:
        """Of all rows their exact score or their bound."""
        known = (self.met == len(self.picks)) | (self.nearest <= 0)
        self.exact = np.where(known, self.nearest, NOBODY)
        self.bound = np.where(known, NOBODY, self.nearest)

    def _next_best(self, best: int) -> int:
        """The best of what parts know of, beside the row ``best``: of the part that has it, its bound."""
        part = best // self.share
        best_of_part = np.maximum(self.exact, self.bound).max(1)
        best_of_part[part] = self.bound[part].max()
        other = int(best_of_part.argmax())
        scores = self.bound[other] if other == part else np.maximum(self.exact[other], self.bound[other])
        return other * self.share + int(scores.argmax())

    def _make_pick(self, row: int) -> None:
        self.directions[len(self.picks)] = self.x[row]
        self.picks.append(row)
        self.nearest.flat[row] = 0

    def _refresh_part(self, part: int, settle: bool, floor: Any, leader: int | None) -> tuple[int, int]:
        """Rows of a part that are refreshed in a round, and the tiles of picks that they meet."""
        exact, bound = self.exact[part], self.bound[part]
        budget = self.k if settle else math.ceil(int(self.sizes[part]) / ROWS_A_TILE.value)
        refreshes = tiles = 0
        best_exact = exact.max()
        while True:
            row = int(bound.argmax())
            score, leads = bound[row], leader == part * self.share + row
            reaches = score >= floor and (not settle or score >= best_exact)
            if score < 0 or not (leads or (reaches and (settle or tiles < budget))):
                return refreshes, tiles
            most = self.k if leads or settle else budget - tiles
            tiles += self._refresh_row(part, row, NOBODY if leads else floor, most)
            refreshes += 1
            best_exact = max(best_exact, exact[row])

    def _refresh_row(self, part: int, row: int, floor: Any, budget: int) -> int:
        """Let a row meet what it has missed, until its bound is below ``floor`` or ``budget`` tiles are done."""
        step, gap, tiles, going = len(self.picks), self.nearest[part, row], 0, True
        met, x = int(self.met[part, row]), self.x[part * self.share + row]
        while going:
            gaps = _gaps(self.directions[met : min(step, met + WINDOW * self.late)], x)
            for of_tile in np.minimum.reduceat(gaps, range(0, len(gaps), self.late)):
                gap = min(gap, of_tile)
                met, tiles = min(met + self.late, step), tiles + 1
                going = met < step and gap >= floor and tiles < budget
                if not going:
                    break
        self.nearest[part, row], self.met[part, row] = gap, met
        exact = met == step or gap <= 0
        self.exact[part, row], self.bound[part, row] = (gap, NOBODY) if exact else (NOBODY, gap)
        return tiles


def _gaps(rows: Floats, direction: Floats) -> Floats:
    return np.maximum(1 - rows @ direction, 0).astype(np.float32)
