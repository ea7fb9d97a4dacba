"""The statistics in Triton: what is launched, and what PyTorch's operations do before and after.

Pilot: the best scores in an eighth of the bank are a lower bound of each row's k-th best. Filter: one launch walks the
bank and stores what reaches the bound. A stable sort of that gives the k best, lowest index first on ties. Rows that
had more to store than there was room for are filtered again, with a better bound and room for the whole bank.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from fcn_kernels.device.constants import constants
from fcn_kernels.device.gpu import MOST_REGISTERS, device_of
from fcn_kernels.neighbors import torch_backend
from fcn_kernels.neighbors.kernels.scores import Constants, filter_scores, sum_moments
from fcn_kernels.neighbors.problem import Arriving, Gradients, Problem, Statistics
from fcn_kernels.neighbors.torch_backend import Tile, of_best, of_moments
from fcn_kernels.sets import row_norms, usable

WARPS = 8
BUFFER_BYTES = 64 << 20  # of what a filter stores; rows go in pieces that keep to it
PILOT = 8  # the pilot sees this part of the bank
PILOT_SCORES = 16 << 20  # of its product at a time, 64 MB
EXPECTED = 2 * PILOT  # times k entries a row, twice what a bank in no order gives
PLAIN = 1e-15, 1e15  # norms whose products with each other stay in float32's range
PART_TILES = 32  # whose moments are summed by themselves, 2,048 bank rows
MOST_BANK = MOST_STRIDE = 2**31 // 64 - 1  # so that places in a tile are of 32 bits


class Plan(NamedTuple):
    """How the bank is cut, and the sizes of a tile, which are always the same, as scores depend on them."""

    splits: int
    tiles: int  # of a split
    block_n: int = 64
    block_m: int = 64
    block_c: int = 64

    @classmethod
    def of(cls, n: int, p: "Prepared", processors: int) -> "Plan":
        """For n rows: enough programs for every multiprocessor, four each."""
        plan = cls(1, 1, block_c=_columns(p))
        all_tiles = max(1, triton.cdiv(len(p.bank), plan.block_m))
        splits = max(1, min(all_tiles, triton.cdiv(4 * processors, triton.cdiv(max(n, 1), plan.block_n))))
        tiles = triton.cdiv(all_tiles, splits)
        return plan._replace(splits=triton.cdiv(all_tiles, tiles), tiles=tiles)

    @classmethod
    def even(cls, p: "Prepared") -> "Plan":
        """Parts of as many tiles whatever the number of rows: what is summed in a part does not depend on the batch."""
        plan = cls(1, PART_TILES, block_c=_columns(p))
        return plan._replace(splits=triton.cdiv(len(p.bank), plan.tiles * plan.block_m))


def _columns(p: "Prepared") -> int:
    return 16 if p.rows.dtype == torch.float32 else 64


class Prepared(NamedTuple):
    """What the kernels read."""

    rows: Tensor  # (N, C), of the bank's dtype
    bank: Tensor  # (M, C)
    row_scale: Tensor  # (N,) float32, 1 / |x|, 0 for a row that is not usable
    bank_scale: Tensor  # (M,)
    ids: Tensor | None
    bank_ids: Tensor | None

    def some(self, part: Any) -> "Prepared":
        """A part of the rows."""
        return self._replace(
            rows=self.rows[part], row_scale=self.row_scale[part], ids=None if self.ids is None else self.ids[part]
        )


def forward(p: Problem) -> Statistics:
    """The statistics of every row."""
    if not (len(p.rows) and len(p.bank)):
        return torch_backend.forward(p)
    if len(p.bank) > MOST_BANK:
        raise ValueError(f"expected a bank of at most {MOST_BANK} rows on Triton, got {len(p.bank)}")
    prepared = prepare(p)
    return _nearest(p, prepared) if p.k else _all_within(p, prepared)


def backward(p: Problem, grad: Arriving, found: Statistics, wanted: tuple[bool, bool]) -> Gradients:
    """Of the few bank rows of each row: PyTorch's gathers and sums, in a fixed order."""
    return torch_backend.backward(p, grad, found, wanted)


def prepare(p: Problem) -> Prepared:
    """Rows and bank in one dtype, and their scales."""
    dtype = p.bank.dtype if p.rows.dtype == p.bank.dtype else torch.float32
    (rows, row_scale), (bank, bank_scale) = (_scaled(t.to(dtype), p.normalized) for t in (p.rows, p.bank))
    if rows.dtype != bank.dtype:  # one had to be made unit
        rows, bank = rows.float(), bank.float()
    return Prepared(rows, bank, row_scale, bank_scale, p.ids, p.bank_ids)


def _scaled(rows: Tensor, normalized: bool) -> tuple[Tensor, Tensor]:
    if (rows.stride(1) != 1 and rows.shape[1] > 1) or rows.stride(0) > MOST_STRIDE:
        rows = rows.contiguous()
    norms = torch.cat([row_norms(part.float()) for part in rows.split(torch_backend.TILE_BANK)])
    good = usable(norms, norms)
    if normalized:
        return rows, good.float()
    low, high = PLAIN
    plain = (norms > low) & (norms < high)
    if not (plain | ~good).all():
        rows, norms = rows.float() / norms[:, None], torch.ones_like(norms)
    return rows, torch.where(good, 1 / norms, 0)


def _nearest(p: Problem, prepared: Prepared) -> Statistics:
    floor = _pilot(p)
    best = floor.new_full((len(floor), p.k), -torch.inf)
    places = torch.full_like(best, -1, dtype=torch.int64)
    plan = Plan.of(len(floor), prepared, device_of(p.rows).processors)
    room = min(plan.tiles * plan.block_m, int(triton.next_power_of_2(32 + EXPECTED * p.k // plan.splits)))
    for part in _pieces(len(floor), plan.splits * room):
        best[part], places[part], full = _filter(p, prepared.some(part), floor[part], plan, room)
        again = full.nonzero()[:, 0] + part.start
        if not len(again):
            continue
        better = torch.maximum(floor[again], best[again, -1])
        whole = Plan(1, triton.cdiv(len(prepared.bank), plan.block_m), block_c=plan.block_c)
        for some in _pieces(len(again), whole.tiles * whole.block_m):
            rows = again[some]
            best[rows], places[rows], _ = _filter(
                p, prepared.some(rows), better[some], whole, whole.tiles * whole.block_m
            )
    return of_best(p, best, places)


def _pieces(n: int, entries: int) -> Iterator[slice]:
    """Slices of n rows, each of so many entries of 8 bytes, that fit the buffer."""
    step = max(1, BUFFER_BYTES // (8 * entries))
    yield from (slice(at, min(at + step, n)) for at in range(0, n, step))


def _pilot(p: Problem) -> Tensor:
    """A lower bound (N,) of each row's k-th best score."""
    seen = max(p.k, len(p.bank) // PILOT)
    floor = p.rows.new_full((len(p.rows),), p.min_cosine, dtype=p.dtype)
    if seen >= len(p.bank):
        return floor
    bank_ids = None if p.bank_ids is None else p.bank_ids[:seen]
    bank = torch_backend.unit_rows(p, p.bank[:seen], bank_ids)
    step = max(1, PILOT_SCORES // seen)
    for at in range(0, len(floor), step):
        part = slice(at, at + step)
        rows = torch_backend.unit_rows(p, p.rows[part], None if p.ids is None else p.ids[part])
        tile = Tile.of(rows, bank)
        # the margin is for scores of unit rows, which differ by a few roundings from the kernels'
        bound = tile.scores.topk(p.k).values[:, -1] - 2 * tile.margin[:, 0]
        floor[part] = torch.maximum(floor[part], bound)
    return floor


def _filter(p: Problem, some: Prepared, floor: Tensor, plan: Plan, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best scores (n, k) that reach the floor, their bank rows, and which rows (n,) had too many to store."""
    shape = len(floor), plan.splits * room
    scores = floor.new_full(shape, -torch.inf)
    places = torch.full(shape, -1, dtype=torch.int32, device=floor.device)
    counts = torch.zeros(len(floor), plan.splits, dtype=torch.int32, device=floor.device)
    _launch(
        filter_scores, some, plan,
        floor_ptr=floor, scores_ptr=scores, places_ptr=places, counts_ptr=counts, room=room,
    )  # fmt: skip
    if shape[1] < p.k:
        more = (0, p.k - shape[1])
        scores, places = F.pad(scores, more, value=-torch.inf), F.pad(places, more, value=-1)
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    best = ordered[:, : p.k]
    return best, places.gather(1, order[:, : p.k]).long(), (counts > room).any(1)


def _all_within(p: Problem, prepared: Prepared) -> Statistics:
    plan = Plan.even(prepared)
    moments = prepared.row_scale.new_empty(3, plan.splits, len(p.rows))
    _launch(sum_moments, prepared, plan, moments_ptr=moments, least=max(p.min_cosine, -torch.finfo(torch.float32).max))
    counts, mean, squares = moments.double()
    total = counts.sum(0)
    middle = (counts * mean).sum(0) / total.clamp(min=1)
    spread = (squares + counts * (mean - middle).square()).sum(0)
    return of_moments(p, total.long(), middle, spread)


def _launch(kernel: Any, p: Prepared, plan: Plan, **arguments: Any) -> None:
    grid = (triton.cdiv(len(p.rows), plan.block_n), plan.splits)
    kernel[grid](
        rows_ptr=p.rows,
        bank_ptr=p.bank,
        row_scale_ptr=p.row_scale,
        bank_scale_ptr=p.bank_scale,
        row_ids_ptr=p.ids,
        bank_ids_ptr=p.bank_ids,
        N=len(p.rows),
        M=len(p.bank),
        C=p.rows.shape[1],
        stride_rows=p.rows.stride(0),
        stride_bank=p.bank.stride(0),
        tiles=plan.tiles,
        BUILD=constants(Constants, BLOCK_N=plan.block_n, BLOCK_M=plan.block_m, BLOCK_C=plan.block_c),
        num_warps=WARPS,
        **MOST_REGISTERS,
        **arguments,
    )
