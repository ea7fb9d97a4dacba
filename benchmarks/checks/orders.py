"""In which order the kernels sum: the layout of what is reduced, by the device function that asks for it.

A sum's last bits depend on which thread has which elements. Two kernels that have to agree to the bit, as the forward
kernel and the one that leaves out rows, must sum what they share in one layout; and what programs of one warp and of
four sum, in tiles of few rows and of many, must be alike along a row (`along_rows`). The interpreter cannot show it,
the compiler's intermediate code can. No GPU is needed.
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from benchmarks.model.source import function

REDUCE = re.compile(
    r"\([^)]*\) <\{axis = (\d) : i32\}> \(\{(.*?)\}\) : \(tensor<((?:\d+x)+)f32, ([^\n]*?)>\) -> "
    r"[^\n]*? loc\((#loc\w*)\)\n",
    re.DOTALL,
)


class Sum(NamedTuple):
    """A sum of float32 numbers in a kernel."""

    function: str  # the innermost device function of ours that asks for it
    length: int  # of what is summed
    layout: str  # which thread has what


def along_rows(made: Iterable[Sum]) -> dict[str, set[tuple[int, ...]]]:
    """How rows are summed, by function, whatever rows are summed beside them: length, elements of a thread, threads and
    warps along a row. Rows of one length get the same bits from all launches in which this is the same."""
    orders: dict[str, set[tuple[int, ...]]] = {}
    for each in made:
        shape = re.findall(r"(?:sizePerThread|threadsPerWarp|warpsPerCTA) = \[([\d, ]+)\]", each.layout)
        if len(shape) != 3 or "slice" in each.layout:
            raise ValueError(f"expected a blocked layout, got {each}")
        order = (each.length, *(int(sizes.split(",")[-1]) for sizes in shape))
        orders.setdefault(each.function, set()).add(order)
    return orders


def sums(ttgir: str) -> set[Sum]:
    """All sums over the last axis, of Triton's intermediate code for GPUs."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
    places = dict(re.findall(r"^(#loc\w*) = loc\((.*)\)$", ttgir, re.MULTILINE))

    @cache
    def functions(place: str) -> tuple[str, ...]:
        """From the innermost on."""
        said = places.get(place, "")
        found = re.match(r'"([^"]*)":(\d+)', said)
        if found:
            return (function(found[1], int(found[2])),) if "fcn_kernels" in found[1] else ()
        return tuple(name for inner in re.findall(r"#loc\w*", said) for name in functions(inner))

    made = set()
    for text in ttgir.split('"tt.reduce"')[1:]:
        found = REDUCE.match(text)
        if found is None:  # of numbers of another kind
            continue
        axis, body, shape, layout, place = found.groups()
        lengths = [int(n) for n in shape.split("x")[:-1]]
        if "arith.addf" not in body or int(axis) != len(lengths) - 1:
            continue
        named = re.sub(r"#\w+", lambda found: layouts.get(found[0], found[0]), layout)
        made.add(Sum((*functions(place), "")[0], lengths[-1], named))
    return made
