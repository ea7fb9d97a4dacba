"""Time of the head on the CPU, against the form that projects every row: `python -m benchmarks.checks.head_time`.

Exits with 1 where the head is less than five times as fast as the projected form at 8,000 rows.
"""

import sys
from time import perf_counter

import torch
from torch import nn
from torch.nn import functional as F

from fcn_kernels import CoresetAggregator
from reference.head import ReferenceHead

SHAPES = ((20, 20), (1, 2000), (1, 8000))  # sets and rows of 512 columns
ROUNDS = 9
LEAST = 5.0


def times(heads: list[nn.Module], sets: int, rows: int) -> list[float]:
    """Seconds of each head in inference, in turns; of the run that the machine disturbed least."""
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(sets, rows, 512, generator=generator), dim=-1)
    quality = torch.rand(sets, rows, generator=generator) * 20 + 5
    best = [float("inf")] * len(heads)
    with torch.no_grad():
        for _ in range(ROUNDS):
            for i, head in enumerate(heads):
                begin = perf_counter()
                head(features, quality)
                best[i] = min(best[i], perf_counter() - begin)
    return best


def main() -> int:
    """Print a line for each shape."""
    # One thread: with more, a busy neighbor holds up every one of the many short operations at its barrier.
    torch.set_num_threads(1)
    heads: list[nn.Module] = [ReferenceHead(512, 3).eval(), CoresetAggregator(512, 3).eval()]
    for sets, rows in SHAPES:
        projected, ours = times(heads, sets, rows)
        ratio = projected / ours
        print(f"({sets}, {rows}, 512): projected {projected * 1e3:.1f} ms, ours {ours * 1e3:.1f} ms, {ratio:.1f} times")
    return int(ratio < LEAST)


if __name__ == "__main__":
    sys.exit(main())
