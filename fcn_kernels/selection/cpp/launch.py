"""Coreset selection in C++: the backend of CPUs that have a compiler.

It saves what the torch backend saves, in the same form; ``select.cpp`` says how it works.
"""

import functools
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fcn_kernels.cpp import calls
from fcn_kernels.selection.problem import Gradients, Problem, Saved, Selected
from fcn_kernels.sets import accumulator

_SOURCE = Path(__file__).with_name("select.cpp")
_function = calls.functions(_SOURCE, {"forward": 0, "backward": 4})

# Call and Selected of sets.h: addresses, 0 for what is not given; sizes; numbers. A quarter of the time that it would
# take ctypes.Structure.
_CALL, _SELECTED = struct.Struct("11P11q2d"), struct.Struct("9P")


@functools.cache
def unavailable(dtype: torch.dtype) -> str:
    """Why rows of this type cannot be selected from in C++, or "" if they can."""
    return calls.why_unavailable(_SOURCE, dtype)


def forward(p: Problem, keep: bool) -> Selected:
    """Select; with ``keep``, also keep what :func:`backward` reads."""
    out = Selected.empty(p, keep, normalizers=False)
    if p.sets:
        _run("forward", p, (*out[:4], *(out.kept or (None,) * 3), *(out.state or (None,) * 2)))
    return out


def backward(p: Problem, grad: Tensor, saved: Saved) -> Gradients:
    """Straight-through gradients, given ``grad`` (B, K, C) of the picked rows."""
    dx = torch.empty_like(p.features, memory_format=torch.contiguous_format)
    dq, dgamma = torch.empty_like(saved.norms), saved.norms.new_zeros(())
    if p.sets:
        _run("backward", p, (None, None, *saved, None, None), calls.plain(grad, dq.dtype), dx, dq, dgamma)
    return Gradients(dx, dq, dgamma)


def _run(name: str, p: Problem, selected: Sequence[Tensor | None], *tensors: Tensor | None) -> None:
    accumulate = accumulator(p.features.dtype)
    inputs = (  # held until the call is over
        p.features,
        calls.plain(p.quality, accumulate),
        calls.plain(p.gamma, accumulate),
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
        *map(calls.address, inputs),
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
        float(p.tau),
        float(p.distance_scale),
    )
    function = _function(name, p.features.dtype)
    status = function(call, _SELECTED.pack(*map(calls.address, selected)), *map(calls.address, tensors))
    sizes = f"{p.sets} sets, {p.rows} rows of {p.dim} and k = {p.k}"
    calls.check_status(status, f"coreset_select's C++ ({name}) for {sizes}")
