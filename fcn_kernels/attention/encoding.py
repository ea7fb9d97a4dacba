"""The encoding of a row's norm: a sinusoid, as of a position in a sequence.

e(r)_2i = sin(2 pi r / 10000^(2i / C)), e(r)_2i+1 = cos of the same.
Source: Shapira and Keller, "FaceCoresetNet", AAAI 2024, section 3.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Waves(NamedTuple):
    """The sinusoid's constants per channel: e(r)_c = sin(r * frequency_c + phase_c)."""

    frequency: Tensor  # (C,), 2 pi / 10000^(2i / C) for both channels of pair i
    phase: Tensor  # (C,), 0 and pi / 2 in turn: sine and cosine

    @classmethod
    def of(cls, dim: int, dtype: torch.dtype, device: torch.device) -> "Waves":
        channel = torch.arange(dim, dtype=torch.float64, device="cpu")
        frequency = 2 * math.pi * 10000 ** (-2 * (channel // 2) / dim)
        return cls(*(table.to(device, dtype) for table in (frequency, channel % 2 * (math.pi / 2))))


waves = cache(Waves.of)  # for op bodies only: under tracing it would keep fake tensors


def sinusoid(norms: Tensor, table: Waves, out: Tensor | None = None) -> Tensor:
    """e(r), (...,) -> (..., C)."""
    # One sine over a contiguous buffer takes half the time of a sine and a cosine over strided halves.
    return torch.addcmul(table.phase, norms[..., None], table.frequency, out=out).sin_()


def sinusoid_backward(grad: Tensor, wave: Tensor, table: Waves) -> Tensor:
    """Gradient of the norms (...,) from that of their sinusoid `wave` (..., C)."""
    sine, cosine = wave[..., 0::2], wave[..., 1::2]
    return (grad[..., 0::2] * cosine - grad[..., 1::2] * sine) @ table.frequency[::2]
