"""Coreset selection in C++: the backend of CPUs that have a compiler.

It saves what the torch backend saves, in the same form; ``select.cpp`` says how it works.
"""

import ctypes
import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcn_kernels.cpp import compiler
from fcn_kernels.problem import Gradients, Problem, Saved, Selected
from fcn_kernels.rows import accumulator

_SOURCE = Path(__file__).with_name("select.cpp")
_ROWS = {
    torch.float32: ("ROW=float",),
    torch.float64: ("ROW=double",),
    torch.bfloat16: ("ROW=bfloat16", "BFLOAT16"),
    torch.float16: ("ROW=_Float16", "FLOAT16"),
}


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("features", "quality", "noise", "seed", "start", "mask", "lengths")),
        ("cu_seqlens", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("sets", "rows", "all_rows", "dim", "k", "set_stride", "row_stride")),
        *((name, ctypes.c_int64) for name in ("normalized", "distinct", "threads")),
        *((name, ctypes.c_double) for name in ("gamma", "tau", "distance_scale")),
    )


class _Selected(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in Selected._fields)


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
    """Select; with ``keep``, also save what :func:`backward` reads (else those tensors are empty)."""
    out = Selected.empty(p, keep, normalizers=False)
    if p.sets:
        kept = [t.data_ptr() if keep else None for t in out[4:]]
        _run("forward", p, _Selected(*(t.data_ptr() for t in out[:4]), *kept))
    return out


def backward(p: Problem, grad: Tensor, saved: Saved) -> Gradients:
    """Straight-through gradients, given ``grad`` (B, K, C) of the picked rows."""
    dx = torch.empty_like(p.features, memory_format=torch.contiguous_format)
    dq, dgamma = torch.empty_like(saved.norms), saved.norms.new_zeros(())
    if p.sets:
        grad = grad.to(saved.norms.dtype).contiguous()
        kept = _Selected(None, None, *(t.data_ptr() for t in saved))
        _run("backward", p, kept, *(t.data_ptr() for t in (grad, dx, dq, dgamma)))
    return Gradients(dx, dq, dgamma)


def _run(name: str, p: Problem, kept: _Selected, *pointers: int) -> None:
    accumulate = accumulator(p.features.dtype)
    tensors = (  # held until the call is over
        p.features,
        _plain(p.quality, accumulate),
        _plain(p.noise, accumulate),
        p.seed,
        _plain(p.start, torch.int64),
        _plain(p.mask, torch.bool),
        _plain(p.lengths, torch.int64),
        _plain(p.cu_seqlens, torch.int64),
    )
    stride = p.features.stride()
    call = _Call(
        *(None if t is None else t.data_ptr() for t in tensors),
        p.sets,
        p.features.shape[-2],
        p.rows,
        p.dim,
        p.k,
        stride[0],
        stride[-2],
        p.normalized,
        p.distinct,
        torch.get_num_threads(),
        float(p.gamma),
        p.tau,
        p.distance_scale,
    )
    _function(name, p.features.dtype)(ctypes.byref(call), ctypes.byref(kept), *pointers)


def _plain(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else values.to(dtype).contiguous()


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    function = getattr(compiler.load(_SOURCE, *_ROWS[dtype]), name)
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * (2 if name == "forward" else 6)
    return function  # type: ignore[no-any-return]
