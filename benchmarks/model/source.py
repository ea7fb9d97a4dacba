"""What a kernel's source says of a line: whether it is a loop or a condition, its mark, and what lies behind it."""

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[2] / "fcn_kernels"

MOST = 0.9  # of the lines of a part of the code are those of the statement that it was made of

Place = tuple[str, int]
"""A file and a line."""

Lines = frozenset[Place]


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
            return Statement("for", mark.strip() if marked else "", _lines(file, node.body) | {(file, line)})
        if isinstance(node, ast.While):
            return Statement("while", ast.unparse(node.test), _lines(file, node.body) | {(file, line)})
        if isinstance(node, ast.If):
            then, other = _lines(file, node.body), _lines(file, node.orelse)
            return Statement("if", ast.unparse(node.test), then - other, other - then)
    return Statement("", Path(file).read_text().splitlines()[line - 1].strip())


def condition_of(places: list[Place]) -> Statement | None:
    """The condition whose body most of these lines are: a compiler may name another line for its branch."""
    found = _conditions(_own(places))
    return statement(*min(found)[1]) if found else None


def condition_like(one: Place, places: list[Place]) -> Place:
    """The condition with the text of ``one`` that most of these lines are of, in one branch or the other."""
    alike = [(place, stands) for place, stands in _choices() if stands.text == statement(*one).text]
    alike = [(place, stands) for place, stands in alike if place[0] == one[0] and stands.kind == "if"]
    return max(alike, key=lambda found: sum(p in found[1].then | found[1].other for p in places), default=(one, None))[
        0
    ]


def loop_of(places: list[Place]) -> Place | None:
    """Where the innermost loop begins that these lines are of: one whose first line is among them, or lies within."""
    found = _loops(_own(places))
    named = [statement(*place).then for _, place in found if place in places]
    inside = [one for one in found if one[1] in places or all(statement(*one[1]).then <= lines for lines in named)]
    return min(inside, default=(0, None))[1]


def statement_of(places: list[Place]) -> Place | None:
    """Where the innermost loop or condition begins that these lines are of, without its first."""
    places = _own(places)
    return min(_loops(places) + _conditions(places), default=(0, None))[1]


def _own(places: list[Place]) -> list[Place]:
    """Without those of sums and the like, which any caller may have."""
    return [place for place in places if "/triton/language/" not in place[0]]


def _loops(places: list[Place]) -> list[tuple[int, Place]]:
    """With their numbers of lines."""
    return _with_share(places, MOST, ("for", "while"))


def _conditions(places: list[Place]) -> list[tuple[int, Place]]:
    return _with_share(places, 0.5, ("if",))


def _with_share(places: list[Place], share: float, kinds: tuple[str, ...]) -> list[tuple[int, Place]]:
    return [
        (len(stands.then), place)
        for place, stands in _choices()
        if stands.kind in kinds and sum(p in stands.then for p in places) > share * len(places)
    ]


@functools.cache
def _choices() -> list[tuple[Place, Statement]]:
    """The loops with marks and the conditions that a kernel meets when it runs, not when it is compiled."""
    nodes = [(file, node) for file in _files() for node in ast.walk(_tree(file))]
    places = [(file, node.lineno) for file, node in nodes if isinstance(node, ast.For | ast.While | ast.If)]
    every = [(place, statement(*place)) for place in places]
    return [(place, stands) for place, stands in every if stands.text and not _is_of_build(stands.text)]


def _is_of_build(condition: str) -> bool:
    """Whether it is on constants, which have names in capitals: a part of it at least."""
    return "BUILD" in condition or all(name.isupper() for name in re.findall(r"\w+", condition) if name != "not")


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
def _files() -> list[str]:
    return [str(path) for path in (*PACKAGE.glob("*/kernels/*.py"), *PACKAGE.glob("device/*.py"))]


@functools.cache
def _called(name: str, file: str) -> tuple[str, ast.FunctionDef] | None:
    """The device function that a file knows by a name: its own, or one of its folder, or one that is shared."""
    known = [
        (path, node)
        for path in _files()
        for node in _tree(path).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    return max(known, key=lambda found: (found[0] == file, Path(found[0]).parent == Path(file).parent), default=None)


def _lines(file: str, body: list[ast.stmt]) -> Lines:
    lines: set[tuple[str, int]] = set()
    seen: set[Place] = set()

    def add(file: str, nodes: list[ast.stmt]) -> None:
        for node in nodes:
            lines.update((file, n) for n in range(node.lineno, (node.end_lineno or node.lineno) + 1))
            for call in ast.walk(node):
                name = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""
                known = _called(name, file)
                if known and (known[0], known[1].lineno) not in seen:
                    seen.add((known[0], known[1].lineno))
                    add(known[0], known[1].body)

    add(file, body)
    return frozenset(lines)
