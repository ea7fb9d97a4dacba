"""Triton's interpreter without the half of its time in which it does over again what it has done.

At every call of a device function it looks through ``triton.language`` and replaces what it interprets there, which the
launch around it has replaced already. Here that happens once a launch. What kernels compute is the same.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_replace = interpreter._patch_lang
_replaced: set[Any] = set()
"""Modules in which the launch that runs has replaced what it interprets."""


class _Launch:
    """What a launch has replaced, and undoes when it ends; a device function undoes nothing."""

    def __init__(self, scope: Any = None) -> None:
        self.scope = scope

    def restore(self) -> None:
        if self.scope is not None:
            _replaced.clear()
            self.scope.restore()


@functools.cache
def _languages(function: FunctionType) -> frozenset[Any]:
    """The modules of Triton's language that a function of device code names."""
    return frozenset(value for value in function.__globals__.values() if value is tl or value is tl.core)


def _replace_once(function: FunctionType) -> _Launch:
    missing = _languages(function) - _replaced
    if _replaced and not missing:
        return _Launch()
    is_launch = not _replaced
    scope = _replace(function)
    _replaced.update(missing)
    return _Launch(scope if is_launch else None)


_make_numpy_dtype = interpreter._get_np_dtype
_numpy_dtype_of_numbers = functools.cache(_make_numpy_dtype)


def _numpy_dtype(dtype: tl.dtype) -> Any:
    """NumPy's, which every operation asks for, without a table made at each call; blocks are as what is in them."""
    of = dtype.scalar
    return _make_numpy_dtype(of) if isinstance(of, tl.pointer_type) else _numpy_dtype_of_numbers(of)


def replace_once_a_launch() -> None:
    """For all kernels that this process interprets from here on."""
    interpreter._patch_lang = _replace_once
    interpreter._get_np_dtype = _numpy_dtype
