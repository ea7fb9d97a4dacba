"""What a launch has to know of a GPU, and how a call's numbers reach a kernel."""

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
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


COUNTERS = 1024  # that a stream has, or as many as a call wants, if that is more
INTERPRETER = Device(processors=8, cooperative=False)
COOPERATIVE_LAUNCH = 95  # CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH

_without_room: set[int] = set()
_counters: dict[tuple[int, int], Tensor] = {}


def device_of(features: Tensor) -> Device:
    """The device of a call; the interpreter, which runs programs one after another, passes for a small one."""
    if features.device.type != "cuda":
        return INTERPRETER
    index = features.get_device()
    processors = torch.cuda.get_device_properties(index).multi_processor_count
    return Device(processors, index not in _without_room and _cooperative(index))


@cache
def _cooperative(index: int) -> bool:
    """What the driver says of a device's cooperative launches."""
    if torch.version.hip is not None:  # atomics in a loop hang on some (triton-lang/triton issue 11037)
        return False
    value = ctypes.c_int(0)
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(value), COOPERATIVE_LAUNCH, index)
    except (OSError, AttributeError):
        return False
    return status == 0 and value.value == 1


def has_no_room(error: RuntimeError, features: Tensor) -> bool:
    """Whether a cooperative launch failed because its programs cannot all run at once, as where other processes have
    a share of the GPU. Remembered: no such launch is made on that device again."""
    if "cooperative" not in str(error).lower() and "too large" not in str(error).lower():
        return False
    _without_room.add(features.get_device())
    return True


@cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """Of a device, ahead of others: what runs there takes longest."""
    return torch.cuda.Stream(index, priority=-1)


@contextmanager
def side_stream(features: Tensor, used: bool) -> Iterator[AbstractContextManager[object]]:
    """A stream for launches that may run beside those on the current one; none where it is not ``used``.

    What came before on the current stream is done before they begin, and what comes after begins when they are done:
    their memory can be freed as if they had been on it.
    """
    if not (used and features.is_cuda):
        yield nullcontext()
        return
    current, side = torch.cuda.current_stream(), _side_stream(features.get_device())
    side.wait_stream(current)
    try:
        yield torch.cuda.stream(side)
    finally:
        current.wait_stream(side)


def counters(features: Tensor, sets: int) -> Tensor:
    """What the grid barriers of the next launch on the current stream count in, [at least ``sets``] int32.

    Barriers leave their counters ready for the next launch (see ``splits.grid_barrier``), so that these are cleared
    once, not by a kernel before each. Launches that share some must not run side by side: each stream has its own. A
    captured graph may run on any stream, beside others, and has some that its replays clear. A launch that was refused
    has counted nothing; after one that was aborted CUDA lets the process launch nothing more.
    """

    def new(count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=features.device)

    if not features.is_cuda or torch.cuda.is_current_stream_capturing():
        return new(sets)
    key = features.get_device(), torch.cuda.current_stream().cuda_stream
    if key not in _counters or _counters[key].numel() < sets:
        _counters[key] = new(max(sets, COUNTERS))
    return _counters[key]


def gamma_argument(gamma: Tensor) -> tuple[Tensor | None, float]:
    """(pointer, value): on the host it is passed by value, on the device it is read there, without a wait."""
    return (None, float(gamma)) if gamma.device.type == "cpu" else (gamma, 0.0)


def seed_argument(seed: Tensor | None, stand_in: Tensor) -> tuple[Tensor | None, int]:
    """(pointer, value) for the kernels' ``seed_of``; ``stand_in`` is any int64 tensor of the device."""
    if seed is None:
        return None, 0
    return (stand_in, int(seed)) if seed.device.type == "cpu" else (seed, -1)
