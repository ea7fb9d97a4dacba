"""Checkpoints on disk: the one place where they are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fcn_kernels.extras import require
from fcn_kernels.files.formats import EXTRA, InputError, reading


def load_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The mapping that a checkpoint file holds, on the CPU: .safetensors, or what ``torch.save`` wrote.

    No code of the file is run (``weights_only=True``).

    Raises:
        InputError (a ValueError): the file cannot be read, or holds no mapping; naming it.
    """
    path = Path(path)
    with reading(path):
        if path.suffix.lower() == ".safetensors":
            return require("safetensors.torch", EXTRA).load_file(path)  # type: ignore[no-any-return]
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, Mapping):
        raise InputError(f"{path}: expected a state dict, got {type(checkpoint).__name__}")
    return checkpoint
