"""Launches of cluster_sums: the functions of ``torch_backend``, on the device."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fcn_kernels.clustering.kernels.pieces import add_pieces
from fcn_kernels.clustering.kernels.sums import Constants, share_backward, share_forward
from fcn_kernels.clustering.problem import Summed, Sums, SumsGradients
from fcn_kernels.device.constants import constants
from fcn_kernels.device.gpu import MOST_REGISTERS

ADD_WARPS = 4
# Loads ahead of the products would spill registers; three programs of 4 warps a multiprocessor hide each other's waits.
STAGES = 1
PIECE_ROWS = 64  # of a program; more where there are many centers, so that its sums stay small beside its rows
ADD_BLOCK = 512  # 16 bytes a thread
MOST_CENTERS = 64  # at a time


class Plan(NamedTuple):
    """How the rows of a set are divided: by the number of centers alone, so that no sum depends on the batch."""

    block_n: int
    block_m: int
    block_c: int
    piece: int
    warps: int

    @classmethod
    def of(cls, every: int) -> "Plan":
        """For so many centers, ghosts among them. Built for sm_80, sm_90 and sm_100, these blocks spill no register."""
        up = int(triton.next_power_of_2(every))
        block_m, piece = min(MOST_CENTERS, max(16, up)), max(PIECE_ROWS, 4 * up)
        return cls(16, block_m, 32, piece, 8) if block_m == MOST_CENTERS else cls(32, block_m, 32, piece, 4)

    def slots(self, rows: int, sets: int) -> int:
        """The most pieces that there can be."""
        return rows // self.piece + sets

    def constants(self, check: bool) -> Constants:
        """What a kernel is built for."""
        return constants(  # type: ignore[no-any-return]
            Constants, CHECK=check, BLOCK_N=self.block_n, BLOCK_M=self.block_m, BLOCK_C=self.block_c, PIECE=self.piece
        )

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told beside the kernel's own constants."""
        return {"num_warps": self.warps, "num_stages": STAGES, **MOST_REGISTERS}


def sums_forward(p: Sums) -> Summed:
    """Shares and a sum for each piece; then, where a set may have several, these are added."""
    new, sets, width = p.weight.new_empty, p.lengths.shape[0], 0 if p.keys is None else p.keys.shape[1]
    out = Summed(new(sets, p.centers, p.values.shape[1]), new(sets, p.centers, width), new(sets, p.centers))
    share(p, out, new(p.values.shape[0], p.centers), check=True)
    return out


def share(p: Sums, out: Summed, shares: Tensor, check: bool, gap: int = 0, fewest: int = 0) -> None:
    """Fill in the sums and the shares (T, M). Not `check`: `valid` says which rows are finite.

    After each set's keys stand `gap` others. Sets that have fewer than `fewest` with these are left as they are.
    """
    plan, sets, rows = Plan.of(p.weight.shape[0]), p.lengths.shape[0], p.values.shape[0]
    if sets == 0:
        return
    slots = plan.slots(rows, sets) if rows > plan.piece else 0  # of sets that have more than one
    partial = Summed(*(t.new_empty(slots, *t.shape[1:]) for t in out))
    with torch.cuda.device_of(p.values):
        share_forward[(plan.slots(rows, sets),)](
            **_given(p, gap),
            shares_ptr=shares,
            sums_ptr=out.sums,
            key_sums_ptr=out.key_sums,
            masses_ptr=out.masses,
            sums_partial_ptr=partial.sums,
            key_sums_partial_ptr=partial.key_sums,
            masses_partial_ptr=partial.masses,
            fewest=fewest,
            BUILD=plan.constants(check),
            **plan.options,
        )
        if slots:
            blocks = sum(triton.cdiv(t[0].numel(), ADD_BLOCK) for t in out)
            add_pieces[(sets, blocks)](
                offsets_ptr=p.offsets,
                lengths_ptr=p.lengths,
                sums_ptr=out.sums,
                key_sums_ptr=out.key_sums,
                masses_ptr=out.masses,
                sums_partial_ptr=partial.sums,
                key_sums_partial_ptr=partial.key_sums,
                masses_partial_ptr=partial.masses,
                T=rows,
                C=out.sums.shape[2],
                D=out.key_sums.shape[2],
                M=p.centers,
                PIECE=plan.piece,
                BLOCK=ADD_BLOCK,
                num_warps=ADD_WARPS,
            )


def sums_backward(p: Sums, grad: Summed, wanted: bool) -> SumsGradients:
    """The shares again, and what arrives taken back through them. Not `wanted`: the values are frozen."""
    return share_gradients(p, grad, wanted, check=True)


def share_gradients(
    p: Sums, grad: Summed, wanted: bool, check: bool, norms: Tensor | None = None, gap: int = 0
) -> SumsGradients:
    """One launch, and the weights' gradients added. With norms (T,) the scale is 1 / (norm + 1e-5).

    After each set's keys stand `gap` others, with a gradient of 0.
    """
    plan, sets, rows, every = Plan.of(p.weight.shape[0]), p.lengths.shape[0], p.values.shape[0], p.weight.shape[0]
    new, slots = p.weight.new_empty, plan.slots(rows, sets) if sets else 0
    values = p.values.new_empty(p.values.shape if wanted else 0)
    keys = new(0) if p.keys is None else p.keys.new_zeros(p.keys.shape) if gap else new(p.keys.shape)
    scale = new(0) if p.scale is None or norms is not None else new(rows)
    weights, biases = new(slots, *p.weight.shape), new(slots, every)
    if slots:
        with torch.cuda.device_of(p.values):
            share_backward[(slots,)](
                **_given(p, gap),
                norms_ptr=norms,
                grad_sums_ptr=grad.sums.contiguous(),
                grad_key_sums_ptr=grad.key_sums.contiguous(),
                grad_masses_ptr=grad.masses.contiguous(),
                shares_ptr=new(rows, every),
                through_ptr=new(rows, every),
                dvalues_ptr=values if wanted else None,
                dkeys_ptr=None if p.keys is None else keys,
                dscale_ptr=scale if scale.numel() else None,
                dweight_ptr=weights,
                dbias_ptr=biases,
                BUILD=plan.constants(check),
                **plan.options,
            )
    return SumsGradients(values, keys, scale, weights.sum(0), biases.sum(0))


def _given(p: Sums, gap: int) -> dict[str, Any]:
    """Arguments that both kernels take from the call."""
    values = p.values if p.values.stride(1) == 1 else p.values.contiguous()
    keys = p.keys if p.keys is None or p.keys.stride(1) == 1 else p.keys.contiguous()
    return {
        "values_ptr": values,
        "keys_ptr": keys,
        "scale_ptr": None if p.scale is None else p.scale.contiguous(),
        "valid_ptr": None if p.valid is None else p.valid.contiguous(),
        "weight_ptr": p.weight.contiguous(),
        "bias_ptr": p.bias.contiguous(),
        "offsets_ptr": p.offsets.contiguous(),
        "lengths_ptr": p.lengths.contiguous(),
        "value_stride": values.stride(0),
        "key_stride": 0 if keys is None else keys.stride(0),
        "T": values.shape[0],
        "C": values.shape[1],
        "D": values.shape[1] if keys is None else keys.shape[1],
        "every": p.weight.shape[0],
        "M": p.centers,
        "sets": p.lengths.shape[0],
        "KEY_GAP": gap,
    }
