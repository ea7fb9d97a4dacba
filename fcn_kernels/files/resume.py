"""What an unfinished run leaves beside its output, to go on from: whole, or not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fcn_kernels.files.checkpoint import load_checkpoint
from fcn_kernels.files.formats import InputError, reading
from fcn_kernels.files.output import check_output, replacing


def state_path(out: Path) -> Path:
    """Where an unfinished run keeps what it goes on from."""
    return out.with_name(out.name + ".state")


def what_was_kept(out: Path) -> str:
    """Of a run that was interrupted, for the person who did it."""
    if state_path(out).exists():
        return f"--resume goes on from {state_path(out)}"
    return "there was nothing to keep yet"


def check_state(out: Path, read_from: Iterable[Path], may_replace: bool) -> None:
    """Raise InputError, before the work, if a state could not be written, or one is there and may not be replaced."""
    check_output(state_path(out), read_from, overwrite=True)
    if state_path(out).exists() and not may_replace:
        raise InputError(f"{state_path(out)}: is of an unfinished run; --resume goes on, --overwrite starts anew")


def save_state(out: Path, state: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Write a state, with what its numbers follow from."""
    with replacing(state_path(out), overwrite=True) as file:
        torch.save({**state, "fixed": dict(fixed)}, file)


def load_state(out: Path, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an unfinished run.

    Raises:
        InputError: there is none, it cannot be read, or its numbers follow from something else.
    """
    path = state_path(out)
    if not path.exists():
        raise InputError(f"{path}: is not there, so there is no run to go on with")
    state: dict[str, Any] = dict(load_checkpoint(path))
    with reading(path):
        differ = [name for name, value in fixed.items() if state["fixed"][name] != value]
    if differ:
        raise InputError(f"{path}: is of a run with another {', '.join(differ)}")
    return state
