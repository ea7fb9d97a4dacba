"""Finds loads and stores of the same memory by different threads with no barrier between, in what Triton compiled.

A layout says which thread has which element. Triton may make one load twice, in the layouts of two uses; where the
kernel then stores to that memory, the threads of one layout may be ahead of those of the other, and overwrite what
these still have to load. The interpreter runs one thread, and racecheck looks at shared memory alone: neither sees it.
The compiler's own form of a kernel (TTGIR) shows it, on any machine.
"""

import re
from typing import NamedTuple

ACCESS = re.compile(
    r"tt\.(?P<kind>load|store) (?P<pointer>%[\w#]+).* : tensor<[\dx]+x!tt\.ptr<\w+>, "
    r"(?P<layout>#[^>]*(?:<[^<>]*(?:<[^<>]*>)?[^<>]*>)?)>"
)
DERIVED = re.compile(
    r"(?P<made>%[\w#]+) = (?:tt\.(?:addptr|splat|broadcast|expand_dims)|ttg\.convert_layout) (?P<of>%[\w#]+)"
)
BARRIER = re.compile(r"\b(?:gpu|ttg)\.(?:local_)?barrier\b")


class Race(NamedTuple):
    """A store, and loads of the same argument's memory in other layouts, with no barrier between."""

    memory: str
    """The kernel's argument."""
    stored: str
    loaded: tuple[str, ...]
    """Layouts."""


def races(ttgir: str) -> list[Race]:
    """What may race in a kernel.

    Each block of straight code is looked at by itself: loads before a store to the same argument must be in the layout
    of the store. Elements are not told apart, so that loads of elements which are never stored are found as well.
    """
    base = {m["made"]: m["of"] for m in DERIVED.finditer(ttgir)}
    found = []
    blocks: list[dict[str, set[str]]] = [{}]  # loads since the last barrier, of each block that is open
    for line in ttgir.splitlines():
        code = line.split(" loc(")[0].strip()
        if BARRIER.search(code):
            blocks = [{} for _ in blocks]
        elif access := ACCESS.search(code):
            memory = _root(access["pointer"], base)
            loaded = blocks[-1].setdefault(memory, set())
            if access["kind"] == "load":
                loaded.add(access["layout"])
            elif loaded - {access["layout"]}:
                found.append(Race(memory, access["layout"], tuple(sorted(loaded))))
        for bracket in re.findall(r"[{}](?=$|\s|\))", re.sub(r"\{[^{}]*\}", "", code)):
            if bracket == "{":
                blocks.append({})
            elif len(blocks) > 1:
                blocks.pop()
    return found


def _root(pointer: str, base: dict[str, str]) -> str:
    while pointer in base:
        pointer = base[pointer]
    return pointer
