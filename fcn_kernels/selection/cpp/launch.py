"""Coreset selection in C++: the backend of CPUs that have a compiler.

It saves what the torch backend saves, in the same form; ``select.cpp`` says how it works.
"""

import ctypes
import functools
import os
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcn_kernels import compiler
from fcn_kernels.selection.problem import Gradients, Problem, Saved, Selected
from fcn_kernels.sets import accumulator

OUT_OF_MEMORY = 1
"""A status of the compiled functions; see select.cpp."""
_SOURCE = Path(__file__).with_name("select.cpp")
_ROWS = {
    torch.float32: ("ROW=float",),
    torch.float64: ("ROW=double",),
    torch.bfloat16: ("ROW=bfloat16", "BFLOAT16"),
    torch.float16: ("ROW=_Float16", "FLOAT16"),
}


# Call and Selected of sets.h: addresses, 0 for what is not given; sizes; numbers. A quarter of the time that it would
# take ctypes.Structure.
_CALL, _SELECTED = struct.Struct("9P10q2d"), struct.Struct("7P")


_used = _forked = False


def _after_fork() -> None:
    # the team of threads that OpenMP had started is not in the child, which would wait for it
    global _forked
    _forked = _forked or _used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def unavailable(dtype: torch.dtype) -> str:
    """Why rows of this type cannot be selected from in C++, or "" if they can. Compiles on a machine's first call.

    ``FCN_KERNELS_CPP=0`` in the environment says that they cannot.
    """
    if os.environ.get("FCN_KERNELS_CPP") == "0":
        return "FCN_KERNELS_CPP=0"
    try:
        compiler.load(_SOURCE, *_ROWS[dtype])
    except compiler.NoCompilerError as error:
        return str(error)
    except compiler.CompilerError as error:
        warnings.warn(f"fcn_kernels runs on slower PyTorch operations: {error}", stacklevel=2)
        return str(error)
    return ""


def forward(p: Problem, keep: bool) -> Selected:
    """Select; with ``keep``, also keep what :func:`backward` reads."""
    out = Selected.empty(p, keep, normalizers=False)
    if p.sets:
        _run("forward", p, (*out[:4], *(out.kept or (None, None, None))))
    return out


def backward(p: Problem, grad: Tensor, saved: Saved) -> Gradients:
    """Straight-through gradients, given ``grad`` (B, K, C) of the picked rows."""
    dx = torch.empty_like(p.features, memory_format=torch.contiguous_format)
    dq, dgamma = torch.empty_like(saved.norms), saved.norms.new_zeros(())
    if p.sets:
        _run("backward", p, (None, None, *saved), _plain(grad, dq.dtype), dx, dq, dgamma)
    return Gradients(dx, dq, dgamma)


def _run(name: str, p: Problem, selected: Sequence[Tensor | None], *tensors: Tensor | None) -> None:
    accumulate = accumulator(p.features.dtype)
    inputs = (  # held until the call is over
        p.features,
        _plain(p.quality, accumulate),
        _plain(p.gamma, accumulate),
        _plain(p.noise, accumulate),
        p.seed,
        _plain(p.start, torch.int64),
        _plain(p.mask, torch.bool),
        _plain(p.lengths, torch.int64),
        _plain(p.cu_seqlens, torch.int64),
    )
    stride = p.features.stride()
    call = _CALL.pack(
        *map(_address, inputs),
        p.sets,
        p.features.shape[-2],
        p.rows,
        p.dim,
        p.k,
        stride[0],
        stride[-2],
        p.normalized,
        p.distinct,
        1 if _forked else torch.get_num_threads(),
        float(p.tau),
        float(p.distance_scale),
    )
    global _used
    _used = True
    function = _function(name, p.features.dtype)
    status = function(call, _SELECTED.pack(*map(_address, selected)), *map(_address, tensors))
    if status:
        what = "memory ran out" if status == OUT_OF_MEMORY else "an unexpected error occurred"
        raise (MemoryError if status == OUT_OF_MEMORY else RuntimeError)(
            f"{what} in coreset_select's C++ ({name}) for {p.sets} sets, {p.rows} rows of {p.dim} and k = {p.k}"
        )


def _plain(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if values is None or (values.dtype == dtype and values.is_contiguous()):
        return values
    return values.to(dtype).contiguous()


def _address(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr()


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    function = getattr(compiler.load(_SOURCE, *_ROWS[dtype]), name)
    function.restype = ctypes.c_int
    function.argtypes = [ctypes.c_char_p] * 2 + [ctypes.c_void_p] * (0 if name == "forward" else 4)
    return function  # type: ignore[no-any-return]
