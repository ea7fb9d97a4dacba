"""Launch geometry, computed once for a call, and the two launchers that the op calls.

Plans are pure functions of sizes, so that the tests can build every configuration that a launch would use on a machine
without a GPU.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fcn_kernels.device.constants import constants
from fcn_kernels.device.gpu import Device, counters, device_of, gamma_argument, has_no_room, seed_argument, side_stream
from fcn_kernels.device.splits import COOPERATIVE, LAUNCHES, WHOLE
from fcn_kernels.selection.kernels.backward import select_backward
from fcn_kernels.selection.kernels.common import NO_ROW, Constants
from fcn_kernels.selection.kernels.forward import select_forward
from fcn_kernels.selection.kernels.lazy import select_lazily
from fcn_kernels.selection.problem import Gradients, Problem, Saved, Selected

MAX_DIM = 4096  # a row must fit a program
MAX_ROWS = 2**31 - 1
CHUNK_BYTES = 512  # of a row at a time: 16 bytes a thread, so that its sum stays within a warp
TILE_ELEMENTS = 32  # of a tile that a thread holds
HELD_ELEMENTS = 128  # the same where a set is one tile, which is loaded once; of 512 columns of 2 bytes
HELD_REST_ELEMENTS = 64  # of other rows, which spill with more
POINT = 8  # columns up to which a thread has whole rows, and a tile as many as fill its registers
WIDE = 1024  # columns above which a row takes all of a program's threads, and not a warp, a chunk at a time
WARPS = 4
WIDE_WARPS = 8
SHORT_ROWS = (
    128  # sets of a packed batch that a program of one warp takes; whatever the batch, so that bits do not change
)
BACKWARD_SHORT_ROWS = 64
LAST_ROWS = 32  # sets of up to so many are begun with last, so that none is left alone at the end
LOOK = 16  # sets that a program looks through for long ones; backward the loop spills, and most programs have none
FORWARD_AT_ONCE = 3  # programs of 4 warps on a multiprocessor
FLOATS_AT_ONCE = 2  # the same of rows of FLOATS float32 and more, which were 8 bytes short of registers on sm_80
FLOATS = 512
STATE_AT_ONCE = 2  # with the state asked for: three left it 8 bytes short of registers on sm_80
LAZY_AT_ONCE = 2  # where rows that cannot win are left out: three left it 32 bytes short
BACKWARD_AT_ONCE = 2
SHORT_AT_ONCE = 4  # 16 programs of a warp for short sets of 512 columns of 2 bytes; others spill with 128 registers
SHORT_REST_AT_ONCE = 2
WARP_ROWS = 32  # at a time in the scalar loops of a warp
LONG_AT_ONCE = 2
BACKWARD_ELEMENTS = 64  # the same backward, by cosine, of rows of BACKWARD_COLUMNS; for others that spills
BACKWARD_COLUMNS = (128, 256, 384, 512)
ODD_ELEMENTS = 8  # the same of rows that do not lie 16 elements apart: each element has an address of its own
REGISTERS = 65536  # of a multiprocessor
SPLIT_ROWS = 32  # a part with less work than that costs more at the barrier than it saves
SCALAR_ROWS = 256  # at a time in the scalar loops
LAZY_PICKS = 64  # from which on rows that cannot win are left out: EAGER_PICKS should be a small part of them
LAZY_BYTES = 2**26  # of a set's rows, to do so: a pass over fewer takes no longer than what parts have to exchange
EAGER_PICKS = 16  # made before: with fewer, distances still fall so far that most rows would have to be read
LATE_ROWS = 8  # of a tile that meets picks late, at the least
LATE_COLUMNS = 2048  # above, half as many: rows of 4,096 float32 were 152 bytes short of registers on sm_80
NOT_LATE = (  # what `select_forward` takes and `select_lazily` does not
    *("tau_ptr", "tau_value", "start_ptr", "mask_ptr", "softmax_ptr", "gaps_ptr", "least_ptr", "owners_ptr"),
    *("directions_ptr", "extremes_ptr", "openings_ptr"),
)
SUM_COLUMNS = 16  # 64 bytes a part: C = 512 is 64 parts' work
SUM_ELEMENTS = 32  # of a tile of the parts' sums that a thread holds


class Plan(NamedTuple):
    """How a kernel is launched: the constants it is built with, how many programs share a set, and which sets it is
    for."""

    block_n: int
    chunk: int
    chunks: int
    warps: int = WARPS
    parts: int = 1
    split: int = WHOLE.value
    block_r: int = SCALAR_ROWS
    at_once: int = BACKWARD_AT_ONCE
    shortest: int = 0
    longest: int = MAX_ROWS
    last: int = 0
    """Sets of up to so many rows are begun with last, by programs of their own."""
    look: int = 0
    """How many sets a program looks through for those of the launch; 0: each set has programs of its own."""
    held: bool = False
    """Forward, rows stay in registers from step to step: a set is a tile."""

    @property
    def name(self) -> str:
        """How a set is divided."""
        meeting = {COOPERATIVE.value: "at barriers", LAUNCHES.value: "between launches"}.get(self.split)
        return f"split into {self.parts} parts that meet {meeting}" if meeting else "a program a set"

    @property
    def block_c(self) -> int:
        """Columns of a row, up to a power of two."""
        return int(triton.next_power_of_2(self.chunk * self.chunks))

    def constants(self, p: Problem, **options: int) -> Constants:
        """What a kernel is built for."""
        return constants(  # type: ignore[no-any-return]
            Constants,
            SEEDED=p.seed is not None,
            NORMALIZED=p.normalized,
            EUCLIDEAN=p.euclidean,
            TIGHT=self.chunk == p.dim <= POINT and _lie_side_by_side(p.features),
            SPLIT=self.split,
            BLOCK_N=self.block_n,
            CHUNK=self.chunk,
            CHUNKS=self.chunks,
            BLOCK_C=self.block_c,
            BLOCK_P=int(triton.next_power_of_2(self.parts)),
            BLOCK_R=self.block_r,
            FOLD=min(self.block_n, _fold(p.dim, self.chunk, p.features.itemsize, self.warps)),
            TWICE=self.last > 0,
            LOOK=self.look,
            **options,
        )

    def programs(self, sets: int) -> int:
        """How many are launched."""
        return -(-sets // self.look) if self.look else sets * (2 if self.last else self.parts)

    @property
    def options(self) -> dict[str, Any]:
        """What Triton is told beside the kernel's own constants."""
        options: dict[str, Any] = {"num_warps": self.warps}
        if torch.version.hip is None:
            # a multiple of 8, as registers are handed out; all programs of a cooperative launch must run at once
            most = REGISTERS // (32 * self.warps * self.at_once) // 8 * 8
            options["maxnreg"] = min(255, most) if self.split == COOPERATIVE.value or self.last else 255
        return options | ({"launch_cooperative_grid": True} if self.split == COOPERATIVE.value else {})


def _lie_side_by_side(features: Tensor) -> bool:
    *sets, row, column = features.stride()
    return column == 1 and row == features.shape[-1] and all(stride % row == 0 for stride in sets)


def forward_plans(
    sets: int,
    rows: int | None,
    dim: int,
    itemsize: int,
    ragged: bool,
    device: Device,
    at_once: int = FORWARD_AT_ONCE,
) -> tuple[Plan, ...]:
    """The forward launches for ``sets`` sets of up to ``rows`` rows (None: known on the device alone).

    Rows are of ``dim`` numbers of ``itemsize`` bytes. Sets that are too few to fill the device are split, if each part
    still gets SPLIT_ROWS rows. Where lengths are on the device (``ragged``), one launch takes the short sets, with
    programs of a warp, and one the others.
    """
    chunk = _chunk(dim, itemsize)
    held = max(chunk, -(-dim // chunk) * chunk // 2)  # the compiler loads all chunks ahead, where they are few
    sizes, elements = (sets, rows, dim, itemsize, chunk, held, device), _elements(dim)
    if itemsize == 4 and dim >= FLOATS:
        at_once = min(at_once, FLOATS_AT_ONCE)
    short_at_once = SHORT_AT_ONCE if (dim, itemsize) == (512, 2) else SHORT_REST_AT_ONCE
    tiers = _tiers(*sizes, ragged, short_at_once, elements, SHORT_ROWS, LOOK)
    return tiers or tuple(_holding(plan, rows, dim, itemsize) for plan in _plans(*sizes, at_once, elements))


def _holding(plan: Plan, rows: int | None, dim: int, itemsize: int) -> Plan:
    """A plan whose only tile has all of a set's rows, where so many fit its threads' registers; else the given."""
    elements = HELD_ELEMENTS if (dim, itemsize) == (512, 2) else HELD_REST_ELEMENTS
    if rows is None or plan.parts > 1 or dim <= POINT or dim % 16:
        return plan
    block_n = max(plan.block_n, int(triton.next_power_of_2(rows)))
    if block_n * plan.chunk * plan.chunks > elements * 32 * plan.warps:
        return plan
    return plan._replace(block_n=block_n, block_r=max(plan.block_r, block_n), held=True)


def backward_plans(
    sets: int,
    rows: int | None,
    dim: int,
    itemsize: int,
    ragged: bool,
    device: Device,
    elements: int = BACKWARD_ELEMENTS,
) -> tuple[Plan, ...]:
    """As :func:`forward_plans`, with so many ``elements`` of a tile to a thread at the most."""
    chunk = _chunk(dim, itemsize)
    held = max(2 * POINT, -(-dim // chunk) * chunk)  # a row has two weights and two sums beside it
    holds = dim in BACKWARD_COLUMNS and (dim, itemsize) != (128, 4)  # which spills 8 bytes on sm_80
    elements = elements if holds else _elements(dim)
    sizes = sets, rows, dim, itemsize, chunk, held, device
    tiers = _tiers(*sizes, ragged, BACKWARD_AT_ONCE, elements, BACKWARD_SHORT_ROWS, look=0)
    return tiers or _plans(*sizes, BACKWARD_AT_ONCE, elements)


def _fold(dim: int, chunk: int, itemsize: int, warps: int) -> int:
    """Rows of a tile in different threads, which load 16 bytes at once where rows are aligned. No tile has fewer: the
    compiler would give a row to more threads, and they sum it in another order."""
    vector = min(chunk, 16 // itemsize) if dim == chunk or dim % 16 == 0 else 1
    return max(1, 32 * warps * vector // chunk)


def _chunk(dim: int, itemsize: int) -> int:
    block_c = int(triton.next_power_of_2(dim))
    if dim <= POINT:
        return max(2, block_c)
    return block_c if dim > WIDE else min(max(16, block_c), CHUNK_BYTES // itemsize)


def _elements(dim: int) -> int:
    return ODD_ELEMENTS if dim > POINT and dim % 16 else TILE_ELEMENTS


def _plan(
    rows: int | None,
    dim: int,
    itemsize: int,
    chunk: int,
    held: int,
    at_once: int,
    elements: int,
    warps: int,
    **options: Any,
) -> Plan:
    """A plan for parts of sets of up to ``rows`` rows, with programs of so many ``warps``."""
    block_n = 1 << max(1, (elements * 32 * warps // held).bit_length() - 1)
    block_r = max(SCALAR_ROWS * warps // WARPS, block_n if dim <= POINT else 0)
    if rows is not None:
        each = int(triton.next_power_of_2(-(-max(rows, 1) // options.get("parts", 1))))
        block_n, block_r = max(2, min(block_n, each)), max(16, min(block_r, each))
    block_n = max(block_n, _fold(dim, chunk, itemsize, warps))
    block_r, at_once = max(block_r, block_n), max(1, at_once * WARPS // warps)
    return Plan(block_n, chunk, -(-dim // chunk), warps, block_r=block_r, at_once=at_once, **options)


def _plans(
    sets: int,
    rows: int | None,
    dim: int,
    itemsize: int,
    chunk: int,
    held: int,
    device: Device,
    at_once: int,
    elements: int,
) -> tuple[Plan, ...]:
    """One launch for all sets."""
    warps, held = WIDE_WARPS if held > WIDE else WARPS, max(held, POINT)
    tile = _fold(dim, chunk, itemsize, warps)
    parts = _parts(sets, rows, device.processors * max(1, at_once * WARPS // warps), tile)
    split = (COOPERATIVE if device.cooperative else LAUNCHES) if parts > 1 else WHOLE
    return (_plan(rows, dim, itemsize, chunk, held, at_once, elements, warps, parts=parts, split=split.value),)


def _parts(sets: int, rows: int | None, programs: int, tile: int) -> int:
    """Of a set: no more than there are programs, and none smaller than a tile."""
    return 1 if rows is None else max(1, min(programs // max(sets, 1), rows // max(SPLIT_ROWS, tile)))


def _tiers(
    sets: int,
    rows: int | None,
    dim: int,
    itemsize: int,
    chunk: int,
    held: int,
    device: Device,
    ragged: bool,
    at_once: int,
    elements: int,
    short: int,
    look: int,
) -> tuple[Plan, ...]:
    """Two launches for sets whose lengths are on the device, larger programs for long ones and those of one warp for
    short ones; none where one launch is as good."""
    if not ragged or sets <= 1 or held > WIDE or (rows is not None and rows <= short):
        return ()
    tile = _fold(dim, chunk, itemsize, WARPS)
    if _parts(sets, rows, device.processors * FORWARD_AT_ONCE, tile) > 1:
        return ()
    sizes = rows, dim, itemsize, chunk, max(held, POINT)
    shorter = _plan(*sizes, at_once, elements, 1, longest=short, last=LAST_ROWS)
    longer = _plan(*sizes, LONG_AT_ONCE, elements, WARPS, shortest=short + 1, look=look)
    return longer, shorter._replace(block_r=max(shorter.block_n, WARP_ROWS))


def plans(p: Problem) -> tuple[tuple[Plan, ...], tuple[Plan, ...]]:
    """A call's forward and backward plans; where there are two, the first is for long sets."""
    return _forward_plans(p, True), _backward_plans(p)


def _forward_plans(p: Problem, keep: bool) -> tuple[Plan, ...]:
    at_once = STATE_AT_ONCE if p.return_state else LAZY_AT_ONCE if is_lazy(p, keep) else FORWARD_AT_ONCE
    return forward_plans(*_plan_sizes(p), at_once)


def _backward_plans(p: Problem) -> tuple[Plan, ...]:
    return backward_plans(*_plan_sizes(p), TILE_ELEMENTS if p.euclidean else BACKWARD_ELEMENTS)


def _plan_sizes(p: Problem) -> tuple[int, int | None, int, int, bool, Device]:
    packed = p.cu_seqlens is not None
    rows = p.rows if p.sets == 1 else None if packed else p.features.shape[1]
    ragged = (packed or p.lengths is not None) and _rows_fit_a_warp(p.features)
    return p.sets, rows, p.dim, p.features.itemsize, ragged, device_of(p.features)


def _rows_fit_a_warp(features: Tensor) -> bool:
    """Whether one warp sums a row in programs of four, too, so that these give the bits of those of one."""
    *sets, row, _ = features.stride()
    aligned = row % 16 == 0 and all(stride % 16 == 0 for stride in sets) and features.data_ptr() % 16 == 0
    return features.shape[-1] <= 32 or aligned


def forward(p: Problem, keep: bool, plans: Sequence[Plan] | None = None) -> Selected:
    """Launches by ``plans``, K + 1 where parts of a set meet between them; ``keep`` also saves what :func:`backward`
    reads."""
    if p.dim > MAX_DIM:
        raise ValueError(f'expected at most {MAX_DIM} columns for backend="triton", got {p.dim}')
    plans = plans or _forward_plans(p, keep)
    out = Selected.empty(p, keep, normalizers=True)
    slots = p.sets * plans[0].parts
    if p.sets == 0:
        return out

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return p.features.new_empty(shape, dtype=dtype)

    softmax, gaps, norms = out.kept or (None, None, new(p.rows))
    least, owners = out.state or (None, None)
    arguments = {
        **_given(p, out.indices),
        "start_ptr": _dense(p.start),
        "mask_ptr": _dense(p.mask),
        "limits_ptr": _dense(p.limits),
        "picked_ptr": out.features,
        "distances_ptr": out.distances,
        "indices_ptr": out.indices,
        "counts_ptr": out.counts,
        "softmax_ptr": softmax,
        "gaps_ptr": gaps,
        "least_ptr": least,
        "owners_ptr": owners,
        "norms_ptr": norms,
        "products_ptr": new(p.rows),
        "nearest_ptr": new(p.rows),
        "directions_ptr": new(slots, p.dim),
        "exponents_ptr": new(slots, dtype=torch.int32),
        "extremes_ptr": new(slots, dtype=torch.int32),
        "numbers_ptr": new(2, slots, 4),
        "winners_ptr": new(2, slots, dtype=torch.int32),
        "pickable_ptr": new(slots, dtype=torch.int32),
        "openings_ptr": new(slots),
    }
    given = p.k > 1 and (p.quality is not None or p.start is not None)
    with torch.cuda.device_of(p.features), side_stream(p.features, len(plans) > 1) as beside:
        for plan in plans:
            early = given and not plan.held  # a look at held rows costs less than the first pick's norm beforehand
            options = {"DISTINCT": p.distinct, "KEEP": keep, "STATE": p.return_state, "EARLY": early}
            build = plan.constants(p, HELD=plan.held, **options)
            with beside if plan is not plans[-1] else nullcontext():
                if plan.parts > 1 and is_lazy(p, keep):
                    first = plan._replace(split=LAUNCHES.value)
                    _launch(select_forward, p, first, EAGER_PICKS + 1, arguments, build._replace(SPLIT=LAUNCHES))
                    _launch_lazily(p, plan, arguments)
                else:
                    _launch(select_forward, p, plan, p.k + 1, arguments, build)
    return out


def is_lazy(p: Problem, keep: bool) -> bool:
    """Whether a call whose sets are split leaves out rows that cannot win: many picks from large sets, and neither a
    gradient nor the state asked for. Points of up to POINT columns are read as fast as what is known of them."""
    size = p.rows // max(p.sets, 1) * p.dim * p.features.itemsize
    large = p.dim > POINT and p.k >= LAZY_PICKS and size >= LAZY_BYTES
    return large and not (keep or p.return_state)


def _launch_lazily(p: Problem, plan: Plan, arguments: dict[str, Any]) -> None:
    """The picks from EAGER_PICKS on: one launch; or a launch a round, as many as there can be, of which those after the
    last do nothing."""
    slots, new = p.sets * plan.parts, p.features.new_empty
    own = {
        "tables_ptr": new((p.sets * p.k + slots, p.dim), dtype=torch.float32),
        "squares_ptr": new((p.sets * p.k + slots,), dtype=torch.float32),
        "met_ptr": new((p.rows,), dtype=torch.int32).fill_(EAGER_PICKS),
        "waiting_ptr": new((p.rows,), dtype=torch.int32),
        "rivals_ptr": new((2, slots), dtype=torch.int32).fill_(NO_ROW.value),
        "progress_ptr": new((slots, 2), dtype=torch.int32),
        "begin": EAGER_PICKS,
    }
    late = max(LATE_ROWS if p.dim <= LATE_COLUMNS else LATE_ROWS // 2, plan.block_n)
    build = plan.constants(p, DISTINCT=p.distinct, LATE=late)
    arguments = {name: value for name, value in arguments.items() if name not in NOT_LATE}
    rounds = 2 if p.seed is None and p.noise is None else 3
    _launch(select_lazily, p, plan, rounds * (p.k - EAGER_PICKS), arguments | own, build)


def backward(p: Problem, grad: Tensor, saved: Saved, plans: Sequence[Plan] | None = None) -> Gradients:
    """Launches by ``plans``, 2 K + 1 where parts of a set meet between them, and the sum of gamma's gradient."""
    plans = plans or _backward_plans(p)
    new, slots = saved.norms.new_empty, p.sets * plans[0].parts
    drows = torch.empty_like(p.features, memory_format=torch.contiguous_format)
    dquality, dgamma = new(p.rows), new(slots)
    if p.sets == 0:
        return Gradients(drows, dquality, dgamma.sum())
    arguments = {
        **_given(p, saved.indices),
        "grad_ptr": grad.contiguous(),
        "indices_ptr": saved.indices,
        "counts_ptr": saved.counts,
        "softmax_ptr": saved.softmax,
        "gaps_ptr": saved.gaps,
        "norms_ptr": saved.norms,
        "drows_ptr": drows,
        "dquality_ptr": dquality,
        "dgamma_ptr": dgamma,
        "arriving_ptr": new(p.sets, p.k, p.dim),
        "units_ptr": new(p.sets, p.k, p.dim),
        "dcos_ptr": new(max(1, p.k - 1), p.rows),
        **{name: new(p.rows) for name in ("min_grad_ptr", "prob_ptr", "slope_ptr", "dots_ptr")},
        "means_ptr": new(3, slots),
        "sums_ptr": new(slots, 2, p.dim),
        "totals_ptr": new(p.sets, 2, p.dim),
    }
    with torch.cuda.device_of(p.features), side_stream(p.features, len(plans) > 1) as beside:
        for plan in plans:
            columns = SUM_ELEMENTS * 32 * plan.warps // int(triton.next_power_of_2(plan.parts))
            columns = max(1, min(SUM_COLUMNS, columns))
            build = plan.constants(p, CHOSEN=p.by_quality, BLOCK_S=columns)
            with beside if plan is not plans[-1] else nullcontext():
                _launch(select_backward, p, plan, 2 * p.k + 1, arguments, build)
    return Gradients(drows, dquality, dgamma.sum())


def _dense(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _given(p: Problem, stand_in: Tensor) -> dict[str, Any]:
    """Arguments that both kernels take from the call; ``stand_in`` is any int64 tensor of the device."""
    packed = p.cu_seqlens is not None
    stride_set, stride_row = (0, p.features.stride(0)) if packed else p.features.stride()[:2]
    gamma_ptr, gamma_value = gamma_argument(p.gamma)
    tau_ptr, tau_value = gamma_argument(p.tau)
    seed_ptr, seed_value = seed_argument(p.seed, stand_in)
    return {
        "rows_ptr": p.features,
        "quality_ptr": _dense(p.quality),
        "gamma_ptr": gamma_ptr,
        "gamma_value": gamma_value,
        "tau_ptr": tau_ptr,
        "tau_value": tau_value,
        "noise_ptr": _dense(p.noise),
        "seed_ptr": seed_ptr,
        "seed_value": seed_value,
        "earlier_ptr": _dense(p.min_distances),
        "lengths_ptr": _dense(p.lengths),
        "cu_seqlens_ptr": _dense(p.cu_seqlens),
        "stride_set": stride_set,
        "stride_row": stride_row,
        "N": 0 if packed else p.features.shape[1],
        "C": p.dim,
        "K": p.k,
        "R": p.rows,
        "scale": p.distance_scale,
    }


def _launch(kernel: Any, p: Problem, plan: Plan, turns: int, arguments: dict[str, Any], build: Constants) -> None:
    """One launch, or a launch a turn; parts that cannot all run at once meet between launches, here and from now on."""
    cooperative = plan.split == COOPERATIVE.value
    barrier = counters(p.features, p.sets) if cooperative else None
    launch: Callable[..., None] = kernel[(plan.programs(p.sets),)]
    try:
        for turn in range(turns if plan.split == LAUNCHES.value else 1):
            launch(
                **arguments,
                barrier_ptr=barrier,
                sets=p.sets,
                parts=plan.parts,
                turn=turn,
                above=plan.last or plan.shortest - 1,
                longest=plan.longest,
                BUILD=build,
                **plan.options,
            )
    except RuntimeError as error:
        if not (cooperative and has_no_room(error, p.features)):
            raise
        warnings.warn(
            "a cooperative launch did not fit this GPU: large sets take a launch a step from now on", stacklevel=2
        )
        launches = plan._replace(split=LAUNCHES.value)
        _launch(kernel, p, launches, turns, arguments, build._replace(SPLIT=LAUNCHES))
