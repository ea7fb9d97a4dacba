"""What a kernel's source says of a line: whether it is a loop or a condition, its mark, and what lies behind it."""

import ast
import functools
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[2] / "fcn_kernels"

Lines = frozenset[tuple[str, int]]


class Statement(NamedTuple):
    """A loop or a condition."""

    kind: str  # "for", "while", "if", or "" for what has no choice to make
    text: str  # the condition, as Python writes it; of a for loop its mark, a word after "# @" on its line
    then: Lines = frozenset()  # of the body, and of the functions that it calls; not those of the other branch
    other: Lines = frozenset()


@functools.cache
def statement(file: str, line: int) -> Statement:
    """The one that begins on a line."""
    for node in ast.walk(_tree(file)):
        if getattr(node, "lineno", None) != line:
            continue
        if isinstance(node, ast.For):
            _, marked, mark = Path(file).read_text().splitlines()[line - 1].partition("# @")
            return Statement("for", mark.strip() if marked else "")
        if isinstance(node, ast.While):
            return Statement("while", ast.unparse(node.test))
        if isinstance(node, ast.If):
            then, other = _lines(file, node.body), _lines(file, node.orelse)
            return Statement("if", ast.unparse(node.test), then - other, other - then)
    return Statement("", Path(file).read_text().splitlines()[line - 1].strip())


def condition_of(places: list[tuple[str, int]]) -> Statement | None:
    """The condition whose body most of these lines are: a compiler may name another line for its branch."""
    places = [place for place in places if "/triton/language/" not in place[0]]  # of sums and the like, for any caller
    found = []
    for file, node in _functions().values():
        for inner in ast.walk(node):
            stands = statement(file, inner.lineno) if isinstance(inner, ast.If) else None
            if stands and 2 * sum(p in stands.then for p in places) > len(places) and "BUILD" not in stands.text:
                found.append(stands)
    return min(found, key=lambda stands: len(stands.then), default=None)


@functools.cache
def function(file: str, line: int) -> str:
    """The name of the function that a line is in."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= (node.end_lineno or 0):
            return node.name
    return ""


@functools.cache
def _tree(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text())


@functools.cache
def _functions() -> dict[str, tuple[str, ast.FunctionDef]]:
    """Device functions by name."""
    found = {}
    for path in (*PACKAGE.glob("*/kernels/*.py"), *PACKAGE.glob("device/*.py")):
        for node in _tree(str(path)).body:
            if isinstance(node, ast.FunctionDef):
                found[node.name] = str(path), node
    return found


def _lines(file: str, body: list[ast.stmt]) -> Lines:
    lines: set[tuple[str, int]] = set()
    seen: set[str] = set()

    def add(file: str, nodes: list[ast.stmt]) -> None:
        for node in nodes:
            lines.update((file, n) for n in range(node.lineno, (node.end_lineno or node.lineno) + 1))
            for call in ast.walk(node):
                name = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""
                if name in _functions() and name not in seen:
                    seen.add(name)
                    where, called = _functions()[name]
                    add(where, called.body)

    add(file, body)
    return frozenset(lines)
