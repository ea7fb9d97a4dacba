"""Launch geometry, computed once for a call, and the two launchers that the op calls.

`forward_plan` and `backward_plan` are pure functions of sizes, so that the tests can build every configuration that
a launch would use on a machine without a GPU.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fcn_kernels.kernels.backward import select_backward
from fcn_kernels.kernels.common import RAGGED, RESIDENT_TIER, STREAMING_TIER
from fcn_kernels.kernels.forward import select_forward
from fcn_kernels.problem import Gradients, Problem, Saved, Selected

TIERS = {RESIDENT_TIER.value: "resident", STREAMING_TIER.value: "streaming", RAGGED.value: "ragged"}

# Elements of a tile that a thread holds. Twice as many spill registers on one target or another; the table of what
# the compiler makes of every launch is `python -m benchmarks.builds`.
FORWARD_ELEMENTS = 64
BACKWARD_ELEMENTS = 32
WRITE_ELEMENTS = 16  # of a tile of gradients, which stands beside its rows
# 16 warps leave a thread 128 registers, and 64 elements beside what else a step holds want up to 255.
FORWARD_WARPS = 8
BACKWARD_WARPS = 8
STREAMING_WARPS = 4  # several programs an SM keep more loads in flight than one large one
STREAMING_ROWS = 256
# Left alone, ptxas spills a few registers of the backward kernel to fit one more program on an SM.
MOST_REGISTERS = {"maxnreg": 255} if torch.version.hip is None else {}
MAX_DIM = 4096  # a row must fit a program
SCALAR_ROWS = 1024


class Plan(NamedTuple):
    """How a kernel is launched: the constants it is built with."""

    tier: int
    block_n: int
    block_c: int
    warps: int

    @property
    def name(self) -> str:
        """resident, streaming or ragged."""
        return TIERS[self.tier]

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told beside the kernel's own constants."""
        return {"num_warps": self.warps, **(MOST_REGISTERS if self.warps <= 8 else {})}


def forward_plan(rows: int | None, dim: int, ragged: bool) -> Plan:
    """``rows``: of the longest set, None where the lengths are on the device; ``ragged``: sets of unequal lengths."""
    return _plan(rows, dim, ragged, FORWARD_ELEMENTS, FORWARD_WARPS)


def backward_plan(rows: int | None, dim: int, ragged: bool) -> Plan:
    """As :func:`forward_plan`."""
    return _plan(rows, dim, ragged, BACKWARD_ELEMENTS, BACKWARD_WARPS)


def _plan(rows: int | None, dim: int, ragged: bool, elements: int, most_warps: int) -> Plan:
    block_c = max(16, triton.next_power_of_2(dim))
    warp = elements * 32
    if rows is not None:
        block_n = max(2, triton.next_power_of_2(rows))
        if block_n * block_c <= warp * most_warps:
            warps = max(1, block_n * block_c // warp)
            return Plan(RESIDENT_TIER.value, block_n, block_c, warps)
    warps = max(STREAMING_WARPS, min(most_warps, 2 * block_c // warp))
    block_n = max(2, min(warp * warps // block_c, STREAMING_ROWS))
    return Plan((RAGGED if ragged else STREAMING_TIER).value, block_n, block_c, warps)


def plans(p: Problem) -> tuple[Plan, Plan]:
    """The forward and the backward plan of a call."""
    rows = None if p.cu_seqlens is not None else p.features.shape[1]
    ragged = p.cu_seqlens is not None or p.lengths is not None
    return forward_plan(rows, p.dim, ragged), backward_plan(rows, p.dim, ragged)


def forward(p: Problem, keep: bool) -> Selected:
    """One launch, a program a set; ``keep`` also saves what :func:`backward` reads."""
    _check(p)
    plan = plans(p)[0]
    streams = plan.tier != RESIDENT_TIER.value
    new, sets = p.features.new_empty, p.sets
    saved_rows = p.rows if keep else 0
    out = Selected(
        features=new(sets, p.k, p.dim),
        distances=new(sets, p.k, dtype=torch.float32),
        indices=new(sets, p.k, dtype=torch.int64),
        counts=new(sets, dtype=torch.int64),
        log_normalizers=new(sets, p.k if keep else 0, dtype=torch.float32),
        gaps=new(p.k - 1 if keep else 0, saved_rows, dtype=torch.float32),
        norms=new(saved_rows, dtype=torch.float32),
    )
    marks = new(p.rows, dtype=torch.float32) if streams and not keep else out.norms
    nearest = new(p.rows, dtype=torch.float32) if streams else None
    if sets:
        with torch.cuda.device_of(p.features):
            select_forward[(sets,)](
                p.features,
                p.quality,
                *_scalar(p.gamma, float),
                p.noise,
                *_scalar(p.seed, int),
                p.start,
                p.mask,
                p.lengths,
                p.cu_seqlens,
                out.features,
                out.distances,
                out.indices,
                out.counts,
                out.log_normalizers,
                out.gaps,
                marks,
                nearest,
                *_sizes(p),
                SEEDED=p.seed is not None,
                NORMALIZED=p.normalized,
                DISTINCT=p.distinct,
                KEEP=keep,
                TIER=plan.tier,
                BLOCK_N=plan.block_n,
                BLOCK_C=plan.block_c,
                **plan.options,
            )
    return out


def backward(p: Problem, grad: Tensor, saved: Saved) -> Gradients:
    """One launch, a program a set, and the sum of gamma's gradient over the sets."""
    plan = plans(p)[1]
    streams = plan.tier != RESIDENT_TIER.value
    empty, sets = saved.norms.new_empty, p.sets
    drows = torch.empty_like(p.features, memory_format=torch.contiguous_format)
    dquality = empty(p.rows)
    dgamma = empty(sets)
    if sets:
        with torch.cuda.device_of(p.features):
            select_backward[(sets,)](
                p.features,
                p.quality,
                *_scalar(p.gamma, float),
                p.noise,
                *_scalar(p.seed, int),
                p.lengths,
                p.cu_seqlens,
                grad.contiguous(),
                saved.indices,
                saved.counts,
                saved.log_normalizers,
                saved.gaps,
                saved.norms,
                drows,
                dquality,
                dgamma,
                empty(sets, p.k, p.dim),
                empty(p.k - 1, p.rows),
                empty(p.rows) if streams else None,
                empty(p.rows),
                *_sizes(p),
                SEEDED=p.seed is not None,
                NORMALIZED=p.normalized,
                CHOSEN=p.start is None,
                TIER=plan.tier,
                BLOCK_N=plan.block_n,
                BLOCK_W=min(plan.block_n, max(1, WRITE_ELEMENTS * 32 * plan.warps // plan.block_c)),
                BLOCK_C=plan.block_c,
                BLOCK_R=SCALAR_ROWS,
                **plan.options,
            )
    return Gradients(drows, dquality, dgamma.sum())


def _sizes(p: Problem) -> tuple[Any, ...]:
    """stride_set, stride_row, N, C, K, R, tau, scale."""
    packed = p.cu_seqlens is not None
    stride_set, stride_row = (0, p.features.stride(0)) if packed else p.features.stride()[:2]
    n = 0 if packed else p.features.shape[1]
    return stride_set, stride_row, n, p.dim, p.k, p.rows, p.tau, p.distance_scale


def _scalar(value: Tensor | None, kind: type) -> tuple[Tensor | None, Any]:
    """(pointer, value): a scalar on the host is passed by value, one on the device is read there, without a wait."""
    if value is None:
        return None, kind(0)
    if value.device.type == "cpu":
        return None, kind(value)
    return value, kind(0)


def _check(p: Problem) -> None:
    if p.dim > MAX_DIM:
        raise ValueError(f'expected at most {MAX_DIM} columns for backend="triton", got {p.dim}')
