"""Coreset selection in C++: the backend of CPUs that have a compiler.

It saves what the torch backend saves, in the same form; ``select.cpp`` says how it works.
"""

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fcn_kernels.cpp import calls
from fcn_kernels.group import gather
from fcn_kernels.selection.problem import Gradients, Problem, Saved, Selected
from fcn_kernels.selection.ranks import Pool, Ranks
from fcn_kernels.sets import accumulator

_SOURCE = Path(__file__).with_name("select.cpp")
_function = calls.functions(_SOURCE, {"forward": 0, "backward": 4})

# Call and Selected of sets.h: addresses, 0 for what is not given; sizes; numbers. A quarter of the time that it would
# take ctypes.Structure.
_CALL, _SELECTED = struct.Struct("13P11qd"), struct.Struct("9P")


@functools.cache
def unavailable(dtype: torch.dtype) -> str:
    """Why rows of this type cannot be selected from in C++, or "" if they can."""
    return calls.why_unavailable(_SOURCE, dtype)


def forward(p: Problem, keep: bool, ranks: Ranks | None = None) -> Selected:
    """Select; with ``keep``, also keep what :func:`backward` reads. Other ``ranks`` may have rows of the sets, too;
    softmaxes are without their denominators then."""
    out = Selected.empty(p, keep, normalizers=False)
    if p.sets:
        selected = (*out[:4], *(out.kept or (None,) * 3), *(out.state or (None,) * 2))
        _run("forward", p, selected, others=None if ranks is None else _Others(p, ranks))
    return out


def backward(p: Problem, grad: Tensor, saved: Saved) -> Gradients:
    """Straight-through gradients, given ``grad`` (B, K, C) of the picked rows."""
    new = saved.norms.new_empty
    dx = torch.empty_like(p.features, memory_format=torch.contiguous_format)
    dq, dgamma = new(*p.quality_shape), new(())  # a torch.Size, not unpacked, takes as long as both
    if p.sets == 0:
        dgamma.zero_()
    else:
        _run("backward", p, (None, None, *saved, None, None), calls.plain(grad, dq.dtype), dx, dq, dgamma)
    return Gradients(dx, dq, dgamma)


class _Others:
    """How C++ reaches the other ranks: by calls back to here. The first error in one ends the call."""

    class Struct(ctypes.Structure):
        """Ranks of sets.h."""

        _fields_ = (
            ("first", ctypes.c_void_p),
            ("ballot", ctypes.c_void_p),
            ("ballots", ctypes.c_void_p),
            ("world", ctypes.c_int64),
            ("size", ctypes.c_int64),
            ("pool", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_double))),
            ("agree", ctypes.CFUNCTYPE(ctypes.c_int)),
        )

    def __init__(self, p: Problem, ranks: Ranks) -> None:
        self.ranks, world = ranks, dist.get_world_size(ranks.group)
        self.error: BaseException | None = None
        size = 2 * accumulator(p.features.dtype).itemsize + 8 + p.dim * p.features.itemsize
        self.ballot = torch.zeros(size, dtype=torch.uint8, device="cpu")
        self.ballots = torch.zeros(world, size, dtype=torch.uint8, device="cpu")
        pool, agree = (kind(function) for (_, kind), function in zip(
            self.Struct._fields_[5:], (self._guarded(self._pool), self._guarded(self._agree)), strict=True
        ))  # fmt: skip
        places = (tensor.data_ptr() for tensor in (ranks.first, self.ballot, self.ballots))
        self.struct = self.Struct(*places, world, size, pool, agree)

    def _guarded(self, function: Callable[..., None]) -> Callable[..., int]:
        def call(*args: object) -> int:
            try:
                function(*args)
            except BaseException as error:  # also Ctrl-C: none may pass through C++
                self.error = error
                return 1
            return 0

        return call

    def _pool(self, rows: "ctypes._Pointer[ctypes.c_double]") -> None:
        ours = torch.tensor([*rows[:3], 0.0], dtype=torch.float64, device="cpu")[:, None]
        for i, value in enumerate(torch.cat(self.ranks.pool(Pool(*ours)))[:3].tolist()):
            rows[i] = value

    def _agree(self) -> None:
        gather(self.ballot, self.ranks.group, self.ballots)


def _run(
    name: str, p: Problem, selected: Sequence[Tensor | None], *tensors: Tensor | None, others: _Others | None = None
) -> None:
    accumulate = accumulator(p.features.dtype)
    inputs = (  # held until the call is over
        p.features,
        calls.plain(p.quality, accumulate),
        calls.plain(p.gamma, accumulate),
        calls.plain(p.tau, accumulate),
        calls.plain(p.noise, accumulate),
        p.seed,
        calls.plain(p.start, torch.int64),
        calls.plain(p.mask, torch.bool),
        calls.plain(p.lengths, torch.int64),
        calls.plain(p.cu_seqlens, torch.int64),
        calls.plain(p.limits, torch.int64),
        calls.plain(p.min_distances, accumulate),
    )
    stride = p.features.stride()
    call = _CALL.pack(
        *calls.addresses(inputs),
        0 if others is None else ctypes.addressof(others.struct),
        p.sets,
        p.features.shape[-2],
        p.rows,
        p.dim,
        p.k,
        stride[0],
        stride[-2],
        p.normalized,
        p.distinct,
        p.euclidean,
        calls.threads(),
        p.distance_scale,
    )
    function = _function(name, p.features.dtype)
    status = function(call, _SELECTED.pack(*calls.addresses(selected)), *calls.addresses(tensors))
    if others is not None and others.error is not None:
        raise others.error
    if status:
        sizes = f"{p.sets} sets, {p.rows} rows of {p.dim} and k = {p.k}"
        calls.check_status(status, f"coreset_select's C++ ({name}) for {sizes}")
