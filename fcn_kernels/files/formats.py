"""Files of named columns: read as they are needed, written whole or not at all.

A column is mapped from disk where the format lays rows out as memory does; where it does not, it is unpacked, a piece
at a time, into an unnamed temporary file, and that is mapped.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from fcn_kernels.extras import require

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, Any]

# Tensors, arrays or lists, by name; each is read when it is called.
Columns: TypeAlias = Mapping[str, Callable[[], Any]]

EXTRA = "tool"
PARQUET_BATCH_ROWS = 4096  # 8 MB of 512 float32 columns


class InputError(ValueError):
    """A file or an option is not what it should be; the message is for the person who gave it."""


class RowError(Exception):
    """A row is at fault, in a place where its file and template are not known."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(row, reason)
        self.row, self.reason = row, reason


class Format(NamedTuple):
    """How files of one suffix are read and written."""

    open: Callable[[Path, Path], Columns]
    """Of a file, and a folder to unpack into. Raises InputError, ImportError and, as columns are read, RowError."""
    write: Callable[[IO[bytes], Mapping[str, Array]], None]
    """Arrays of one length."""
    packages: tuple[str, ...]
    """What writing needs."""


def format_of(path: Path) -> Format:
    """The format that the suffix names."""
    if path.suffix not in _FORMATS:
        raise InputError(f"{path}: expected a file that ends in {', '.join(_FORMATS)}")
    return _FORMATS[path.suffix]


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Blame the file for whatever goes wrong while it is read."""
    try:
        yield
    except (InputError, ImportError, RowError):
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: is damaged, or holds more than tensors, lists and dicts, which could run code and is not "
            "loaded: save what is needed of it, such as a state dict, by itself"
        ) from error
    except Exception as error:  # each format raises its own kinds
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: cannot be read: {first_line}") from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which becomes `path` when all is written, and is gone on any exception."""
    target = path.resolve()  # a link stays a link
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load_npy(path: Path) -> Any:
    """The array of an .npy file, mapped."""
    with reading(path):
        # copy-on-write, as torch warns of memory that it may not write to
        return require("numpy", EXTRA).load(path, mmap_mode="c", allow_pickle=False)


def _open_npy(path: Path, _: Path) -> Columns:
    array = load_npy(path)
    if array.dtype.names is None:
        raise InputError(f"{path}: expected an array with named fields, or a second .npy with the template ids")
    return {name: partial(array.__getitem__, name) for name in array.dtype.names}


def _write_npy(file: IO[bytes], arrays: Mapping[str, Array]) -> None:
    np = require("numpy", EXTRA)
    fields = [(name, array.dtype, array.shape[1:]) for name, array in arrays.items()]
    records = np.empty(len(next(iter(arrays.values()))), fields)
    for name, array in arrays.items():
        records[name] = array
    np.save(file, records)


def _open_npz(path: Path, scratch: Path) -> Columns:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    return {m.filename.removesuffix(".npy"): partial(_load_member, path, m, scratch) for m in members}


def _load_member(path: Path, member: zipfile.ZipInfo, scratch: Path) -> Any:
    """Map an array where it lies, if it is stored as it is; else unpack it first."""
    np = require("numpy", EXTRA)
    with zipfile.ZipFile(path) as archive, archive.open(member) as packed:
        version = np.lib.format.read_magic(packed)
        headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in headers:
            raise InputError(f"{path}: expected .npy format 1.0 or 2.0 in {member.filename}, got {version}")
        shape, fortran, dtype = headers[version](packed)
        if dtype.hasobject:
            raise InputError(f"{path}: {member.filename} holds Python objects, which could run code: not loaded")
        if 0 in shape:
            return np.empty(shape, dtype)
        as_mapped = partial(np.memmap, dtype=dtype, mode="c", shape=shape, order="F" if fortran else "C")
        if member.compress_type == zipfile.ZIP_STORED:
            return as_mapped(path, offset=_start(path, member) + packed.tell())
        with TemporaryFile(dir=scratch) as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
            unpacked.flush()
            return as_mapped(unpacked)


def _start(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a zip member's bytes start: past a local header of 30 bytes, its name and its extra field."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return member.header_offset + 30 + name + extra


def _write_npz(file: IO[bytes], arrays: Mapping[str, Array]) -> None:
    require("numpy", EXTRA).savez(file, **arrays)


def _open_pt(path: Path, _: Path) -> Columns:
    # files from before PyTorch 1.6 are no zip files, and cannot be mapped
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    return {name: partial(content.__getitem__, name) for name in content}


def _write_pt(file: IO[bytes], arrays: Mapping[str, Array]) -> None:
    # tensors have no strings
    torch.save({n: a.tolist() if a.dtype.kind == "U" else torch.from_numpy(a) for n, a in arrays.items()}, file)


def _open_safetensors(path: Path, _: Path) -> Columns:
    file = require("safetensors", EXTRA).safe_open(path, framework="pt")
    return {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118 - it is no mapping


def _write_safetensors(file: IO[bytes], arrays: Mapping[str, Array]) -> None:
    file.write(require("safetensors.numpy", EXTRA).save(dict(arrays)))


def _open_parquet(path: Path, scratch: Path) -> Columns:
    # with a buffer, pages are read as they are needed, not a row group at once
    file = require("pyarrow.parquet", EXTRA).ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    return {name: partial(_load_parquet, file, name, scratch) for name in file.schema_arrow.names}


def _load_parquet(file: Any, name: str, scratch: Path) -> Any:
    """A column of lists as (T, C), by way of a temporary file; any other as (T,)."""
    np, arrow = require("numpy", EXTRA), require("pyarrow", EXTRA)
    types, kind = arrow.types, file.schema_arrow.field(name).type
    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        column = file.read(columns=[name]).column(0)
        if not types.is_floating(kind):  # a missing float is NaN
            _refuse_nulls(column, 0, name)
        values = column.to_numpy()
        return np.array(values.tolist()) if values.dtype.hasobject else values
    shape = 0, 0
    with TemporaryFile(dir=scratch) as unpacked:
        for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=[name]):
            rows = _dense(batch.column(0), *shape, name)
            rows.tofile(unpacked)
            shape = shape[0] + rows.shape[0], rows.shape[1]
        unpacked.flush()
        return np.memmap(unpacked, rows.dtype, "c", shape=shape) if all(shape) else np.empty(shape)


def _dense(lists: Any, first: int, width: int, name: str) -> Any:
    """Rows `first` on of a column of lists as an array; all lists have to be as long as those before, `width`."""
    _refuse_nulls(lists, first, name)
    lengths = require("pyarrow.compute", EXTRA).list_value_length(lists).to_numpy(zero_copy_only=False)
    if not first:
        width = int(lengths[0])
    ragged = (lengths != width).nonzero()[0]
    if len(ragged):
        raise RowError(first + int(ragged[0]), f"{lengths[ragged[0]]} values in {name!r}, {width} in the rows before")
    return lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), width)


def _refuse_nulls(column: Any, first: int, name: str) -> None:
    if column.null_count:
        nulls = require("numpy", EXTRA).asarray(column.is_null())
        raise RowError(first + int(nulls.argmax()), f"{name!r} is null")


def _write_parquet(file: IO[bytes], arrays: Mapping[str, Array]) -> None:
    arrow = require("pyarrow", EXTRA)
    columns = {
        name: arrow.array(a) if a.ndim == 1 else arrow.FixedSizeListArray.from_arrays(a.reshape(-1), a.shape[1])
        for name, a in arrays.items()
    }
    require("pyarrow.parquet", EXTRA).write_table(arrow.table(columns), file)


_FORMATS = {
    ".npz": Format(_open_npz, _write_npz, ("numpy",)),
    ".npy": Format(_open_npy, _write_npy, ("numpy",)),
    ".pt": Format(_open_pt, _write_pt, ("numpy",)),
    ".safetensors": Format(_open_safetensors, _write_safetensors, ("safetensors.numpy",)),
    ".parquet": Format(_open_parquet, _write_parquet, ("pyarrow.parquet",)),
}
