"""How evenly a packed launch loads a GPU: programs start in order, each when a place on an SM is free.

    python -m benchmarks.balance

A simulation, not a measurement: a set takes as long as it has rows. It is why the launcher starts packed sets longest
first, for the price of a sort on the device.
"""

import heapq
import sys
from collections.abc import Iterable, Sequence

from benchmarks.workloads import IJBC_ROWS, IJBC_SETS, template_lengths

PLACES = 132 * 2  # an H100's SMs, two programs of 4 warps and up to 255 registers a thread each


def slowdown(lengths: Iterable[int], places: int = PLACES) -> float:
    """Time of the launch over the time of an even split of all rows."""
    lengths = tuple(lengths)
    busy = [0] * places
    for length in lengths:
        heapq.heapreplace(busy, busy[0] + length)
    return max(busy) * places / sum(lengths)


def table(lengths: Sequence[int]) -> Iterable[str]:
    """Markdown: as given, longest first, and longest last, which is the worst order there is."""
    rising = sorted(lengths)
    yield "| order of the sets | time, of that of an even split |"
    yield "|---|---|"
    for name, order in (("as given", lengths), ("longest first", rising[::-1]), ("longest last", rising)):
        yield f"| {name} | {slowdown(order):.3f} |"


def main() -> int:
    """Print the table for IJB-C's size."""
    lengths = template_lengths(IJBC_SETS, IJBC_ROWS)
    print(f"{IJBC_SETS:,} sets of 1 to {max(lengths):,} rows, {IJBC_ROWS:,} in all, on {PLACES} places:\n")
    print("\n".join(table(lengths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
