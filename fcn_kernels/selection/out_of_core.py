"""Selection from rows that need not fit memory: the picks of :func:`coreset_select`, from few reads of a file.

A running minimum only falls, so that what is known of a row from the picks that it has met bounds its score from above.
A step reads the rows of the highest bounds until none that is left could win (lazy evaluation, as in Minoux,
"Accelerated greedy algorithms for maximizing submodular set functions", 1978). In memory are some numbers for each row.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fcn_kernels.selection.anchors import cosine_gaps, distances_by_differences, squared_distances
from fcn_kernels.selection.problem import Problem
from fcn_kernels.selection.torch_backend import pair_products, reported, weights_of
from fcn_kernels.sets import accumulator, finite_marks, row_norms, usable

BLOCK_BYTES = 8 << 20  # of rows at a time, in file order
FIRST_ROWS = 64  # that a step reads; if they do not settle it, twice as many, and so on up to a block
Progress = Callable[[int], None]
"""Called with a number of rows that were read."""


class Known(NamedTuple):
    """What is known of T rows and the picks so far: all that is needed to go on."""

    norms: Tensor  # (T,), |x_n|, or 1 where distances are squared; -1 for a row that cannot be picked
    gap: Tensor  # (T,), the least distance, without its weight, to the anchors and to the picks that the row has met
    met: Tensor  # (T,) int32, how many picks that are
    picks: Tensor  # (P,) int64
    distances: Tensor  # (P,), of each pick to the picks before it; inf for the first


class _Pick(NamedTuple):
    """P picks."""

    direction: Tensor  # (P, C), unit; as they are where distances are squared
    own: Tensor  # (P,), the cosine to itself, as it rounds

    @classmethod
    def of(cls, x: Tensor, norm: Tensor) -> _Pick:
        """A row (C,) and its norm, 1 to leave it as it is."""
        direction, zero = (x / norm)[None], torch.zeros(1, dtype=torch.int64)
        return cls(direction, pair_products(x[None], direction, zero, zero) / norm)


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
        progress: told of rows as they are read.
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
        self.rows, self.dtype, self.start, self.progress = rows, accumulator(rows.dtype), start, progress
        self.euclidean = metric == "sqeuclidean"
        self.unknown = torch.finfo(self.dtype).max if self.euclidean else 4.0  # at least any gap
        self.has_anchors = anchors is not None and len(anchors) > 0
        self.block = max(1, BLOCK_BYTES // max(1, rows.shape[1] * self.dtype.itemsize))
        if quality is None and self.euclidean:
            quality = torch.ones(len(rows))
        self._given = None if quality is None else quality.to(self.dtype)
        if known is None:
            _advise(rows, mmap.MADV_SEQUENTIAL)
            known = self._first_pass(anchors)
        _advise(rows, mmap.MADV_RANDOM)
        self.known = known
        self.open = known.norms > 0  # may be picked
        self.open[known.picks] = False
        self.quality = known.norms if self._given is None else self._given
        problem = Problem(rows, self.quality, torch.tensor(gamma, dtype=torch.float64))
        weight, shift = weights_of(problem, self.quality[None], (known.norms > 0)[None])
        self.weight, self._shift = weight[0], shift
        self._picks = _Pick(torch.empty(0, rows.shape[1], dtype=self.dtype), torch.empty(0, dtype=self.dtype))
        for pick in known.picks.tolist():
            self._remember(pick)

    def _first_pass(self, anchors: Tensor | None) -> Known:
        """Norms; gaps to the anchors, or to the first pick if it is known before the norms are."""
        first = None if anchors is not None else self._foreseen()
        count = len(self.rows)
        norms, gap = torch.empty(count, dtype=self.dtype), torch.full((count,), self.unknown, dtype=self.dtype)
        others = torch.empty(0, self.rows.shape[1], dtype=self.dtype) if anchors is None else anchors.to(self.dtype)
        lengths = row_norms(others)
        for at in self._blocks(count):
            x = self.rows[at].to(self.dtype)
            norms[at] = self._norms(x)
            if len(others) and self.euclidean:
                gap[at] = squared_distances(x, others)
            elif len(others):
                gap[at] = cosine_gaps(x, others, lengths)
            elif first is not None:
                numbers = torch.arange(len(x))
                gap[at] = self._gaps(x, norms[at], first, numbers, torch.zeros_like(numbers))
            self.progress(len(x))
        quality = norms if self._given is None else self._given
        norms = torch.where(usable(norms, quality), norms, -1)
        met = torch.full((count,), 0 if first is None else 1, dtype=torch.int32)
        return Known(norms, gap, met, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=self.dtype))

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

    def _foreseen(self) -> _Pick | None:
        """The first pick, where start or quality tell it and it can be picked."""
        row = self.start
        if row is None and self._given is not None:
            score = torch.where((self._given > 0) & (self._given < math.inf), self._given, -1)
            row = int((score == score.amax()).nonzero()[0])
        if row is None:
            return None
        x = self.rows[row].to(self.dtype)
        norm = self._norms(x)
        quality = norm if self._given is None else self._given[row]
        return _Pick.of(x, norm) if bool(usable(norm, quality)) else None

    def _blocks(self, count: int) -> Iterator[slice]:
        yield from (slice(at, at + self.block) for at in range(0, count, self.block))

    def pick(self) -> bool:
        """Make one more pick; False if no row is left to pick, or the start cannot be picked."""
        found = self._first() if not len(self.known.picks) else self._farthest()
        if found is None:
            return False
        row, distance = found
        self.open[row] = False
        self._remember(row)
        self.known = self.known._replace(
            picks=torch.cat([self.known.picks, torch.tensor([row])]),
            distances=torch.cat([self.known.distances, torch.tensor([distance], dtype=self.dtype)]),
        )
        return True

    def radius(self) -> float:
        """How far the farthest row is from all picks and anchors (the covering radius); 0 if none is left."""
        found = self._farthest()
        return 0.0 if found is None else found[1]

    def _first(self) -> tuple[int, float] | None:
        if self.start is not None:
            return (self.start, math.inf) if bool(self.open[self.start]) else None
        if self.has_anchors:
            return self._farthest()
        if not self.open.any():
            return None
        score = torch.where(self.open, self.quality, -math.inf)
        return int((score == score.amax()).nonzero()[0]), math.inf

    def _farthest(self) -> tuple[int, float] | None:
        """The row of the largest distance to the picks, the lowest on ties, and that distance."""
        step = len(self.known.picks)
        score = torch.where(self.open, self.known.gap * self.weight, -math.inf)  # or a bound from above
        most = FIRST_ROWS
        while True:
            exact = self.known.met == step
            best = torch.where(exact, score, -math.inf).amax()
            stale = (~exact & self.open & (score >= best)).nonzero()[:, 0]
            if not len(stale):
                break
            unknown = stale[self.known.gap[stale] == self.unknown]
            if len(unknown):  # nothing tells these apart
                stale = unknown
            elif len(stale) > most:  # the highest bounds; in file order
                stale = stale[score[stale].topk(most).indices].sort().values
                most = min(2 * most, self.block)
            for some in stale.split(self.block):
                self._meet(some, step)
            score[stale] = self.known.gap[stale] * self.weight[stale]
        if best == -math.inf:
            return None
        row = int((exact & (score == best)).nonzero()[0])
        return row, float(reported(best[None, None], self._shift))

    def _meet(self, numbers: Tensor, step: int) -> None:
        """Bring rows (n,) up to date with all picks."""
        gap, met, norms = self.known.gap, self.known.met, self.known.norms
        x = self.rows[numbers].to(self.dtype)
        first = int(met[numbers].min())
        picks = _Pick(self._picks.direction[first:step], self._picks.own[first:step])
        # Products of matrices say which picks can be a row's nearest; distances to these are summed pair by pair
        i, j = self._nearest(x, norms[numbers], picks)
        gap[numbers] = gap[numbers].scatter_reduce(0, i, self._gaps(x, norms[numbers], picks, i, j), "amin")
        met[numbers] = step
        self.progress(len(numbers))

    def _remember(self, row: int) -> None:
        new = _Pick.of(self.rows[row].to(self.dtype), self.known.norms[row])
        self._picks = _Pick(*(torch.cat(parts) for parts in zip(self._picks, new, strict=True)))


def _advise(rows: Tensor, advice: int) -> None:
    """Tell the system how rows that are mapped from a file will be read; it reads ahead otherwise."""
    page = mmap.PAGESIZE
    begin = rows.data_ptr() // page * page
    size = rows.data_ptr() + rows.numel() * rows.itemsize - begin
    libc = ctypes.CDLL(None)
    if rows.numel() and rows.is_contiguous() and hasattr(libc, "madvise"):
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), ctypes.c_int(advice))
