"""Jobs that run the package on real data: the handwritten digits that scikit-learn carries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Seed torch, and keep it to one thread on the CPU meanwhile.

    The last digits of a sum depend on the number of threads, and images of 8 x 8 pixels give a second one
    nothing to do (on two cores the selection demo took 17.6 s with one thread and 16.5 s with two).
    """
    threads = torch.get_num_threads()
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
