"""The code of a row's norm: one of 61 steps from three standard deviations below the mean norm to three above.

    c = trunc(10 clip((r - mean) / sqrt(variance + 1e-5), -3, 3)) + 30

Code 30 is two steps wide, as truncation is towards zero. Backends count edges instead of dividing, so that all of them
give the same integers.
"""

import torch
from torch import Tensor

from fcn_kernels.clustering.problem import CODES

_STEPS = CODES // 2  # to each side of the mean
_EPS = 1e-5


def norm_edges(mean: Tensor, variance: Tensor, dtype: torch.dtype) -> Tensor:
    """The least norms, in dtype, of codes 1 to 60: (60,), rising. The code of r is the number of edges <= r."""
    step = torch.arange(1, _STEPS + 1, dtype=torch.float64, device=mean.device) / 10
    width = (variance.double() + _EPS).sqrt() * step
    above, below = mean.double() + width, mean.double() - width.flip(0)
    # up to the next number of dtype: r at the edge has the upper code above the mean, and not yet below it
    up, down = above.to(dtype), below.to(dtype)
    infinity = torch.full_like(up, torch.inf)
    up = torch.where(up.double() < above, torch.nextafter(up, infinity), up)
    down = torch.where(down.double() <= below, torch.nextafter(down, infinity), down)
    return torch.cat([down, up])


def norm_codes(norms: Tensor, edges: Tensor) -> Tensor:
    """Codes of norms (...,), int64."""
    return torch.bucketize(norms.to(edges.dtype).contiguous(), edges, right=True)


def code_table(dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(61, dim): row p is sin(p w_j), cos(p w_j) interleaved, w_j = 10000^(-2j / dim)."""
    angle = torch.arange(CODES, dtype=torch.float64)[:, None] * 10000 ** (
        -torch.arange(0, dim, 2, dtype=torch.float64) / dim
    )
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(dtype)
