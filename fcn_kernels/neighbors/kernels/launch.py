"""The statistics in Triton: what is launched, and what PyTorch's operations do before and after.

Pilot: the best scores in an eighth of the bank are a lower bound of each row's k-th best. Filter: one launch walks the
bank and stores what reaches the bound. Select: of that the k best, lowest index first on ties. Rows that had more to
store than there was room for are filtered again with a better bound, and searched without a buffer if that does not do.
Whether that is so stays on the device: these launches are always made, and nothing waits.
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
from fcn_kernels.neighbors.kernels.gather import gather_bank, gather_rows
from fcn_kernels.neighbors.kernels.norms import measure_rows
from fcn_kernels.neighbors.kernels.scores import Constants, filter_scores, sum_moments
from fcn_kernels.neighbors.kernels.select import LOW_BITS, NONE, collect_best, find_kth, select_best
from fcn_kernels.neighbors.problem import Arriving, Gradients, Problem, Statistics
from fcn_kernels.neighbors.torch_backend import Rows, Tile, of_best, of_moments
from fcn_kernels.sets import usable

WARPS = 8
BUFFER_BYTES = 64 << 20  # of what a filter stores; rows go in pieces that keep to it
PILOT = 8  # the pilot sees this part of the bank
PILOT_SCORES = 16 << 20  # of its product at a time, 64 MB
EXPECTED = 2 * PILOT  # times k entries a row, twice what a bank in no order gives
MOST_SELECTED = 4096  # entries of a row that a program holds on the chip; of twice as many it spills on sm_100
MOST_GATHERED = 8192  # columns that a program holds
NORM_ROWS = 16  # of a program that measures them
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
    """Of the few bank rows of each row, gathered; of all within a cap, PyTorch's products."""
    (n, dim), m = p.rows.shape, len(p.bank)
    if not (p.k and n and m) or dim > MOST_GATHERED:
        return torch_backend.backward(p, grad, found, wanted)
    q = prepare(p)
    weight, slope = torch_backend.slopes(grad, found)
    pairs = q.row_scale.new_empty(n, p.k)
    drows, dbank = (t.new_empty(t.shape if w else 0) for t, w in zip((p.rows, p.bank), wanted, strict=True))
    wide = max(16, triton.next_power_of_2(dim))
    shared = {
        "rows_ptr": q.rows, "bank_ptr": q.bank, "row_scale_ptr": q.row_scale, "bank_scale_ptr": q.bank_scale,
        "pair_ptr": pairs, "C": dim, "stride_rows": q.rows.stride(0), "stride_bank": q.bank.stride(0), "k": p.k,
        "BLOCK_C": wide, "num_warps": 1 if wide <= 512 else 4 if wide <= 2048 else WARPS, **MOST_REGISTERS,
    }  # fmt: skip
    indices = found.indices.contiguous()
    gather_rows[(n,)](
        indices_ptr=indices, weight_ptr=weight, slope_ptr=slope, mean_ptr=found.mean.contiguous(),
        inverse_ptr=_inverse(p, p.rows), drows_ptr=drows if wanted[0] else None, **shared,
    )  # fmt: skip
    if wanted[1]:
        places, order = indices.flatten().sort(stable=True)
        starts = torch.searchsorted(places, torch.arange(m + 1, device=places.device))
        gather_bank[(m,)](
            order_ptr=order, starts_ptr=starts, inverse_ptr=_inverse(p, p.bank), dbank_ptr=dbank, **shared
        )
    return Gradients(drows, dbank)


def _inverse(p: Problem, rows: Tensor) -> Tensor | None:
    """1 / |x| (N,) of rows as given; None where they are taken as unit."""
    return None if p.normalized else _scale(norms_of(_loadable(rows)), False)


def prepare(p: Problem) -> Prepared:
    """Rows and bank in one dtype, and their scales. Nothing waits for their values."""
    dtype = p.bank.dtype if p.rows.dtype == p.bank.dtype else torch.float32
    rows, bank = (_loadable(t.to(dtype)) for t in (p.rows, p.bank))
    row_norms, bank_norms = norms_of(rows), norms_of(bank)
    if not p.normalized and dtype != torch.float16:
        # rows times a power of two, which changes no digit: scores stay in range, whatever the bank's norms
        shift = torch.exp2(-torch.frexp(row_norms).exponent.float()).where(usable(row_norms, row_norms), 1)
        rows, row_norms = rows * shift[:, None].to(dtype), row_norms * shift
    row_scale, bank_scale = (_scale(norms, p.normalized) for norms in (row_norms, bank_norms))
    return Prepared(rows, bank, row_scale, bank_scale, p.ids, p.bank_ids)


def _loadable(rows: Tensor) -> Tensor:
    far = (rows.stride(1) != 1 and rows.shape[1] > 1) or rows.stride(0) > MOST_STRIDE
    return rows.contiguous() if far else rows


def norms_of(rows: Tensor) -> Tensor:
    """|x| (N,) float32."""
    norms = torch.empty(len(rows), device=rows.device)
    n, dim = rows.shape
    measure_rows[(triton.cdiv(n, NORM_ROWS),)](
        rows_ptr=rows, norms_ptr=norms, N=n, C=dim, stride=rows.stride(0),
        BLOCK_N=NORM_ROWS, BLOCK_C=min(512, max(16, triton.next_power_of_2(dim))), num_warps=4,
    )  # fmt: skip
    return norms


def _scale(norms: Tensor, normalized: bool) -> Tensor:
    good = usable(norms, norms)
    return good.float() if normalized else torch.where(good, 1 / norms, 0)


def _nearest(p: Problem, prepared: Prepared) -> Statistics:
    floor = _pilot(p, prepared)
    n = len(floor)
    keys = torch.full((n, p.k), NONE.value, device=floor.device)
    plan = Plan.of(n, prepared, device_of(p.rows).processors)
    room = min(plan.tiles * plan.block_m, int(triton.next_power_of_2(32 + EXPECTED * p.k // plan.splits)))
    for part in _pieces(n, plan.splits * room):
        _search(p.k, prepared.some(part), floor[part], keys[part], plan, room)
    keys = keys.sort(dim=1, descending=True).values
    numbers = (keys >> 32).int()
    scores = torch.where(numbers >= 0, numbers, numbers ^ LOW_BITS.value).view(torch.float32)
    places = LOW_BITS.value - (keys & LOW_BITS.value)
    there = keys > NONE.value
    return of_best(p, scores.where(there, -torch.inf), places.where(there, -1))


def _pieces(n: int, entries: int) -> Iterator[slice]:
    """Slices of n rows, each of so many entries of 8 bytes, that fit the buffer."""
    step = max(1, BUFFER_BYTES // (8 * entries))
    yield from (slice(at, min(at + step, n)) for at in range(0, n, step))


def _pilot(p: Problem, prepared: Prepared) -> Tensor:
    """A lower bound (N,) of each row's k-th best score, from bank rows in equal steps, so that no order misleads it."""
    floor = prepared.row_scale.new_full((len(prepared.rows),), p.min_cosine)
    step = min(PILOT, len(prepared.bank) // p.k)
    if step < 2:
        return floor
    bank_ids = None if p.bank_ids is None else p.bank_ids[::step]
    bank = _unit(prepared.bank[::step], prepared.bank_scale[::step], bank_ids)
    for part in torch_backend.slices(len(floor), max(1, PILOT_SCORES // len(bank.unit))):
        some = prepared.some(part)
        tile = Tile.of(_unit(some.rows, some.row_scale, some.ids), bank)
        # the margin is for scores of unit rows, which differ by a few roundings from the kernels'
        bound = tile.scores.topk(p.k).values[:, -1] - 2 * tile.margin[:, 0]
        floor[part] = torch.maximum(floor[part], bound)
    return floor


def _unit(rows: Tensor, scale: Tensor, ids: Tensor | None) -> Rows:
    good = scale > 0
    return Rows((rows.float() * scale[:, None]).where(good[:, None], 0), scale, good, ids)


def _search(k: int, some: Prepared, floor: Tensor, keys: Tensor, plan: Plan, room: int) -> None:
    """Put the keys (n, k) of the best scores in place. All is launched that may be needed: what is not does nothing."""
    shape = len(floor), plan.splits * room
    scores, places = floor.new_empty(shape), torch.empty(shape, dtype=torch.int32, device=floor.device)
    counts = torch.empty(len(floor), plan.splits, dtype=torch.int32, device=floor.device)
    full = torch.empty(len(floor), dtype=torch.int32, device=floor.device)
    buffers = {"scores_ptr": scores, "places_ptr": places, "counts_ptr": counts, "room": room}
    for live in (None, full):  # again with a better bound, where there was no room
        _launch(filter_scores, some, plan, live_ptr=live, floor_ptr=floor, **buffers)
        _select(k, live, floor, keys, full, plan.splits, **buffers)
    whole = Plan(1, triton.cdiv(len(some.bank), plan.block_m), block_c=plan.block_c)
    left = {"live_ptr": full, "kth_ptr": torch.empty_like(floor), "ties_ptr": torch.empty_like(full), "k": k}
    _launch(find_kth, some, whole, floor_ptr=floor, **left)
    _launch(collect_best, some, whole, keys_ptr=keys, **left)


def _select(
    k: int, live: Tensor | None, floor: Tensor, keys: Tensor, full: Tensor, splits: int, **buffers: Any
) -> None:
    n, entries = buffers["scores_ptr"].shape
    wide = max(16, triton.next_power_of_2(entries))
    if wide <= MOST_SELECTED:
        select_best[(n,)](
            **buffers, live_ptr=live, keys_ptr=keys, floor_ptr=floor, full_ptr=full, k=k, splits=splits,
            WIDE=wide, num_warps=4 if wide <= 2048 else WARPS, **MOST_REGISTERS,
        )  # fmt: skip
        return
    room, counts, scores = buffers["room"], buffers["counts_ptr"], buffers["scores_ptr"]
    there = (torch.arange(room, device=counts.device) < counts[..., None]).flatten(1)
    bits = scores.where(scores != 0, 0).view(torch.int32)
    numbers = torch.where(bits >= 0, bits, bits ^ LOW_BITS.value).long()
    every = ((numbers << 32) | (LOW_BITS.value - buffers["places_ptr"].long())).where(there, NONE.value)
    every = F.pad(every, (0, max(0, k - entries)), value=NONE.value)
    best = every.topk(k).values
    kth = scores.where(there, -torch.inf)
    kth = F.pad(kth, (0, max(0, k - entries)), value=-torch.inf).topk(k).values[:, -1]
    changed = torch.ones_like(full) if live is None else live.clone()
    keys.copy_(best.where(changed[:, None] > 0, keys))
    floor.copy_(torch.maximum(floor, kth).where(changed > 0, floor))
    full.copy_((counts > room).any(1).int().where(changed > 0, full))


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
