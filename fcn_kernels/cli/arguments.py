"""What the commands share: kinds of arguments, checks before the work, and how a command ends."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fcn_kernels.files.formats import InputError

EXIT_STATUS = "Exit status: 0 done, 1 could not write or compute, 2 bad usage or input, 130 or more interrupted."


def run_to_status(command: str, work: Callable[[], str], interrupted: str | Callable[[], str]) -> int:
    """Run a command's work and print its summary, or what was wrong; returns the status of ``EXIT_STATUS``.

    Args:
        command: its name, for messages.
        work: what it does; returns the summary.
        interrupted: what to say of its output after Ctrl-C, or what finds that out.
    """
    try:
        with _unwinding_on_signals():
            if summary := work():
                print(summary)
        return 0
    except ValueError as error:  # InputError among them
        message, status = str(error), 2
    except (OSError, FloatingPointError) as error:
        message, status = str(error), 1
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        message, status = f"not enough memory: {str(error) or 'an allocation failed'}".splitlines()[0], 1
    except KeyboardInterrupt:
        message, status = f"interrupted; {interrupted() if callable(interrupted) else interrupted}", 130
    print(f"python -m fcn_kernels {command}: {message}", file=sys.stderr)
    return status


def check_device(device: str) -> None:
    """Raise InputError unless numbers can be put on the device and had back."""
    try:
        torch.ones(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from error


def at_least_one(text: str) -> int:
    """A count, also written as 1e6."""
    try:
        value = int(text)
    except ValueError:
        try:
            value = int(float(text)) if float(text).is_integer() else 0
        except ValueError:
            value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def finite(text: str) -> float:
    """A number."""
    value = _number(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
    return value


def positive(text: str) -> float:
    """A number above 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def chance(text: str) -> float:
    """A probability."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, got {text}")
    return value


def seed(text: str) -> int:
    """What PyTorch's generators take."""
    try:
        value = int(text)
    except ValueError:
        value = -(2**64)
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(f"expected a whole number from -2^63 to 2^64 - 1, got {text}")
    return value


def add_max_unpacked(parser: argparse.ArgumentParser) -> None:
    """Declare the limit that :class:`fcn_kernels.files.formats.Scratch` has, in bytes."""
    parser.add_argument(
        "--max-unpacked",
        type=lambda text: round(min(positive(text) * 2**30, sys.maxsize)),
        default=64 << 30,
        metavar="GIB",
        help="most that a packed column may become on disk (default: 64)",
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text}") from None


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


@contextmanager
def _unwinding_on_signals() -> Iterator[None]:
    """Let signals that would end the process at once raise SystemExit instead, so that nothing is left behind."""

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [s for s in (getattr(signal, name) for name in names) if signal.getsignal(s) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
