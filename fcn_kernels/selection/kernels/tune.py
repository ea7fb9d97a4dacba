"""Opt-in: on a size's first call, time the plans that could serve it, and keep the fastest for this process.

The launcher's own choice is a rule, the same on every run. With FCN_KERNELS_AUTOTUNE=1 in the environment it is only
the first candidate; what is picked does not depend on the plan, but the last bits of sums do.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from triton.testing import do_bench

ENABLED = os.environ.get("FCN_KERNELS_AUTOTUNE") == "1"
MILLISECONDS = 20  # of runs of each candidate

Choice = TypeVar("Choice")
_fastest: dict[Hashable, object] = {}


def measure(run: Callable[[], object]) -> float:
    """Median device time of a call, milliseconds."""
    return float(do_bench(run, warmup=MILLISECONDS // 4, rep=MILLISECONDS, return_mode="median"))


def fastest(key: Hashable, candidates: Sequence[Choice], run: Callable[[Choice], object]) -> Choice:
    """The candidate that ``run`` is fastest with, timed once for each ``key``; the first while a graph is captured."""
    if key not in _fastest:
        if len(candidates) == 1 or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return candidates[0]
        times = [measure(lambda candidate=candidate: run(candidate)) for candidate in candidates]  # type: ignore[misc]
        _fastest[key] = candidates[times.index(min(times))]
    return _fastest[key]  # type: ignore[return-value]
