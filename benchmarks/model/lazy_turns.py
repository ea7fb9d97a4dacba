"""How often the loops of the kernel that leaves out rows turn, simulated in NumPy by that kernel's own rules.

Which rows meet a pick depends on the rows. Here they have equal weights, no noise, and none is extreme.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fcn_kernels.selection.kernels.lazy import NEAR, WINDOW

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]

NOBODY = -1.0  # the score of a row that is not exact, or no bound


class Turns(NamedTuple):
    """What parts do from one exchange to the next, in all turns of a call."""

    again: npt.NDArray[np.bool_]  # [turns], whether the turn makes no pick
    collects: Counts  # [turns, parts], lists that are made of rows that are to meet picks
    tiles: Counts  # [turns, parts], of rows that meet picks
    meetings: Counts  # [turns, parts], of a tile with a pick
    reads: int  # of a row
    picks: list[int]


class Work(NamedTuple):
    """A part's, in a turn."""

    collects: int
    tiles: int
    meetings: int
    reads: int


def gaussian(rows: int, dim: int, seed: int = 0) -> Floats:
    """Unit rows."""
    x = np.random.default_rng(seed).standard_normal((rows, dim), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def count_turns(x: Floats, k: int, parts: int, block_n: int, eager: int, late: int) -> Turns:
    """Pick ``k`` of the unit rows ``x``: ``eager`` as ever, the others in ``parts`` with tiles of ``late`` rows."""
    return _Simulation(x, k, parts, block_n, eager, late).run()


class _Simulation:
    """Names are the kernel's. Rows lie by parts, [parts, share], those past the end as if they were taken."""

    def __init__(self, x: Floats, k: int, parts: int, block_n: int, eager: int, late: int) -> None:
        (rows, dim), self.x, self.k, self.late = x.shape, x, k, late
        self.share = math.ceil(math.ceil(rows / parts) / block_n) * block_n
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

    def run(self) -> Turns:
        """Turn after turn, as `take_turn` does."""
        again: list[bool] = []
        work: list[list[Work]] = []
        floor = np.inf
        while True:
            exact, bound = self._scan()
            best, best_bound = int(exact.argmax()), int(bound.argmax())
            again.append(bool(bound.flat[best_bound] >= exact.flat[best]))
            if again[-1]:
                leader, kept = best_bound, False
                below = _below(bound.flat[leader])
                floor = below if floor == np.inf else min(floor, max(exact.flat[best], below))
            else:
                leader = self._next_best(exact, bound, best)
                self._make_pick(best)
                if len(self.picks) == self.k:
                    break
                score = self.nearest.flat[leader]
                kept = bool(floor <= score)
                floor = max(floor, _below(score)) if kept else _below(score)
            work.append([self._refresh_part(part, floor, kept, leader) for part in range(len(self.nearest))])
        collects, tiles, meetings, reads = np.array(work).transpose(2, 0, 1)
        return Turns(np.array(again[:-1]), collects, tiles, meetings, int(reads.sum()), self.picks)

    def _scan(self) -> tuple[Floats, Floats]:
        """Of all rows their exact score or their bound."""
        known = (self.met == len(self.picks)) | (self.nearest <= 0)
        return np.where(known, self.nearest, NOBODY), np.where(known, NOBODY, self.nearest)

    def _next_best(self, exact: Floats, bound: Floats, best: int) -> int:
        """The best of what parts know of, beside the row ``best``: of the part that has it, its bound."""
        part = best // self.share
        scores = np.maximum(exact, bound)
        scores[part] = bound[part]
        return int(scores.argmax())

    def _make_pick(self, row: int) -> None:
        self.directions[len(self.picks)] = self.x[row]
        self.picks.append(row)
        self.nearest.flat[row] = 0

    def _refresh_part(self, part: int, floor: float, kept: bool, leader: int) -> Work:
        """Rows that reach the floor meet picks, a window of these after the other."""
        step, work = len(self.picks), Work(0, 0, 0, 0)
        until, going = step if kept else 0, True
        met, nearest = self.met[part], self.nearest[part]
        while going:
            wanted = nearest >= floor
            if leader // self.share == part:
                wanted[leader % self.share] = True
            rows = np.flatnonzero(wanted & (met < step) & (nearest > 0))
            taken, later = rows[met[rows] < until], met[rows[met[rows] >= until]]
            begins = [int(met[taken[at : at + self.late]].min()) for at in range(0, len(taken), self.late)]
            meetings = sum(until - begin for begin in begins)
            work = Work(work.collects + 1, work.tiles + len(begins), work.meetings + meetings, work.reads + len(taken))
            if begins:
                gaps = _gaps(self.x[part * self.share + taken], self.directions[min(begins) : until].T)
                nearest[taken] = np.minimum(nearest[taken], gaps.min(1))
                met[taken] = until
            going = len(later) > 0 or (len(taken) > 0 and until < step)
            until = min((int(later.min()) if len(taken) == 0 and going else until) + WINDOW.value, step)
        return work


def _below(score: float) -> float:
    return score * (1 - NEAR.value)


def _gaps(rows: Floats, directions: Floats) -> Floats:
    return np.maximum(1 - rows @ directions, 0).astype(np.float32)
