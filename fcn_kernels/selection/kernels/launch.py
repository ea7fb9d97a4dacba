"""The two launchers that the op calls."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from fcn_kernels.device.gpu import counters, gamma_argument, has_no_room, seed_argument, side_stream
from fcn_kernels.device.splits import COOPERATIVE, LAUNCHES
from fcn_kernels.selection.kernels.backward import select_backward
from fcn_kernels.selection.kernels.common import NO_ROW, Constants
from fcn_kernels.selection.kernels.forward import select_forward
from fcn_kernels.selection.kernels.lazy import select_lazily
from fcn_kernels.selection.kernels.plans import (
    FORWARD_AT_ONCE,
    POINT,
    WIDE,
    Plan,
    Sizes,
    backward_plans,
    forward_plans,
)
from fcn_kernels.selection.problem import Gradients, Problem, Saved, Selected

MAX_DIM = 4096  # a row must fit a program
STATE_AT_ONCE = 2  # with the state asked for: three left it 8 bytes short of registers on sm_80
LAZY_AT_ONCE = 2  # where rows that cannot win are left out: three left it 32 bytes short
LAZY_WIDE_AT_ONCE = 4  # the same of wide rows, of which a thread holds less,
LAZY_WIDE = 2048  # up to so many columns
LAZY_PICKS = 64  # from which on rows that cannot win are left out: EAGER_PICKS should be a small part of them
LAZY_BYTES = 2**26  # of a set's rows, to do so: a pass over fewer takes no longer than what parts have to exchange
EAGER_PICKS = 16  # made before: with fewer, distances still fall so far that most rows would have to be read
LATE_ROWS = 8  # of a tile that meets picks late, at the least; half as many wide ones
NOT_LATE = (  # what `select_forward` takes and `select_lazily` does not
    *("tau_ptr", "tau_value", "start_ptr", "mask_ptr", "softmax_ptr", "gaps_ptr", "least_ptr", "owners_ptr"),
    *("directions_ptr", "extremes_ptr", "openings_ptr"),
)
SUM_COLUMNS = 16  # 64 bytes a part: C = 512 is 64 parts' work
SUM_ELEMENTS = 32  # of a tile of the parts' sums that a thread holds


def plans(p: Problem) -> tuple[tuple[Plan, ...], tuple[Plan, ...]]:
    """A call's forward and backward plans; where there are two, the first is for long sets."""
    return _forward_plans(p, True), _backward_plans(p)


def _forward_plans(p: Problem, keep: bool) -> tuple[Plan, ...]:
    at_once = STATE_AT_ONCE if p.return_state else FORWARD_AT_ONCE
    if is_lazy(p, keep):
        at_once = LAZY_WIDE_AT_ONCE if WIDE < p.dim <= LAZY_WIDE else LAZY_AT_ONCE
    return forward_plans(Sizes.of(p), at_once)


def _backward_plans(p: Problem) -> tuple[Plan, ...]:
    return backward_plans(Sizes.of(p), p.euclidean)


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
            build = plan.constants(p, DISTINCT=p.distinct, KEEP=keep, STATE=p.return_state, EARLY=early)
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
    late = max(LATE_ROWS if p.dim <= WIDE else LATE_ROWS // 2, plan.block_n)
    build = plan.constants(p, DISTINCT=p.distinct, LATE=late)
    arguments = {name: value for name, value in arguments.items() if name not in NOT_LATE}
    rounds = 2 if p.seed is None and p.noise is None else 3
    _launch(select_lazily, p, plan, rounds * (p.k - EAGER_PICKS), arguments | own, build)


def backward(p: Problem, grad: Tensor, saved: Saved, plans: Sequence[Plan] | None = None) -> Gradients:
    """Launches by ``plans``, 2 K + 1 where parts of a set meet between them, and the sum of gamma's gradient."""
    plans = plans or _backward_plans(p)
    new, slots = saved.norms.new_empty, p.sets * plans[0].parts
    drows = torch.empty_like(p.features, memory_format=torch.contiguous_format)
    dquality, dgamma = new(p.quality_shape), new(slots)
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
        **{name: new(p.rows) for name in ("min_grad_ptr", "prob_ptr", "fixed_ptr", "slope_ptr", "dots_ptr")},
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
