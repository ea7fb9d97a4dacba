"""Selection from rows that need not fit memory: the picks of :func:`coreset_select`, from few reads of a file.

A running minimum only falls, so that what is known of a row from the picks that it has met bounds its score from above.
A step reads the rows of the highest bounds until none that is left could win (lazy evaluation, as in Minoux,
"Accelerated greedy algorithms for maximizing submodular set functions", 1978), and brings up to date what else is on
their pages. In memory are some numbers for each row.

The first picks are known when all rows have been read. Meanwhile rows meet guesses, the picks of the rows up to there:
where a guess turns out right, the rows that came after it have met that pick already.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fcn_kernels.checks import exponent
from fcn_kernels.selection.anchors import cosine_gaps, distances_by_differences, squared_distances
from fcn_kernels.selection.mapped import MappedRows, Progress
from fcn_kernels.selection.problem import Problem
from fcn_kernels.selection.torch_backend import pair_products, reported, weights_of
from fcn_kernels.sets import accumulator, finite_marks, row_norms, usable

GUESSES = 4  # of the first picks; with more, the last are seldom right
FIRST_ROWS = 64  # that a step reads; if they do not settle it, twice as many, and so on up to a block


class Known(NamedTuple):
    """What is known of T rows and the picks so far: all that is needed to go on."""

    norms: Tensor  # (T,), |x_n|, or 1 where distances are squared; -1 for a row that cannot be picked
    gap: Tensor  # (T,), the least distance, without its weight, to the anchors and to the picks that the row has met
    met: Tensor  # (T,) int32, how many picks that are
    picks: Tensor  # (P,) int64
    distances: Tensor  # (P,), of each pick to the anchors and the picks before it; inf for the first without anchors


class _Pick(NamedTuple):
    """P picks."""

    direction: Tensor  # (P, C), unit; as they are where distances are squared
    own: Tensor  # (P,), the cosine to itself, as it rounds

    @classmethod
    def of(cls, x: Tensor, norm: Tensor) -> _Pick:
        """A row (C,) and its norm, 1 to leave it as it is."""
        direction, zero = (x / norm)[None], torch.zeros(1, dtype=torch.int64, device="cpu")
        return cls(direction, pair_products(x[None], direction, zero, zero) / norm)


class _Guesses:
    """The first picks among the rows that were read up to here."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self.rows: list[int] = []
        self.picks: list[_Pick] = []
        self.best = [-math.inf] * GUESSES  # scores of these; inf for what is known
        self.gap = torch.empty(GUESSES, count, dtype=dtype, device="cpu")  # to the first, the first two, ...
        self.met = torch.zeros(count, dtype=torch.int8, device="cpu")  # how many of them a row has met

    def replace(self, level: int, row: int, pick: _Pick, score: float) -> None:
        """Another guess: those after it fall with it."""
        self.rows[level:], self.picks[level:] = [row], [pick]
        self.best[level:] = [score] + [-math.inf] * (GUESSES - level - 1)
        self.met.clamp_(max=level)


class Picker:
    """Picks rows one after another, exactly as ``coreset_select(..., distinct=True, backend="torch")`` does.

    Args:
        rows: (T, C), of any floating dtype, on the CPU; may be mapped from a file.
        quality: (T,) or None for the rows' norms.
        gamma: exponent of the quality in the distance.
        anchors: (A, C) rows that are chosen already. Distances begin as those to them, and the first pick is then the
            farthest, not the best.
        start: the first pick, if it is given.
        known: to go on from; None reads the rows once.
        metric: "cosine" or "sqeuclidean".
        progress: told of bytes as they are read.

    Raises:
        ValueError: gamma is not finite in the dtype in which rows are summed.
    """

    def __init__(
        self,
        rows: Tensor,
        quality: Tensor | None = None,
        gamma: float = 0.0,
        anchors: Tensor | None = None,
        start: int | None = None,
        known: Known | None = None,
        progress: Progress = lambda _: None,
        metric: str = "cosine",
    ) -> None:
        self.rows, self.dtype, self.start = rows, accumulator(rows.dtype), start
        self.mapped = MappedRows(rows, self.dtype, progress)
        self.euclidean = metric == "sqeuclidean"
        self.unknown = torch.finfo(self.dtype).max if self.euclidean else 4.0  # at least any gap
        self.gamma = exponent(gamma, rows)  # as it is in the dtype of the sums
        self._guesses: _Guesses | None = None
        self.has_anchors = anchors is not None and len(anchors) > 0
        if quality is None and self.euclidean:
            quality = torch.ones(len(rows), device="cpu")
        self._given = None if quality is None else quality.to(self.dtype)
        if known is None:
            known = self._first_pass(anchors)
        self.mapped.read_no_further()
        self.known = known
        self.open = known.norms > 0  # may be picked
        self.open[known.picks] = False
        self.quality = known.norms if self._given is None else self._given
        problem = Problem(rows, self.quality, self.gamma)
        weight, shift = weights_of(problem, self.quality[None], (known.norms > 0)[None])
        self.weight, self._shift = weight[0], shift
        self._picks = _Pick(self._nothing(rows.shape[1]), self._nothing())
        for pick in known.picks.tolist():
            self._remember(pick)

    def _first_pass(self, anchors: Tensor | None) -> Known:
        """Norms; gaps to the anchors, if there are any, and to guesses."""
        count = len(self.rows)
        norms = torch.empty(count, dtype=self.dtype, device="cpu")
        gap = torch.full_like(norms, self.unknown)
        others = self._nothing(self.rows.shape[1]) if anchors is None else anchors.to(self.dtype)
        lengths = row_norms(others)
        self._guesses = _Guesses(count, self.dtype)
        if anchors is None:
            self._foresee()
        for numbers, x in self.mapped.blocks():
            norms[numbers] = self._norms(x)
            if len(others) and self.euclidean:
                gap[numbers] = squared_distances(x, others).clamp_(max=self.unknown)
            elif len(others):
                gap[numbers] = cosine_gaps(x, others, lengths)
            self._guess(numbers, x, norms[numbers], gap[numbers])
        norms = torch.where(self._quality_of(norms, slice(None)) > 0, norms, -1)
        met = torch.zeros_like(norms, dtype=torch.int32)
        return Known(norms, gap, met, self._nothing().long(), self._nothing())

    def _nothing(self, *shape: int) -> Tensor:
        """No numbers, or no rows of so many columns, in the dtype of the sums."""
        return torch.empty(0, *shape, dtype=self.dtype, device="cpu")

    def _foresee(self) -> None:
        """The first pick is no guess where start or quality tell it and it can be picked."""
        row = self.start
        if row is None and self._given is not None:
            score = torch.where((self._given > 0) & (self._given < math.inf), self._given, -1)
            row = int((score == score.amax()).nonzero()[0])
        if row is None or self._guesses is None:
            return
        x = self.mapped.row(row)
        norm = self._norms(x)
        if bool(usable(norm, norm if self._given is None else self._given[row])):
            self._guesses.replace(0, row, _Pick.of(x, norm), math.inf)

    def _guess(self, numbers: slice | Tensor, x: Tensor, norms: Tensor, gap: Tensor) -> None:
        """Let rows (n, C) meet the guesses, or become one."""
        if (guesses := self._guesses) is None:
            return
        quality, of_block = self._quality_of(norms, numbers), torch.arange(len(x), device="cpu")
        weight = torch.where(quality > 0, quality.pow(self.gamma), -math.inf)
        score = gap * weight if self.has_anchors else quality
        for level in range(GUESSES):
            best = float(score.amax())
            if best > guesses.best[level]:
                at = int((score == best).nonzero()[0])
                row = at + numbers.start if isinstance(numbers, slice) else int(numbers[at])
                guesses.replace(level, row, _Pick.of(x[at], norms[at]), best)
            if level == len(guesses.picks):  # no row could be picked yet
                return
            gap = torch.minimum(gap, self._gaps(x, norms, guesses.picks[level], of_block, torch.zeros_like(of_block)))
            guesses.gap[level, numbers] = gap
            guesses.met[numbers] = level + 1
            score = torch.where(quality > 0, gap * weight, -math.inf)

    def _confirm(self, row: int) -> None:
        """If the next pick was guessed, rows have met it; if not, the other guesses are wrong as well."""
        level = len(self.known.picks)
        if (guesses := self._guesses) is None or level >= len(guesses.rows) or guesses.rows[level] != row:
            self._guesses = None
            return
        have = guesses.met > level
        self.known.gap[have], self.known.met[have] = guesses.gap[level][have], level + 1
        guesses.best[level] = math.inf

    def _quality_of(self, norms: Tensor, at: slice | Tensor) -> Tensor:
        """The quality of rows (n,) of known norms; -inf where they cannot be picked."""
        quality = norms if self._given is None else self._given[at]
        return torch.where(usable(norms, quality), quality, -math.inf)

    def _norms(self, x: Tensor) -> Tensor:
        """|x_n|; where distances are squared, 1 for rows that are finite, else NaN."""
        return finite_marks(x) if self.euclidean else row_norms(x)

    def _gaps(self, x: Tensor, norms: Tensor, picks: _Pick, i: Tensor, j: Tensor) -> Tensor:
        """1 - cos(x_i, pick_j), or |x_i - pick_j|^2 (P,), exactly 0 for a pick and its duplicates."""
        if self.euclidean:
            return (x[i] - picks.direction[j]).square_().sum(-1).clamp_(max=self.unknown)
        cosine = pair_products(x, picks.direction, i, j) / norms[i]
        return torch.where(cosine == picks.own[j], 0, 1 - cosine).clamp_(min=0)

    def _nearest(self, x: Tensor, norms: Tensor, picks: _Pick) -> tuple[Tensor, Tensor]:
        """Pairs of a row and a pick (P,), (P,), among them each row's nearest: what rounding leaves in doubt."""
        if self.euclidean:
            distance = distances_by_differences(x, picks.direction)
            near = distance <= distance.amin(1, keepdim=True) * (1 + 4 * (x.shape[1] + 2) * torch.finfo(self.dtype).eps)
        else:
            cosine = x @ picks.direction.T / norms[:, None]
            near = cosine >= cosine.amax(1, keepdim=True) - 4 * (x.shape[1] + 2) * torch.finfo(self.dtype).eps
        i, j = near.nonzero(as_tuple=True)
        return i, j

    def pick(self) -> bool:
        """Make one more pick; False if no row is left to pick, or the start cannot be picked."""
        found = self._first() if not len(self.known.picks) else self._farthest()
        if found is None:
            return False
        row, distance = found
        self._confirm(row)
        self.open[row] = False
        self._remember(row)
        self.known = self.known._replace(
            picks=torch.cat([self.known.picks, torch.tensor([row], device="cpu")]),
            distances=torch.cat([self.known.distances, torch.tensor([distance], dtype=self.dtype, device="cpu")]),
        )
        return True

    def radius(self) -> float:
        """How far the farthest row is from all picks and anchors (the covering radius); 0 if none is left."""
        found = self._farthest()
        return 0.0 if found is None else found[1]

    def _first(self) -> tuple[int, float] | None:
        if self.start is not None:
            return (self.start, self._from_anchors(self.start)) if bool(self.open[self.start]) else None
        if self.has_anchors:
            return self._farthest()
        if not self.open.any():
            return None
        score = torch.where(self.open, self.quality, -math.inf)
        return int((score == score.amax()).nonzero()[0]), math.inf

    def _from_anchors(self, row: int) -> float:
        """The distance of a row to the anchors, infinite if there are none, before the first pick."""
        return self._reported(self.known.gap[row] * self.weight[row]) if self.has_anchors else math.inf

    def _farthest(self) -> tuple[int, float] | None:
        """The row of the largest distance to the picks, the lowest on ties, and that distance."""
        step, gap, met = len(self.known.picks), self.known.gap, self.known.met
        unknown = (self.open & (gap == self.unknown) & (met < step)).nonzero()[:, 0]
        blocks = unknown.split(self.mapped.block) if len(unknown) else ()
        for some in reversed(blocks):  # the end of a file may be in memory still
            self._guess(some, self._meet(some, step), self.known.norms[some], gap[some])
        bound = torch.where(self.open, gap * self.weight, -math.inf)  # exact, or from above
        exact = met == step
        best = torch.where(exact, bound, -math.inf).amax()
        waiting = (~exact & self.open & (bound >= best)).nonzero()[:, 0]
        most = FIRST_ROWS
        while len(waiting):
            numbers = self._next(waiting, bound, most)
            for some in numbers.split(self.mapped.block):
                self._meet(some, step)
            bound[numbers] = gap[numbers] * self.weight[numbers]
            best = torch.maximum(best, bound[numbers].amax())
            waiting = waiting[(met[waiting] < step) & (bound[waiting] >= best)]
            most = min(2 * most, self.mapped.block)
        if best == -math.inf:
            return None
        row = int(((met == step) & (bound == best)).nonzero()[0])
        return row, self._reported(best)

    def _reported(self, distance: Tensor) -> float:
        return min(float(reported(distance[None, None], self._shift)), torch.finfo(self.dtype).max)

    def _next(self, waiting: Tensor, bound: Tensor, most: int) -> Tensor:
        """Which rows to read next of those (n,) that could win, in file order: the highest bounds, and their pages."""
        if len(waiting) > most:
            waiting = waiting[bound[waiting].topk(most).indices]
        near = self.mapped.on_pages_of(waiting)
        return near[self.open[near] & (self.known.met[near] < len(self.known.picks))]

    def _meet(self, numbers: Tensor, step: int) -> Tensor:
        """Bring rows (n,) up to date with all picks; returns them (n, C)."""
        gap, met, norms = self.known.gap, self.known.met, self.known.norms
        x = self.mapped.take(numbers)
        first = int(met[numbers].min())
        picks = _Pick(self._picks.direction[first:step], self._picks.own[first:step])
        # Products of matrices say which picks can be a row's nearest; distances to these are summed pair by pair
        i, j = self._nearest(x, norms[numbers], picks)
        gap[numbers] = gap[numbers].scatter_reduce(0, i, self._gaps(x, norms[numbers], picks, i, j), "amin")
        met[numbers] = step
        return x

    def _remember(self, row: int) -> None:
        new = _Pick.of(self.mapped.row(row), self.known.norms[row])
        self._picks = _Pick(*(torch.cat(parts) for parts in zip(self._picks, new, strict=True)))
