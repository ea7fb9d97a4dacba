# mypy: ignore-errors
"""The products of the blocks: by tensor cores where these are as precise as the rows are, and summed in float32."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fcn_kernels.device.constants import constants
from fcn_kernels.device.products import operand, product


class Product(NamedTuple):
    """How a kernel multiplies, handed on as one constant; other kernels' constants have these two, too."""

    OPERAND: tl.constexpr  # the type that factors are rounded to
    PRECISION: tl.constexpr


def how(dtype: torch.dtype) -> dict[str, Any]:
    """For a call with rows of this dtype."""
    kind, precision = operand(dtype)
    return {"OPERAND": kind, "PRECISION": precision}


def product_of(dtype: torch.dtype) -> Product:
    """The same as a kernel's constant."""
    return constants(Product, **how(dtype))


@triton.jit
def dot(a, b, onto, HOW: tl.constexpr):
    """a @ b, added to `onto`, if any."""
    return product(a, b, onto, HOW.OPERAND, HOW.PRECISION)
