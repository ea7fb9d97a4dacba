"""Ctrl-C while ``python -m fcn_kernels`` is still importing: a sentence and status 130, as a command's own."""

import os
import signal
import sys
from typing import Any


def say_so() -> None:
    """Take Ctrl-C until :func:`restore`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def restore() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: Any) -> None:
    print("python -m fcn_kernels: interrupted", file=sys.stderr, flush=True)
    os._exit(130)  # an exception would pass through what is half imported
