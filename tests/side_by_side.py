"""Triton's interpreter with the programs of a launch side by side, so that they can wait for each other.

The interpreter runs one program after another, in which a barrier across the grid never opens. Here each program has
a thread. It shows that every program comes to the same barriers and finds there what the others left; how a GPU orders
its memory it does not show.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from triton.runtime import interpreter

PATIENCE = 100.0  # seconds after which a barrier that has not opened never will


class _OwnIndex(threading.local):
    index: tuple[int, int, int] = (0, 0, 0)


_program = _OwnIndex()


class _SideBySide(interpreter.GridExecutor):
    def __call__(self, *args_dev: Any, **kwargs: Any) -> None:
        kwargs = {name: value for name, value in kwargs.items() if name in self.arg_names}
        args_hst, kwargs_hst = self._init_args_hst(args_dev, kwargs)
        failures: list[BaseException] = []

        def run(index: int, args: dict[str, Any]) -> None:
            _program.index = (index, 0, 0)
            try:
                self.fn(**args)
            except BaseException as failure:
                failures.append(failure)

        patched = interpreter._patch_lang(self.fn)
        try:
            given = inspect.getcallargs(self.fn, *args_hst, **kwargs_hst)
            args = {n: a if n in self.constexprs else interpreter._implicit_cvt(a) for n, a in given.items()}
            interpreter.interpreter_builder.set_grid_dim(*self.grid, 1, 1)
            programs = [threading.Thread(target=run, args=(i, args), daemon=True) for i in range(self.grid[0])]
            for program in programs:
                program.start()
            for program in programs:
                program.join(PATIENCE)
                assert failures or not program.is_alive(), "a program waits at a barrier that the others passed by"
        finally:
            patched.restore()
        if failures:
            raise failures[0]
        self._restore_args_dev(args_dev, args_hst, kwargs, kwargs_hst)


@contextmanager
def side_by_side() -> Iterator[None]:
    """Interpret every launch so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "GridExecutor", _SideBySide)
        own = property(lambda self: _program.index, lambda self, index: None)
        patch.setattr(interpreter.InterpreterBuilder, "grid_idx", own, raising=False)
        yield
