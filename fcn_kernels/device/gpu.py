"""What a launch has to know of a GPU, and how a call's numbers reach a kernel."""

from typing import NamedTuple

import torch
from torch import Tensor

# Left alone, ptxas spills a few registers of the backward kernel to fit one more program on an SM.
MOST_REGISTERS = {"maxnreg": 255} if torch.version.hip is None else {}


class Device(NamedTuple):
    """What a launch has to know of a GPU."""

    processors: int
    cooperative: bool
    """Programs of one launch can wait for each other."""


INTERPRETER = Device(processors=8, cooperative=False)


def device_of(features: Tensor) -> Device:
    """The device of a call; the interpreter, which runs programs one after another, passes for a small one."""
    if features.device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(features.device)
    return Device(properties.multi_processor_count, torch.version.hip is None and properties.major >= 7)


def gamma_argument(gamma: Tensor) -> tuple[Tensor | None, float]:
    """(pointer, value): on the host it is passed by value, on the device it is read there, without a wait."""
    return (None, float(gamma)) if gamma.device.type == "cpu" else (gamma, 0.0)


def seed_argument(seed: Tensor | None, stand_in: Tensor) -> tuple[Tensor | None, int]:
    """(pointer, value) for the kernels' ``seed_of``; ``stand_in`` is any int64 tensor of the device."""
    if seed is None:
        return None, 0
    return (stand_in, int(seed)) if seed.device.type == "cpu" else (seed, -1)
