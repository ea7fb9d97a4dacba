"""How compiled functions are found, given tensors and threads, and what their failures are in Python."""

import ctypes
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fcn_kernels import compiler

OUT_OF_MEMORY = 1
"""A status of the compiled functions; see calls.h."""
ROWS = {
    torch.float32: ("ROW=float",),
    torch.float64: ("ROW=double", "FLOAT64"),
    torch.bfloat16: ("ROW=bfloat16", "BFLOAT16"),
    torch.float16: ("ROW=_Float16", "FLOAT16"),
}
"""What a source is compiled with for rows of a dtype."""

_used = _forked = False


def _after_fork() -> None:
    # the team of threads that OpenMP had started is not in the child, which would wait for it
    global _forked
    _forked = _forked or _used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def why_unavailable(source: Path, dtype: torch.dtype) -> str:
    """Why a source cannot run for rows of this type, or "" if it can. Compiles on a machine's first call.

    ``FCN_KERNELS_CPP=0`` in the environment says that it cannot.
    """
    if os.environ.get("FCN_KERNELS_CPP") == "0":
        return "FCN_KERNELS_CPP=0"
    try:
        compiler.load(source, *ROWS[dtype])
    except compiler.NoCompilerError as error:
        return str(error)
    except compiler.CompilerError as error:
        warnings.warn(f"fcn_kernels runs on slower PyTorch operations: {error}", stacklevel=2)
        return str(error)
    return ""


def functions(source: Path, addresses: Mapping[str, int]) -> Callable[[str, torch.dtype], Callable[..., int]]:
    """The compiled functions of a source, by name and dtype of rows.

    Each takes two packed structs and so many addresses, by its name, and returns a status.
    """

    @functools.cache
    def function(name: str, dtype: torch.dtype) -> Callable[..., int]:
        found: Callable[..., int] = getattr(compiler.load(source, *ROWS[dtype]), name)
        found.restype = ctypes.c_int  # type: ignore[attr-defined]
        found.argtypes = [ctypes.c_char_p] * 2 + [ctypes.c_void_p] * addresses[name]  # type: ignore[attr-defined]
        return found

    return function


def threads() -> int:
    """How many a call may use; after this, a fork has one."""
    global _used
    _used = True
    return 1 if _forked else torch.get_num_threads()


def check_status(status: int, what: str) -> None:
    """Raise what a status stands for; ``what`` names the call."""
    if status:
        reason = "memory ran out" if status == OUT_OF_MEMORY else "an unexpected error occurred"
        raise (MemoryError if status == OUT_OF_MEMORY else RuntimeError)(f"{reason} in {what}")


def plain(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Contiguous, of the dtype; the tensor itself if it is."""
    if values is None or (values.dtype == dtype and values.is_contiguous()):
        return values
    return values.to(dtype).contiguous()


def addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    """For C++: 0 for None."""
    return [0 if t is None else t.data_ptr() for t in tensors]
