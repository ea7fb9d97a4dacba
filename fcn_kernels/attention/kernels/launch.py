"""Launch geometry of set attention, computed once for a call, and the two launchers that the op calls."""

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fcn_kernels.attention.inputs import Arriving, Gradients, Inputs, Outputs
from fcn_kernels.attention.kernels.attention import attention_backward, attention_forward
from fcn_kernels.device.gpu import MOST_REGISTERS, device_of, seed_argument

WARPS = 8
# Loads in flight ahead of the products; ahead in the backward kernel, they spill on sm_80.
FORWARD_STAGES = 3
BACKWARD_STAGES = 1


class Plan(NamedTuple):
    """How the kernels are launched: programs a set, and the sizes of a block."""

    splits: int
    block_n: int
    block_h: int
    block_c: int


def plan(sets: int, rows: int, queries: int, dtype: torch.dtype, processors: int) -> Plan:
    """For so many sets with `rows` rows in all, on a device of so many multiprocessors.

    Built for sm_80, sm_90 and sm_100, these blocks spill no register up to 64 queries, and larger ones do. Blocks of
    32 columns make loads of 16 bytes a thread in every dtype.
    """
    block_h = max(32, triton.next_power_of_2(queries))
    single = dtype == torch.float32  # its products run on the scalar units, from registers
    block_n = max(16, (1024 if single else 2048) // block_h)
    block_c = max(16, 1024 // block_h) if single else 32
    mean = triton.cdiv(rows, max(1, sets))
    programs = triton.cdiv(2 * processors, max(1, sets))  # two a multiprocessor hide each other's waits
    return Plan(max(1, min(programs, triton.cdiv(mean, block_n))), block_n, block_h, block_c)


def forward(p: Inputs) -> Outputs:
    """One launch, and the parts of each set put together."""
    (sets, count, dim), new = p.queries.shape, p.queries.new_empty
    splits = _plan(p).splits
    parts = Outputs(new(sets, splits, count, dim), new(sets, splits, count), new(sets, splits, count))
    _launch(attention_forward, p, parts, stages=FORWARD_STAGES)
    if splits == 1:
        return Outputs(*(tensor[:, 0] for tensor in parts))
    whole = parts.lse.logsumexp(1)
    share = (parts.lse - whole[:, None]).exp().masked_fill(parts.lse == -torch.inf, 0)
    return Outputs((parts.out * share[..., None]).sum(1), (parts.weight_sum * share).sum(1), whole)


def backward(p: Inputs, arriving: Arriving) -> Gradients:
    """One launch, and the sums over parts and sets."""
    (sets, count, dim), new = p.queries.shape, p.queries.new_empty
    splits = _plan(p).splits
    parts = Gradients(
        queries=new(sets, splits, count, dim),
        features=p.features.new_empty(p.features.shape),
        quality=torch.empty_like(p.quality),
        encoding_weight=new(sets, splits, dim),
    )
    _launch(attention_backward, p, (*(t.contiguous() for t in arriving), *parts), stages=BACKWARD_STAGES)
    return parts._replace(queries=parts.queries.sum(1), encoding_weight=parts.encoding_weight.sum((0, 1)))


def _plan(p: Inputs) -> Plan:
    (sets, count, _), rows = p.queries.shape, p.features.shape[0]
    return plan(sets, rows, count, p.features.dtype, device_of(p.features).processors)


def _launch(kernel: Any, p: Inputs, tensors: Iterable[Tensor], stages: int) -> None:
    (sets, count, dim), chosen = p.queries.shape, _plan(p)
    if sets == 0:
        return
    features = p.features if p.features.stride(1) == 1 else p.features.contiguous()
    with torch.cuda.device_of(features):
        kernel[(sets * chosen.splits,)](
            p.queries.contiguous(),
            features,
            p.quality.contiguous(),
            p.encoding_weight.contiguous(),
            _turns(dim, features.device),
            p.offsets,
            p.lengths,
            *seed_argument(p.seed, p.offsets),
            *tensors,
            features.stride(0),
            features.shape[0],
            dim,
            count,
            chosen.splits,
            p.threshold,
            1 / (1 - p.dropout),
            p.encoding_eps,
            DROPOUT=p.seed is not None,
            PRECISION="ieee",
            BLOCK_N=chosen.block_n,
            BLOCK_H=chosen.block_h,
            BLOCK_C=chosen.block_c,
            num_warps=WARPS,
            num_stages=stages,
            **MOST_REGISTERS,
        )


@cache
def _turns(dim: int, device: torch.device) -> Tensor:
    """Turns of each pair of channels a unit of norm, 10000^(-2i / dim), rounded once from float64."""
    return (10000 ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)).to(device, torch.float32)
