"""A file of embeddings: its rows, the templates that they belong to, and what can be wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fcn_kernels.extras import require
from fcn_kernels.files.formats import EXTRA, Columns, InputError, RowError, format_of, load_npy, reading
from fcn_kernels.selection.checks import DTYPES

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array


class Keys(NamedTuple):
    """Names of the columns. Quality None: "quality" if the file has it."""

    features: str = "features"
    ids: str = "template_ids"
    quality: str | None = None


class Embeddings(NamedTuple):
    """T rows and the templates that they belong to."""

    features: Tensor
    """(T, C), of a floating-point dtype; mapped from a file."""
    ids: Array
    """(T,) integers or strings."""
    quality: Tensor | None
    """(T,) float64, or None if the file has none."""
    source: str
    """The file, for messages."""

    def bad_row(self, row: int, reason: str) -> InputError:
        """The error that blames a row, naming file, row and template."""
        return _bad_row(self.source, row, self.ids, reason)


def read(paths: Sequence[Path], keys: Keys, scratch: Path) -> Embeddings:
    """Open one file of named columns; or .npy files of features, ids and, optionally, quality.

    Args:
        paths: the file, or the two or three .npy files.
        keys: names of the columns, for one file.
        scratch: folder of the unnamed temporary file that a packed format is unpacked into.

    Raises:
        InputError: a file cannot be read, lacks a column, or holds one of the wrong shape or type; naming the file
            and, where there is one to blame, the row and its template.
        ImportError: a package that the format needs is not installed.
    """
    source = str(paths[0])
    if len(paths) > 1:
        columns, keys = _several_npy(paths, keys)
    else:
        opener = format_of(paths[0]).open
        with reading(source):
            columns = opener(paths[0], scratch)
    ids: Any = ()
    try:
        ids = _ids(columns, keys.ids, source)
        features = _features(columns, keys.features, source)
        _check_lengths(keys.features, len(features), keys.ids, len(ids))
        quality = None
        if keys.quality is not None or "quality" in columns:
            name = keys.quality or "quality"
            quality = _quality(columns, name, source)
            _check_lengths(keys.features, len(features), name, len(quality))
    except RowError as error:
        raise _bad_row(source, error.row, ids, error.reason) from error
    return Embeddings(features, ids, quality, source)


def _several_npy(paths: Sequence[Path], keys: Keys) -> tuple[Columns, Keys]:
    """FEATURES.npy, IDS.npy and, optionally, QUALITY.npy: columns under the names of their files."""
    if len(paths) > 3 or any(path.suffix != ".npy" for path in paths):
        raise InputError(f"expected one INPUT or FEATURES.npy IDS.npy [QUALITY.npy], got {' '.join(map(str, paths))}")
    if keys != Keys():
        raise InputError("--features, --ids and --quality name columns of one INPUT; several .npy files have none")
    return {str(path): partial(load_npy, path) for path in paths}, Keys(*map(str, paths))


def _bad_row(source: str, row: int, ids: Array, reason: str) -> InputError:
    template = f" of template {ids[row]}" if row < len(ids) else ""
    return InputError(f"{source}: row {row}{template}: {reason}")


def _check_lengths(one: str, rows: int, other: str, others: int) -> None:
    if rows != others:
        lacking = one if rows < others else other
        raise RowError(min(rows, others), f"not in {lacking!r}: {one!r} has {rows} rows and {other!r} has {others}")


def _column(columns: Columns, name: str, source: str) -> Any:
    if name not in columns:
        raise InputError(f"{source}: expected a column {name!r}, got {', '.join(map(repr, columns)) or 'none'}")
    with reading(source):
        return columns[name]()


def _one_a_row(columns: Columns, name: str, source: str) -> Array:
    """Numbers or strings (T,), from (T,) or (T, 1)."""
    column = _column(columns, name, source)
    if isinstance(column, list) and len({type(value) for value in column}) > 1:
        raise InputError(f"{source}: expected values of one type in {name!r}, got a list of several")
    if isinstance(column, Tensor) and column.dtype == torch.bfloat16:
        column = column.float()
    with reading(source):
        values: Array = require("numpy", EXTRA).asarray(column)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise InputError(f"{source}: expected {name!r} of shape (T,) or (T, 1), got {values.shape}")
    if not len(values):
        raise InputError(f"{source}: expected at least one row, got none in {name!r}")
    return values


def _ids(columns: Columns, name: str, source: str) -> Array:
    ids = _one_a_row(columns, name, source)
    if ids.dtype.kind not in "iuU":
        raise InputError(f"{source}: expected integers or strings in {name!r}, got {ids.dtype}")
    return ids


def _quality(columns: Columns, name: str, source: str) -> Tensor:
    quality = _one_a_row(columns, name, source)
    if quality.dtype.kind not in "iuf":
        raise InputError(f"{source}: expected numbers in {name!r}, got {quality.dtype}")
    return torch.from_numpy(quality.astype("float64"))


def _features(columns: Columns, name: str, source: str) -> Tensor:
    column = _column(columns, name, source)
    with reading(source):
        features = torch.as_tensor(column)
    if features.ndim != 2 or features.shape[1] == 0 or features.dtype not in DTYPES:
        raise InputError(
            f"{source}: expected floating-point {name!r} of shape (T, C), "
            f"got {str(features.dtype).removeprefix('torch.')} of shape {tuple(features.shape)}"
        )
    return features
