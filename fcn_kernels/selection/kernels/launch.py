"""Launch geometry, computed once for a call, and the two launchers that the op calls.

`forward_plan` and `backward_plan` are pure functions of sizes, so that the tests can build every configuration that
a launch would use on a machine without a GPU.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from fcn_kernels.device.gpu import MOST_REGISTERS, Device, device_of, gamma_argument, seed_argument
from fcn_kernels.device.splits import COOPERATIVE, LAUNCHES, WHOLE
from fcn_kernels.selection.kernels import tune
from fcn_kernels.selection.kernels.backward import select_backward
from fcn_kernels.selection.kernels.common import RAGGED, RESIDENT_TIER, STREAMING_TIER
from fcn_kernels.selection.kernels.forward import select_forward
from fcn_kernels.selection.problem import Gradients, Problem, Saved, Selected

TIERS = {RESIDENT_TIER.value: "resident", STREAMING_TIER.value: "streaming", RAGGED.value: "ragged"}

# Bytes of a tile's rows that a thread holds. Twice as many spill; `python -m benchmarks.checks.builds` prints what the
# compiler makes of every launch.
FORWARD_BYTES = 256
BACKWARD_BYTES = 128
# Elements of one where registers go elsewhere: to what a streamed set carries along and its parts exchange, or to
# vectors of over WIDE columns.
TIGHT_BACKWARD_ELEMENTS = 32
SPLIT_ELEMENTS = 64
WIDE = 2048
WRITE_ELEMENTS = 8  # of a tile of gradients, which stands beside its rows
# 16 warps leave a thread 128 registers, and so many bytes beside what else a step holds want up to 255.
MOST_WARPS = 8
STREAMING_WARPS = 4  # several programs an SM keep more loads in flight than one large one
STREAMING_ROWS = 256
AT_ONCE = 2  # programs of 4 warps and 255 registers a thread on an SM
SPLIT_ROWS = 32  # a part with less work than that costs more at the barrier than it saves
MAX_DIM = 4096  # a row must fit a program
SCALAR_ROWS = 1024
SUM_COLUMNS = 16  # 64 bytes a part: C = 512 is 64 parts' work
SUM_ELEMENTS = 32  # of a tile of the parts' sums that a thread holds

Result = TypeVar("Result")


class Plan(NamedTuple):
    """How a kernel is launched: the constants it is built with, and how many programs share a set."""

    tier: int
    block_n: int
    block_c: int
    warps: int
    parts: int = 1
    split: int = WHOLE.value

    @property
    def name(self) -> str:
        """resident, streaming or ragged, and how a set is divided."""
        meeting = {COOPERATIVE.value: "at barriers", LAUNCHES.value: "between launches"}.get(self.split)
        return TIERS[self.tier] + (f", split into {self.parts} parts that meet {meeting}" if meeting else "")

    @property
    def block_p(self) -> int:
        """Places for one number of each part."""
        return int(triton.next_power_of_2(self.parts))

    @property
    def options(self) -> dict[str, Any]:
        """What Triton is told beside the kernel's own constants."""
        cooperative = {"launch_cooperative_grid": True} if self.split == COOPERATIVE.value else {}
        return {"num_warps": self.warps, **(MOST_REGISTERS if self.warps <= 8 else {}), **cooperative}


def forward_plan(
    sets: int, rows: int | None, dim: int, itemsize: int, ragged: bool, device: Device, held: int = FORWARD_BYTES
) -> Plan:
    """The forward launch for ``sets`` sets of up to ``rows`` rows (None: known on the device alone).

    Rows are of ``dim`` numbers of ``itemsize`` bytes; a thread holds ``held`` bytes of them.

    A set that fits the registers of a program is resident. Sets that are too few to fill the device are split, if
    each part still gets SPLIT_ROWS rows. Where lengths are on the device (``ragged``) each set decides by its own.
    """
    elements = held // itemsize
    return _plan(sets, rows, dim, ragged, device, elements, elements, hold_parts=True)


def backward_plan(
    sets: int, rows: int | None, dim: int, itemsize: int, ragged: bool, device: Device, held: int = BACKWARD_BYTES
) -> Plan:
    """As :func:`forward_plan`."""
    elements = held // itemsize if dim <= WIDE else TIGHT_BACKWARD_ELEMENTS
    return _plan(sets, rows, dim, ragged, device, elements, TIGHT_BACKWARD_ELEMENTS, hold_parts=False)


def _plan(
    sets: int, rows: int | None, dim: int, ragged: bool, device: Device, elements: int, streamed_elements: int,
    hold_parts: bool,
) -> Plan:  # fmt: skip
    block_c = max(16, triton.next_power_of_2(dim))
    warp = elements * 32
    parts, split = 1, WHOLE
    if rows is not None:
        block_n = max(2, triton.next_power_of_2(rows))
        if block_n * block_c <= warp * MOST_WARPS:
            return Plan(RESIDENT_TIER.value, block_n, block_c, max(1, block_n * block_c // warp))
        parts = min(device.processors // max(sets, 1), rows // SPLIT_ROWS)
        if parts > 1:
            split = COOPERATIVE if device.cooperative else LAUNCHES
            block_n = triton.next_power_of_2(triton.cdiv(rows, parts))
            if hold_parts and split == COOPERATIVE and block_n * block_c <= warp * MOST_WARPS:
                return Plan(RESIDENT_TIER.value, block_n, block_c, MOST_WARPS, parts, split.value)
    warp = min(streamed_elements, streamed_elements if split == WHOLE else SPLIT_ELEMENTS) * 32
    warps = max(STREAMING_WARPS, min(MOST_WARPS, 2 * block_c // warp))
    if rows is not None and split != WHOLE:
        # 255 registers a thread, the most there can be, still let this many programs run on an SM at once
        parts = max(1, min(parts * (8 // warps), rows // SPLIT_ROWS))
    block_n = max(2, min(warp * warps // block_c, STREAMING_ROWS))
    tier = RAGGED if ragged and split == WHOLE else STREAMING_TIER
    return Plan(tier.value, block_n, block_c, warps, max(parts, 1), split.value)


def plans(p: Problem) -> tuple[Plan, Plan]:
    """The forward and the backward plan of a call, by rule."""
    sizes = _plan_sizes(p)
    return forward_plan(*sizes), backward_plan(*sizes)


def _plan_sizes(p: Problem) -> tuple[int, int | None, int, int, bool, Device]:
    packed = p.cu_seqlens is not None
    rows = p.rows if p.sets == 1 else None if packed else p.features.shape[1]
    return p.sets, rows, p.dim, p.features.itemsize, packed or p.lengths is not None, device_of(p.features)


def forward(p: Problem, keep: bool) -> Selected:
    """One launch, or K + 1 where parts of a set meet between them; ``keep`` also saves what :func:`backward` reads."""
    _check(p)
    return _planned(p, forward_plan, FORWARD_BYTES, keep, lambda plan: _forward(p, keep, plan))


def backward(p: Problem, grad: Tensor, saved: Saved) -> Gradients:
    """One launch, or 2 K + 1 where parts of a set meet between them, and the sum of gamma's gradient over the sets."""
    return _planned(p, backward_plan, BACKWARD_BYTES, True, lambda plan: _backward(p, grad, saved, plan))


def _planned(p: Problem, plan_for: Callable[..., Plan], held: int, keep: bool, run: Callable[[Plan], Result]) -> Result:
    """Run with the plan that the rule gives, or with the fastest if tuning is on."""
    sizes = _plan_sizes(p)
    plan = plan_for(*sizes)
    if tune.ENABLED and p.sets:
        candidates = list(dict.fromkeys((plan, plan_for(*sizes, held // 2), plan_for(*sizes, held // 4))))
        key = (plan_for.__name__, *sizes, p.k, keep, p.features.dtype, p.features.device)
        plan = tune.fastest(key, candidates, run)
    return run(plan)


def _forward(p: Problem, keep: bool, plan: Plan) -> Selected:
    streams, divided = plan.tier != RESIDENT_TIER.value, plan.split != WHOLE.value
    new, sets, slots = p.features.new_empty, p.sets, p.sets * plan.parts
    out = Selected.empty(p, keep, normalizers=True)
    if sets == 0:
        return out
    softmax, gaps, norms = out.kept or (None, None, new(p.rows, dtype=torch.float32) if streams or divided else None)
    with torch.cuda.device_of(p.features):
        arguments = (
            p.features,
            p.quality,
            *gamma_argument(p.gamma),
            p.noise,
            *seed_argument(p.seed, out.indices),
            p.start,
            p.mask,
            p.lengths,
            p.cu_seqlens,
            _order(p, plan),
            out.features,
            out.distances,
            out.indices,
            out.counts,
            softmax,
            gaps,
            norms,
            new(p.rows, dtype=torch.float32) if streams else None,
            new(2, slots, 3, dtype=torch.float32) if divided else None,
            new(2, slots, dtype=torch.int32) if divided else None,
            new(slots, dtype=torch.int32) if divided else None,
            new(slots, dtype=torch.float32) if divided else None,
            _barriers(p, plan),
            plan.parts,
        )
        for turn in range(_launches(plan, p.k + 1)):
            select_forward[(slots,)](
                *arguments,
                turn,
                *_sizes(p),
                SEEDED=p.seed is not None,
                NORMALIZED=p.normalized,
                DISTINCT=p.distinct,
                KEEP=keep,
                EARLY=p.k > 1 and (p.quality is not None or p.start is not None),
                TIER=plan.tier,
                SPLIT=plan.split,
                BLOCK_N=plan.block_n,
                BLOCK_C=plan.block_c,
                BLOCK_P=plan.block_p,
                BLOCK_R=SCALAR_ROWS,
                **plan.options,
            )
    return out


def _backward(p: Problem, grad: Tensor, saved: Saved, plan: Plan) -> Gradients:
    streams, divided = plan.tier != RESIDENT_TIER.value, plan.split != WHOLE.value
    empty, sets, slots = saved.norms.new_empty, p.sets, p.sets * plan.parts
    drows = torch.empty_like(p.features, memory_format=torch.contiguous_format)
    dquality = empty(p.rows)
    dgamma = empty(slots)
    if sets == 0:
        return Gradients(drows, dquality, dgamma.sum())
    with torch.cuda.device_of(p.features):
        arguments = (
            p.features,
            p.quality,
            *gamma_argument(p.gamma),
            p.noise,
            *seed_argument(p.seed, saved.indices),
            p.lengths,
            p.cu_seqlens,
            _order(p, plan),
            grad.contiguous(),
            saved.indices,
            saved.counts,
            saved.softmax,
            saved.gaps,
            saved.norms,
            drows,
            dquality,
            dgamma,
            empty(sets, p.k, p.dim),
            empty(p.k - 1, p.rows),
            empty(p.rows) if streams else None,
            empty(p.rows),
            empty(3, slots) if divided else None,
            empty(slots, 2, p.dim) if divided else None,
            empty(sets, 2, p.dim) if divided else None,
            _barriers(p, plan),
            plan.parts,
        )
        for turn in range(_launches(plan, 2 * p.k + 1)):
            select_backward[(slots,)](
                *arguments,
                turn,
                *_sizes(p),
                SEEDED=p.seed is not None,
                NORMALIZED=p.normalized,
                CHOSEN=p.start is None,
                TIER=plan.tier,
                SPLIT=plan.split,
                BLOCK_N=plan.block_n,
                BLOCK_W=min(plan.block_n, max(1, WRITE_ELEMENTS * 32 * plan.warps // plan.block_c)),
                BLOCK_C=plan.block_c,
                BLOCK_R=SCALAR_ROWS,
                BLOCK_P=plan.block_p,
                BLOCK_S=max(1, min(SUM_COLUMNS, SUM_ELEMENTS * 32 * plan.warps // plan.block_p)),
                **plan.options,
            )
    return Gradients(drows, dquality, dgamma.sum())


def _launches(plan: Plan, steps: int) -> int:
    return steps if plan.split == LAUNCHES.value else 1


def _order(p: Problem, plan: Plan) -> Tensor | None:
    """Sets of lengths known on the device alone, longest first: a long one that starts last keeps all others waiting.

    Only where they do not all run at once. At IJB-C's size on 264 programs, simulated, a call takes 1.00 times an
    even split's time instead of 1.74.
    """
    if plan.tier != RAGGED.value or p.sets <= AT_ONCE * device_of(p.features).processors:
        return None
    lengths = p.lengths if p.cu_seqlens is None else p.cu_seqlens.diff()
    return None if lengths is None else lengths.argsort(descending=True)


def _barriers(p: Problem, plan: Plan) -> Tensor | None:
    if plan.split != COOPERATIVE.value:
        return None
    return torch.zeros(p.sets, dtype=torch.int32, device=p.features.device)


def _sizes(p: Problem) -> tuple[Any, ...]:
    """stride_set, stride_row, N, C, K, R, tau, scale."""
    packed = p.cu_seqlens is not None
    stride_set, stride_row = (0, p.features.stride(0)) if packed else p.features.stride()[:2]
    n = 0 if packed else p.features.shape[1]
    return stride_set, stride_row, n, p.dim, p.k, p.rows, float(p.tau), p.distance_scale


def _check(p: Problem) -> None:
    if p.dim > MAX_DIM:
        raise ValueError(f'expected at most {MAX_DIM} columns for backend="triton", got {p.dim}')
