"""The floors of docs/architecture.md: an import goes down, never up, and no operation imports another."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fcn_kernels"
FLOORS = (
    {"__main__", "cli", "demos"},
    {"integrations", "evaluation", "training", "faces"},
    {"files"},
    {"heads"},
    {"distributed"},
    {"selection", "attention", "clustering", "neighbors"},
    {"device", "cpp"},
)
OPERATIONS = FLOORS[5]
FLOOR = {room: len(FLOORS) - floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports() -> Iterator[tuple[str, str, str]]:
    """Each import of one of the package's modules: the room it is in, what it imports, and that one's room."""
    for path in PACKAGE.rglob("*.py"):
        if path.parent == PACKAGE and path.name == "__init__.py":
            continue  # the public names
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
                name = str(node.module)
                targets = [f"{name}.{alias.name}" for alias in node.names] if name == PACKAGE.name else [name]
                yield from ((room, target, target.split(".")[1]) for target in targets)


def test_imports_go_down_and_no_operation_imports_another() -> None:
    found = list(imports())
    assert len(found) > 200
    public = {name for room, name, of in found if of[0].isupper() or of == "coreset_select"}
    assert {room for room, name, _ in found if name in public} <= {"demos"}  # as a user would
    wrong = [
        f"{room} imports {target}"
        for room, target, of in found
        if target not in public and (FLOOR.get(of, 0) > FLOOR.get(room, 0) or (of != room and {of, room} <= OPERATIONS))
    ]
    assert not wrong
