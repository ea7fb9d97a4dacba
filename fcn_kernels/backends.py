"""Which backend a call goes to, and what it runs under. An operation says why its C++ cannot run here."""

import importlib.util
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

BACKENDS = ("triton", "cpp", "torch")
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

_PLAIN = (Tensor, Parameter)

Unavailable = Callable[[torch.dtype], str]
"""Why an operation's C++ cannot run for rows of a dtype, or ""; may compile it."""


def check_backend(backend: str | None) -> None:
    """Raise ValueError unless ``backend`` is the name of one, or None for the default."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f'expected backend "triton", "cpp", "torch" or None, got {backend!r}')


def resolve_backend(backend: str | None, features: Tensor, cpp_unavailable: Unavailable) -> str:
    """The backend that a call with these features goes to: "triton", "cpp", "torch" or "cpu".

    "cpu" is "cpp" where that can be compiled, else "torch". It is decided when the call runs (:func:`runs_on`), so that
    a call that was traced or exported asks the machine that it runs on.

    Raises:
        ValueError: there is no such backend.
        RuntimeError, TypeError: it cannot run here, or not for rows of this dtype.
    """
    check_backend(backend)
    device = features.device.type
    if backend is None:
        if device == "cpu":
            return "cpu"
        return "triton" if device == "cuda" and HAS_TRITON and features.dtype != torch.float64 else "torch"
    if backend == "triton":
        if not HAS_TRITON:
            raise RuntimeError('expected triton to be installed for backend="triton", and it is not')
        if not (device == "cuda" or INTERPRETED):
            raise RuntimeError(
                f'expected features on a CUDA device for backend="triton" (or TRITON_INTERPRET=1 set before '
                f"fcn_kernels is imported), got {features.device}"
            )
        if features.dtype == torch.float64:
            raise TypeError('expected float32, bfloat16 or float16 features for backend="triton", got float64')
    if backend == "cpp":
        if device != "cpu":
            raise RuntimeError(f'expected features on the CPU for backend="cpp", got {features.device}')
        if not torch.compiler.is_compiling() and (reason := cpp_unavailable(features.dtype)):
            raise RuntimeError(f'backend="cpp" is unavailable: {reason}')
    return backend


def runs_on(backend: str, dtype: torch.dtype, cpp_unavailable: Unavailable) -> str:
    """What a resolved backend is on this machine for rows of a dtype: "triton", "cpp" or "torch"."""
    if backend != "cpu":
        return backend
    return "torch" if cpp_unavailable(dtype) else "cpp"


def is_plain_call() -> bool:
    """Whether no compiler, tracer, transform, mode or profiler follows what this call does."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._profiler_enabled()
    )


def is_recorded() -> bool:
    """Whether operations are followed without their values: by a compiler, by make_fx, or on fake tensors."""
    if torch.compiler.is_compiling():
        return True
    modes = torch._C._TorchDispatchModeKey
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY)
    )


def is_under_vmap() -> bool:
    """Whether torch.func.vmap runs the call, so that a tensor may stand for many."""
    if not torch._C._are_functorch_transforms_active():
        return False
    levels = torch._C._functorch.get_interpreter_stack()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def are_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether none is of a subclass, or without memory, or memory of numbers whose sign is to be changed (what the
    imaginary part of a conjugate is), that an operator would have to be told of."""
    for t in tensors:  # noqa: SIM110 - `all` of a generator takes three times as long
        if t is not None and (type(t) not in _PLAIN or t.is_meta or t.is_neg()):
            return False
    return True


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether PyTorch's forward mode follows any of these: it takes a derivative that is not registered for 0."""
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Products in the dtype of their operands; without the cost of entering it where autocast is off anyway."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # which PyTorch cannot say of meta
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
