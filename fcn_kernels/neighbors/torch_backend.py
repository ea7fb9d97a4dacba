"""The statistics in PyTorch's operations: the backend of any device and dtype, and the plain form to read first.

Tiles of rows and bank keep memory bounded. A matrix product gives a pair other last bits in another batch, so that it
only says which pairs can matter; the scores of these are summed pair by pair, and so depend on nothing else. What can
matter is certain: the error of a product of C terms is bounded.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_kernels.neighbors.problem import Arriving, Gradients, Problem, Statistics
from fcn_kernels.sets import row_norms, usable

TILE_ROWS, TILE_BANK = 256, 8192  # 8 MB of float32 scores
PIECE_BYTES = 8 << 20  # of pairs of rows multiplied at a time
PRODUCT_ROWS = 16  # products of a multiple of so many rows give a row the same bits in any batch
LOW_PRECISION = 2.0**-6  # more than products in bfloat16 or TF32, which PyTorch can be told to use, are off by


class Rows(NamedTuple):
    """Some rows, made unit."""

    unit: Tensor  # (n, C), of the dtype of the sums; 0 for a row that is not usable
    norms: Tensor  # (n,), the rows' own
    usable: Tensor  # (n,) bool
    ids: Tensor | None  # (n,)

    @property
    def sizes(self) -> Tensor:
        """(n,), what |unit| is at most, 1 unless the caller said that rows are unit and they are not."""
        return torch.linalg.vector_norm(self.unit, dim=-1)  # type: ignore[no-any-return]


class Tile(NamedTuple):
    """Rows against a piece of the bank."""

    rows: Rows
    bank: Rows
    scores: Tensor  # (n, m), by a matrix product; -inf where the pair takes no part
    margin: Tensor  # (n, 1), how far these may be from those of `pair_scores`

    @classmethod
    def of(cls, rows: Rows, bank: Rows) -> "Tile":
        n, dim = rows.unit.shape
        # rows beyond n are cut off again
        scores = (F.pad(rows.unit, (0, 0, 0, -n % PRODUCT_ROWS)) @ bank.unit.T)[:n]
        out = ~(rows.usable[:, None] & bank.usable)
        if rows.ids is not None and bank.ids is not None:
            out |= rows.ids[:, None] == bank.ids
        # either sum of C products is within (C + 2) 2^-24 |u| |v| of the exact one
        relative = 1.02 * (dim + 2) * torch.finfo(scores.dtype).eps
        if scores.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            relative += LOW_PRECISION
        margin = relative * rows.sizes[:, None] * bank.sizes.amax()
        return cls(rows, bank, scores.masked_fill_(out, -torch.inf), margin)


def unit_rows(p: Problem, rows: Tensor, ids: Tensor | None) -> Rows:
    """Rows (n, C) over their norms, or as they are if the caller says that they are unit."""
    rows = rows.to(p.dtype).contiguous()  # by strides, sums would differ in their last bits
    norms = row_norms(rows)
    good = usable(norms, norms)
    unit = rows if p.normalized else rows / norms[:, None]
    return Rows(unit.where(good[:, None], 0), norms, good, ids)


def slices(length: int, step: int) -> Iterator[slice]:
    """Of so many, step at a time."""
    yield from (slice(at, min(at + step, length)) for at in range(0, length, step))


def _bank_tiles(p: Problem) -> Iterator[tuple[int, Rows]]:
    """Pieces of the bank, with where they begin."""
    for part in slices(p.bank.shape[0], TILE_BANK):
        yield part.start, unit_rows(p, p.bank[part], None if p.bank_ids is None else p.bank_ids[part])


def _row_tiles(rows: Rows) -> Iterator[tuple[slice, Rows]]:
    for part in slices(rows.unit.shape[0], TILE_ROWS):
        yield part, Rows(*(None if t is None else t[part] for t in rows))  # type: ignore[arg-type]


def pair_scores(u: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """u_i . v_j (P,) of places i, j (P,): the score of a pair, which depends on its two rows alone."""
    scores = u.new_empty(i.shape[0])
    for part in slices(i.shape[0], _pairs_at_a_time(u)):
        scores[part] = (u[i[part]] * v[j[part]]).sum(-1)
    return scores


def _pairs_at_a_time(unit: Tensor) -> int:
    return max(1, PIECE_BYTES // (unit.shape[1] * unit.itemsize))


def forward(p: Problem) -> Statistics:
    """The statistics of every row."""
    return _nearest(p) if p.k else _all_within(p)


def _nearest(p: Problem) -> Statistics:
    rows = unit_rows(p, p.rows, p.ids)
    best = rows.unit.new_full((len(rows.unit), p.k), -torch.inf)
    places = torch.full_like(best, -1, dtype=torch.int64)
    for first, bank in _bank_tiles(p):
        for part, some in _row_tiles(rows):
            best[part], places[part] = _merge(p, Tile.of(some, bank), best[part], places[part], first)
    return of_best(p, best, places)


def of_best(p: Problem, best: Tensor, places: Tensor) -> Statistics:
    """The statistics of the k best scores (N, k), -inf where there is none, and their bank rows."""
    there = best > -torch.inf
    counts = there.sum(-1)
    scores, size = best.double().where(there, 0), counts.clamp(min=1)
    mean = scores.sum(-1) / size
    std = ((scores - mean[:, None]).where(there, 0).square().sum(-1) / size).sqrt()
    return Statistics(mean.to(p.dtype), std.to(p.dtype), counts, places.where(there, -1))


def _merge(p: Problem, tile: Tile, best: Tensor, places: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The k best of those so far (n, k) and of a tile, whose first column is bank row `first`."""
    floor = best[:, -1:].clamp(min=p.min_cosine) - tile.margin
    if tile.scores.shape[1] > p.k and (best[:, -1] == -torch.inf).any():
        # the k-th best of the tile by itself is no better than the k-th best of all
        floor = torch.maximum(floor, tile.scores.topk(p.k).values[:, -1:] - 2 * tile.margin)
    i, j = ((tile.scores >= floor) & (tile.scores > -torch.inf)).nonzero(as_tuple=True)
    scores = pair_scores(tile.rows.unit, tile.bank.unit, i, j)
    scores = scores.where(scores >= p.min_cosine, -torch.inf)
    found = torch.bincount(i, minlength=len(best))
    at = torch.arange(len(i), device=i.device) - (found.cumsum(0) - found)[i]
    wide = (len(best), int(found.max()))
    new_scores, new_places = best.new_full(wide, -torch.inf), places.new_full(wide, -1)
    new_scores[i, at], new_places[i, at] = scores, first + j
    # what was there has lower places, and a stable sort leaves equal scores in that order
    ordered, order = torch.cat([best, new_scores], 1).sort(dim=1, descending=True, stable=True)
    return ordered[:, : p.k], torch.cat([places, new_places], 1).gather(1, order[:, : p.k])


def _members(p: Problem, tile: Tile) -> tuple[Tensor, Tensor]:
    """Scores (n, m), and whether each is of a bank row in S_i, without a limit on their number."""
    scores = tile.scores
    i, j = ((scores - p.min_cosine).abs() <= tile.margin).nonzero(as_tuple=True)
    scores[i, j] = pair_scores(tile.rows.unit, tile.bank.unit, i, j)
    return scores, (scores >= p.min_cosine) & (scores > -torch.inf)


def _all_within(p: Problem) -> Statistics:
    rows = unit_rows(p, p.rows, p.ids)
    counts = torch.zeros_like(rows.norms, dtype=torch.int64)
    mean, squares = (torch.zeros_like(rows.norms, dtype=torch.float64) for _ in range(2))
    for _, bank in _bank_tiles(p):
        for part, some in _row_tiles(rows):
            scores, member = _members(p, Tile.of(some, bank))
            new = member.sum(-1)
            scores, size, total = scores.double().where(member, 0), new.clamp(min=1), counts[part] + new
            middle = scores.sum(-1) / size
            spread = (scores - middle[:, None]).where(member, 0).square().sum(-1)
            # two means and sums of squares about them, made one (Chan, Golub and LeVeque 1979)
            share, apart = new / total.clamp(min=1), middle - mean[part]
            squares[part] += spread + apart.square() * share * counts[part]
            mean[part] += apart * share
            counts[part] = total
    return of_moments(p, counts, mean, squares)


def of_moments(p: Problem, counts: Tensor, mean: Tensor, squares: Tensor) -> Statistics:
    """The statistics of numbers (N,), means, and sums of squares about these."""
    std = (squares / counts.clamp(min=1)).sqrt()
    return Statistics(mean.to(p.dtype), std.to(p.dtype), counts, counts.new_empty(len(counts), 0))


def backward(p: Problem, grad: Arriving, found: Statistics, wanted: tuple[bool, bool]) -> Gradients:
    """Gradients of rows and bank, those that are wanted, the sets S_i held."""
    rows = unit_rows(p, p.rows, p.ids)
    weight, slope = slopes(grad, found)
    from_set = _gather if p.k else _gather_all
    du, dv = from_set(p, rows, weight, slope, found, wanted[1])
    empty = p.rows.new_empty(0)
    drows = _through_norm(p, du, rows).to(p.rows.dtype) if wanted[0] else empty
    return Gradients(drows, _bank_gradient(p, dv) if wanted[1] else empty.to(p.bank.dtype))


def slopes(grad: Arriving, found: Statistics) -> tuple[Tensor, Tensor]:
    """weight and slope (N,) of the scores' gradients: ds_ij = weight_i + slope_i (s_ij - mu_i) over S_i."""
    size = found.counts.clamp(min=1)
    return grad.mean / size, (grad.std / (size * found.std)).where(found.std > 0, 0)


def _through_norm(p: Problem, dunit: Tensor, rows: Rows) -> Tensor:
    """(I - u u^T) / |x| of a unit row's gradient."""
    if not p.normalized:
        along = (dunit * rows.unit).sum(-1, keepdim=True)
        dunit = (dunit - along * rows.unit) / rows.norms[:, None]
    return dunit.where(rows.usable[:, None], 0)


def _bank_gradient(p: Problem, dv: Tensor) -> Tensor:
    for first, bank in _bank_tiles(p):
        part = slice(first, first + len(bank.unit))
        dv[part] = _through_norm(p, dv[part], bank)
    return dv.to(p.bank.dtype)


def _gather(
    p: Problem, rows: Rows, weight: Tensor, slope: Tensor, found: Statistics, of_bank: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of unit rows (N, C) and bank (M, C), from the k bank rows of each row."""
    pair_weights = torch.zeros_like(found.indices, dtype=p.dtype)
    du = torch.zeros_like(rows.unit)
    dv = du.new_zeros(p.bank.shape if of_bank else (0,))
    if not len(p.bank):
        return du, dv
    for part in slices(len(du), max(1, _pairs_at_a_time(du) // p.k)):
        places = found.indices[part]
        there = places >= 0
        v = unit_rows(p, p.bank[places.clamp(min=0).flatten()], None).unit.view(*places.shape, -1)  # [n, k, c]
        score = (rows.unit[part, None] * v).sum(-1)
        ds = weight[part, None] + slope[part, None] * (score - found.mean[part, None])
        pair_weights[part] = ds.where(there, 0)
        du[part] = (pair_weights[part, :, None] * v).sum(1)
    if of_bank:
        _sum_by_place(dv, found.indices.flatten(), pair_weights.flatten(), rows.unit)
    return du, dv


def _sum_by_place(out: Tensor, places: Tensor, weights: Tensor, unit: Tensor) -> None:
    """out_j += sum of weight u_i over the pairs (i, j), in the order of i."""
    places, order = places.sort(stable=True)
    k = max(1, len(places) // max(1, len(unit)))
    for part in slices(len(places), _pairs_at_a_time(unit)):
        pairs = order[part][places[part] >= 0]
        where, many = places[part][places[part] >= 0].unique_consecutive(return_counts=True)
        if len(where):
            terms = weights[pairs, None] * unit[pairs // k]
            out[where] += torch.segment_reduce(terms, "sum", lengths=many, axis=0)


def _gather_all(
    p: Problem, rows: Rows, weight: Tensor, slope: Tensor, found: Statistics, of_bank: bool
) -> tuple[Tensor, Tensor]:
    """The same, from all bank rows within the cap: the scores are made again."""
    du = torch.zeros_like(rows.unit)
    dv = du.new_zeros(p.bank.shape if of_bank else (0,))
    for first, bank in _bank_tiles(p):
        for part, some in _row_tiles(rows):
            scores, member = _members(p, Tile.of(some, bank))
            ds = weight[part, None] + slope[part, None] * (scores - found.mean[part, None])
            ds = ds.where(member, 0)
            du[part] += ds @ bank.unit
            if of_bank:
                dv[first : first + len(bank.unit)] += ds.T @ some.unit
    return du, dv
