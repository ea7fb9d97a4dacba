"""Launch geometry of set attention, computed once for a call, and the two launchers that the op calls."""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fcn_kernels.attention.inputs import Arriving, Gradients, Inputs, Outputs
from fcn_kernels.attention.kernels.attention import attention_backward, attention_forward
from fcn_kernels.attention.kernels.merge import merge_parts
from fcn_kernels.device.gpu import MOST_REGISTERS, device_of, seed_argument
from fcn_kernels.device.products import operand

# Loads in flight ahead of the products; ahead in the backward kernel, they spill on sm_80.
FORWARD_STAGES = 3
BACKWARD_STAGES = 1
# Of a program that puts parts together: a block of them at a time.
MERGED_PARTS, MERGED_COLUMNS, MERGING_WARPS = 32, 64, 4


class Plan(NamedTuple):
    """How the kernels are launched: programs per set, the sizes of a block, and warps of a program."""

    parts: int
    block_n: int
    block_h: int
    block_c: int
    warps: int


def make_plan(
    sets: int, rows: int, queries: int, dtype: torch.dtype, processors: int, *, backward: bool = False
) -> Plan:
    """For so many sets with `rows` rows in all, on a device of so many multiprocessors.

    Built for sm_80, sm_90 and sm_100 by Triton 3.6 and 3.7, these blocks spill no register up to 64 queries, and larger
    ones do. Two programs of four warps fit a multiprocessor and hide each other's waits; of eight there would be one.
    Tiles are low and wide where sets are no longer, or where there are fewer tiles than multiprocessors: what a tile
    costs is its barriers, some for each block of columns. Blocks make loads of 16 bytes a thread in every dtype.
    """
    block_h = max(32, triton.next_power_of_2(queries))
    mean = triton.cdiv(rows, max(1, sets))
    low, high = max(16, 1024 // block_h), max(16, 2048 // block_h)
    if dtype == torch.float32:  # its products run on the scalar units, from registers
        block_n, block_c, warps = low, low, 8
    elif backward:
        block_n, block_c, warps = low, 32, 4
    elif block_h == 32 and (mean <= low or sets * triton.cdiv(mean, high) <= processors):
        block_n, block_c, warps = low, 64, 4
    else:
        block_n, block_c, warps = high, 32, 4
    programs = 2 * processors // max(1, sets)
    return Plan(max(1, min(programs, triton.cdiv(mean, block_n))), block_n, block_h, block_c, warps)


def forward(p: Inputs, plan: Plan | None = None) -> Outputs:
    """One launch, and where sets have several parts another that puts them together."""
    (sets, count, dim), new = p.queries.shape, p.queries.new_empty
    plan = plan or plan_of(p)
    parts = Outputs(
        out=new(sets, plan.parts, count, dim),
        weight_sum=new(sets, plan.parts, count),
        lse=new(sets, plan.parts, count),
    )
    pointers = {f"{name}_ptr": tensor for name, tensor in parts._asdict().items()}
    _launch(attention_forward, p, plan, pointers, stages=FORWARD_STAGES)
    if plan.parts == 1:
        return Outputs(*(tensor[:, 0] for tensor in parts))
    whole = Outputs(out=new(sets, count, dim), weight_sum=new(sets, count), lse=new(sets, count))
    pointers |= {f"whole_{name}_ptr": tensor for name, tensor in whole._asdict().items()}
    if whole.out.numel():
        with torch.cuda.device_of(whole.out):
            merge_parts[(sets * count, triton.cdiv(dim, MERGED_COLUMNS))](
                **pointers,
                C=dim,
                H=count,
                parts=plan.parts,
                BLOCK_P=MERGED_PARTS,
                BLOCK_C=MERGED_COLUMNS,
                num_warps=MERGING_WARPS,
            )
    return whole


def backward(p: Inputs, arriving: Arriving, plan: Plan | None = None) -> Gradients:
    """One launch, and the sums over parts and sets."""
    (sets, count, dim), new = p.queries.shape, p.queries.new_empty
    plan = plan or plan_of(p, backward=True)
    parts = Gradients(
        queries=new(sets, plan.parts, count, dim),
        features=p.features.new_empty(p.features.shape),
        quality=torch.empty_like(p.quality),
        encoding_weight=new(sets, plan.parts, dim),
    )
    pointers = {
        "lse_ptr": arriving.lse.contiguous(),
        "grad_ptr": arriving.out.contiguous(),
        "grad_weight_sum_ptr": arriving.weight_sum.contiguous(),
        "delta_ptr": arriving.delta.contiguous(),
        "dqueries_ptr": parts.queries,
        "drows_ptr": parts.features,
        "dquality_ptr": parts.quality,
        "dweight_ptr": parts.encoding_weight,
    }
    _launch(attention_backward, p, plan, pointers, stages=BACKWARD_STAGES)
    return parts._replace(queries=parts.queries.sum(1), encoding_weight=parts.encoding_weight.sum((0, 1)))


def plan_of(p: Inputs, *, backward: bool = False) -> Plan:
    """Of a call."""
    (sets, count, _), rows = p.queries.shape, p.features.shape[0]
    return make_plan(sets, rows, count, p.features.dtype, device_of(p.features).processors, backward=backward)


def _launch(kernel: Any, p: Inputs, plan: Plan, pointers: dict[str, Tensor], stages: int) -> None:
    sets, count, dim = p.queries.shape
    if sets == 0:
        return
    features = p.features if p.features.stride(1) == 1 else p.features.contiguous()
    seed_ptr, seed_value = seed_argument(p.seed, p.offsets)
    multiplied, precision = operand(features.dtype)
    with torch.cuda.device_of(features):
        kernel[(sets * plan.parts,)](
            queries_ptr=p.queries.contiguous(),
            rows_ptr=features,
            quality_ptr=p.quality.contiguous(),
            weight_ptr=p.encoding_weight.contiguous(),
            turns_ptr=_turns(dim, features.device),
            offsets_ptr=p.offsets.contiguous(),
            lengths_ptr=p.lengths.contiguous(),
            seed_ptr=seed_ptr,
            seed_value=seed_value,
            **pointers,
            stride_row=features.stride(0),
            T=features.shape[0],
            C=dim,
            H=count,
            parts=plan.parts,
            threshold=p.threshold,
            keep_scale=1 / (1 - p.dropout),
            eps=p.encoding_eps,
            DROPOUT=p.seed is not None,
            OPERAND=multiplied,
            PRECISION=precision,
            BLOCK_N=plan.block_n,
            BLOCK_H=plan.block_h,
            BLOCK_C=plan.block_c,
            num_warps=plan.warps,
            num_stages=stages,
            **MOST_REGISTERS,
        )


@cache
def _turns(dim: int, device: torch.device) -> Tensor:
    """Turns of each pair of channels per unit of norm, 10000^(-2i / dim), rounded once from float64."""
    return (10000 ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)).to(device, torch.float32)
