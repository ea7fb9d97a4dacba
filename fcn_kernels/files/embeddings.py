"""A file of embeddings: its rows, the templates that they belong to, and what can be wrong with them."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fcn_kernels.checks import DTYPES
from fcn_kernels.extras import require
from fcn_kernels.files.formats import (
    EXTRA,
    Columns,
    InputError,
    RowError,
    Scratch,
    format_of,
    load_csv,
    load_npy,
    numbers_or_text,
    reading,
    stack,
    suffix_of,
)

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array


INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


class Keys(NamedTuple):
    """Names of the columns. Quality None: "quality" if the file has it."""

    features: str = "features"
    ids: str = "template_ids"
    quality: str | None = None
    styles: str | None = None


class Embeddings(NamedTuple):
    """T rows and the templates that they belong to."""

    features: Tensor
    """(T, C), of a floating-point dtype or of integers; mapped from a file."""
    ids: Array
    """(T,) integers or strings."""
    quality: Tensor | None
    """(T,) float64, or None if the file has none."""
    source: str
    """The file, for messages."""
    styles: Tensor | None = None
    """(T, style_dim) or (T, S, 2), of a floating-point dtype; mapped. None if they were not asked for."""

    def bad_row(self, row: int, reason: str) -> InputError:
        """The error that blames a row, naming file, row and template."""
        return _bad_row(self.source, row, self.ids, reason)


def read(paths: Sequence[Path], keys: Keys, scratch: Scratch) -> Embeddings:
    """Open one file of named columns; .npy files of features, ids and, optionally, quality; or .npy and .csv.

    Args:
        paths: the file; the two or three .npy files; or the .npy of the features and a .csv of the other columns.
        keys: names of the columns, for one file and for a .csv. Features may be a pattern (``"f*"``), of one column a
            feature, if no column has that very name.
        scratch: where packed columns are unpacked.

    Raises:
        InputError: a file cannot be read, lacks a column, or holds one of the wrong shape or type; naming the file
            and, where there is one to blame, the row and its template.
        ImportError: a package that the format needs is not installed.
    """
    source = str(paths[0])
    if len(paths) > 1:
        columns, keys = _several(paths, keys)
    else:
        opener = format_of(paths[0]).open
        with reading(source):
            columns = opener(paths[0], scratch)
    return from_columns(columns, keys, source, scratch)


def from_columns(columns: Columns, keys: Keys, source: str, scratch: Scratch) -> Embeddings:
    """Embeddings of columns that are open, or in memory; ``source`` names them in messages. Raises as :func:`read`."""
    ids: Any = ()
    try:
        ids = ids_column(columns, keys.ids, source)
        features = _features(columns, keys.features, source, scratch)
        _check_lengths(keys.features, len(features), keys.ids, len(ids))
        quality = None
        if keys.quality is not None or "quality" in columns:
            name = keys.quality or "quality"
            quality = _quality(columns, name, source)
            _check_lengths(keys.features, len(features), name, len(quality))
        styles = None
        if keys.styles is not None:
            styles = _styles(columns, keys.styles, source, scratch)
            _check_lengths(keys.features, len(features), keys.styles, len(styles))
    except RowError as error:
        raise _bad_row(source, error.row, ids, error.reason) from error
    return Embeddings(features, ids, quality, source, styles)


def read_rows(path: Path, keys: Keys, scratch: Scratch) -> tuple[Tensor, Tensor | None]:
    """Features (T, C), mapped, and quality (T,) or None, of one file: of named columns, or an .npy of features alone.

    Raises:
        InputError: as :func:`read`.
        ImportError: a package that the format needs is not installed.
    """
    if suffix_of(path) == ".npy" and load_npy(path).dtype.names is None:
        columns: Columns = {keys.features: partial(load_npy, path)}
    else:
        with reading(path):
            columns = format_of(path).open(path, scratch)
    features = _features(columns, keys.features, str(path), scratch)
    if keys.quality is None and "quality" not in columns:
        return features, None
    quality = _quality(columns, keys.quality or "quality", str(path))
    if len(quality) != len(features):
        raise InputError(f"{path}: expected a quality for each of {len(features)} rows, got {len(quality)}")
    return features, quality


def _several(paths: Sequence[Path], keys: Keys) -> tuple[Columns, Keys]:
    """FEATURES.npy IDS.npy [QUALITY.npy], or FEATURES.npy TABLE.csv: their columns and what they are called."""
    features, *others = paths
    suffixes = [suffix_of(path) for path in paths]
    if suffixes == [".npy", ".csv"] and keys.features == Keys().features:
        return _with_csv(features, others[0], keys)
    if len(paths) > 3 or any(suffix != ".npy" for suffix in suffixes):
        raise InputError(
            "expected one INPUT, FEATURES.npy IDS.npy [QUALITY.npy] or FEATURES.npy TABLE.csv, "
            f"got {' '.join(map(str, paths))}"
        )
    if keys != Keys():
        raise InputError(
            "--features, --ids, --quality and --styles name columns of one INPUT; several .npy files have none"
        )
    return {str(path): partial(load_npy, path) for path in paths}, Keys(*map(str, paths))


def _with_csv(features: Path, table: Path, keys: Keys) -> tuple[Columns, Keys]:
    columns = dict(load_csv(table))
    if keys.ids not in columns and len(columns) == 1:  # no line of names: the first line is an id too
        ((first, rest),) = columns.items()
        columns = {keys.ids: lambda: numbers_or_text([first, *map(str, rest())])}
    return columns | {str(features): partial(load_npy, features)}, keys._replace(features=str(features))


def _bad_row(source: str, row: int, ids: Array, reason: str) -> InputError:
    template = f" of template {ids[row]}" if row < len(ids) else ""
    return InputError(f"{source}: row {row}{template}: {reason}")


def _check_lengths(one: str, rows: int, other: str, others: int) -> None:
    if rows != others:
        lacking = one if rows < others else other
        raise RowError(min(rows, others), f"not in {lacking!r}: {one!r} has {rows} rows and {other!r} has {others}")


def column(columns: Columns, name: str, source: str) -> Any:
    """A column as its format reads it."""
    if name not in columns:
        raise InputError(f"{source}: expected a column {name!r}, got {', '.join(map(repr, columns)) or 'none'}")
    with reading(source):
        return columns[name]()


def one_a_row(columns: Columns, name: str, source: str, empty: bool = False) -> Array:
    """Numbers or strings (T,), from (T,) or (T, 1), in the machine's byte order."""
    found = column(columns, name, source)
    if isinstance(found, list) and len({type(value) for value in found}) > 1:
        raise InputError(f"{source}: expected values of one type in {name!r}, got a list of several")
    if isinstance(found, Tensor) and found.dtype == torch.bfloat16:
        found = found.float()
    with reading(source):
        np = require("numpy", EXTRA)
        # NumPy makes floats of integers of which some are too large for int64
        large = isinstance(found, list) and found and isinstance(found[0], int) and max(found) > np.iinfo("int64").max
        values: Array = np.asarray(found, "uint64" if large else None)
        if values.dtype.kind == "S":
            values = np.char.decode(values, "utf-8")
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise InputError(f"{source}: expected {name!r} of shape (T,) or (T, 1), got {values.shape}")
    if not len(values) and not empty:
        raise InputError(f"{source}: expected at least one row, got none in {name!r}")
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def ids_column(columns: Columns, name: str, source: str, empty: bool = False) -> Array:
    """Integers or strings (T,); ``empty``: there may be none."""
    np, ids = require("numpy", EXTRA), one_a_row(columns, name, source, empty)
    if ids.dtype.kind == "f":  # as pandas leaves integers that once had a gap among them
        with np.errstate(invalid="ignore"):
            whole = ids.astype("int64")
        # from there on, several integers are one float
        if (whole != ids).any() or (abs(ids) >= 2.0 ** (np.finfo(ids.dtype).nmant + 1)).any():
            raise InputError(f"{source}: expected integers or strings in {name!r}, got {ids.dtype} with other values")
        ids = whole
    if ids.dtype.kind not in "iuU":
        raise InputError(f"{source}: expected integers or strings in {name!r}, got {ids.dtype}")
    return ids


def alike(*named: tuple[str, Array]) -> list[Array]:
    """Ids (T,) of several files, each with its file's name, in one dtype: what is equal stays so, and nothing else is.

    Raises:
        InputError: there are integers and strings; or negative integers and such as int64 cannot hold.
    """
    np = require("numpy", EXTRA)
    of_kind = {ids.dtype.kind == "U": source for source, ids in named}
    if len(of_kind) > 1:
        raise InputError(f"expected ids of one kind, got strings in {of_kind[True]} and integers in {of_kind[False]}")
    common = np.result_type(*(ids.dtype for _, ids in named))
    if common.kind == "f":  # NumPy's for int64 with uint64, where several integers are one float
        negative = [source for source, ids in named if len(ids) and ids.min() < 0]
        large = [source for source, ids in named if len(ids) and ids.max() > np.iinfo("int64").max]
        if negative and large:
            raise InputError(f"expected ids of int64 or of uint64, got -1 or less in {negative[0]}, more in {large[0]}")
        common = np.dtype("uint64" if large else "int64")
    return [ids.astype(common, copy=False) for _, ids in named]


def _quality(columns: Columns, name: str, source: str) -> Tensor:
    quality = one_a_row(columns, name, source)
    if quality.dtype.kind not in "iufU":
        raise InputError(f"{source}: expected numbers in {name!r}, got {quality.dtype}")
    try:
        return torch.from_numpy(quality.astype("float64"))
    except ValueError as error:
        raise InputError(f"{source}: expected numbers in {name!r}, got text: {error}") from error


def _styles(columns: Columns, name: str, source: str, scratch: Scratch) -> Tensor:
    with reading(source):
        values = column(columns, name, source)
        styles = torch.as_tensor(values if isinstance(values, list | Tensor) else scratch.native(values))
    if styles.ndim not in (2, 3) or (styles.ndim == 3 and styles.shape[2] != 2) or styles.dtype not in DTYPES:
        kind = str(styles.dtype).removeprefix("torch.")
        raise InputError(
            f"{source}: expected floating-point {name!r} of shape (T, style_dim) or (T, S, 2), "
            f"got {kind} of shape {tuple(styles.shape)}"
        )
    return styles


def _features(columns: Columns, name: str, source: str, scratch: Scratch) -> Tensor:
    with reading(source):
        if name not in columns and fnmatch.filter(columns, name):
            values = stack(columns, name, scratch)
        else:
            values = column(columns, name, source)
        features = torch.as_tensor(values if isinstance(values, list | Tensor) else scratch.native(values))
    if features.ndim != 2 or features.shape[1] == 0 or features.dtype not in (*DTYPES, *INTEGERS):
        raise InputError(
            f"{source}: expected floating-point or integer {name!r} of shape (T, C), "
            f"got {str(features.dtype).removeprefix('torch.')} of shape {tuple(features.shape)}"
        )
    return features
