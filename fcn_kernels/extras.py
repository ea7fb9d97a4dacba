"""Optional dependencies: looked up when they are needed, with the extra to install when they are missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import `module`; if it is missing, raise ImportError naming the extra of this package to install."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the module is there, but something that it needs is not: another problem
        raise ImportError(f'{module} is needed here: pip install "fcn_kernels[{extra}]"') from error
