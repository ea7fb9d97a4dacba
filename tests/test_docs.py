"""What the documents say runs: docstring examples, and the Python blocks of README and docs with what they print."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import fcn_kernels

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?:<!-- (?P<note>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")
NOT_RUN = "not run: "
"""Begins a comment before a block that no test runs, which says why."""


class Block(NamedTuple):
    """A block of Python and what stands under it as its output, or None."""

    line: int
    code: str
    printed: str | None


def blocks(page: Path) -> list[Block]:
    """The Python of a page that is to be run."""
    text = page.read_text()
    fences = list(FENCE.finditer(text))
    found = []
    for fence, after in zip_longest(fences, fences[1:]):
        if fence["language"] != "python" or (fence["note"] or "").startswith(NOT_RUN):
            continue
        follows = after is not None and after["language"] == "text" and not text[fence.end() : after.start()].strip()
        printed = after["text"] if follows and after is not None else None
        found.append(Block(text[: fence.start("text")].count("\n") + 1, fence["text"], printed))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_python_of_a_page_runs_and_prints_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        if block.printed is not None:
            assert printed.getvalue() == block.printed, f"{page.name}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    missing = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not missing


def modules() -> list[ModuleType]:
    """The package's modules that need nothing but torch to be imported, and have examples."""
    found = []
    for info in pkgutil.walk_packages(fcn_kernels.__path__, "fcn_kernels."):
        if not re.search(r"\.(kernels|device|demos|cli|__main__)\b", info.name):
            module = importlib.import_module(info.name)
            if ">>>" in Path(str(module.__file__)).read_text():
                found.append(module)
    return found


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__.removeprefix("fcn_kernels."))
def test_docstring_examples_run(module: ModuleType) -> None:
    torch.manual_seed(0)
    ran = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS)
    assert ran.attempted > 0
    assert ran.failed == 0


def test_every_public_function_and_module_has_an_example() -> None:
    public = {name: getattr(fcn_kernels, name) for name in fcn_kernels.__all__}
    calls = [name for name, value in public.items() if callable(value) and not hasattr(value, "_fields")]
    assert "coreset_select" in calls
    assert [name for name in calls if ">>>" not in (public[name].__doc__ or "")] == []
