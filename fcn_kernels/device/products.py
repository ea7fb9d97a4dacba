# mypy: ignore-errors
"""Products on the device: in what type rows of a dtype are multiplied, and how."""

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# The fewest rows of a product that Triton gives to wgmma on sm_90.
WGMMA_ROWS = tl.constexpr(64)


def operand(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """What the products of rows of a dtype run in, and how.

    What is multiplied can leave float16's range (q f where the norm is above 65,504; gradients); tf32 has float16's
    precision and float32's range. AMD's products take no tf32 on every device.
    """
    if dtype == torch.bfloat16:
        return tl.bfloat16, "ieee"
    return tl.float32, "tf32" if dtype == torch.float16 and torch.version.hip is None else "ieee"


@triton.jit
def product(a, b, onto, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """onto + a b, summed in float32, from operands rounded to OPERAND.

    With fewer than 64 rows Triton uses mma.sync on sm_90, else wgmma with `a` in registers, which ptxas before 13.3
    may reuse before the product has read them (Triton issue 9433). So the side with fewer is made the rows.
    """
    a, b = a.to(OPERAND), b.to(OPERAND)
    if INTERPRETED:
        # whose dot takes bfloat16 for integers; in float32 the products of the same values are the same
        a, b = a.to(tl.float32), b.to(tl.float32)
    if a.shape[0] >= WGMMA_ROWS and b.shape[1] < WGMMA_ROWS:
        if onto is not None:
            onto = tl.trans(onto)
        result = tl.trans(tl.dot(tl.trans(b), tl.trans(a), onto, input_precision=PRECISION))
    else:
        result = tl.dot(a, b, onto, input_precision=PRECISION)
    return result
