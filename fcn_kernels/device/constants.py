"""What a kernel is built for, handed on as one constant."""

from functools import cache
from typing import Any, TypeVar

import triton.language as tl

Bundle = TypeVar("Bundle")


@cache
def constants(kind: type[Bundle], **values: Any) -> Bundle:
    """A NamedTuple of ``tl.constexpr``: each value a constant of its own, as shapes are tuples of such."""
    return kind(**{name: tl.constexpr(value) for name, value in values.items()})
