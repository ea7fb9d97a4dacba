"""Files of named columns: read as they are needed.

A column is mapped from disk where the format lays rows out as memory does; where it does not, it is unpacked, a piece
at a time, into an unnamed temporary file, and that is mapped.
"""

from __future__ import annotations

import csv
import errno
import fnmatch
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fcn_kernels.extras import require
from fcn_kernels.files import numpy_pickle

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, Any]

# Tensors, arrays or lists, by name; each is read when it is called.
Columns: TypeAlias = Mapping[str, Callable[[], Any]]

EXTRA = "tool"
PIECE = 1 << 20  # bytes
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")  # of 64 bits
PARQUET_BATCH_ROWS = 4096  # 8 MB of 512 float32 columns


class InputError(ValueError):
    """A file or an option is not what it should be; the message is for the person who gave it."""


class RowError(Exception):
    """A row is at fault, in a place where its file and template are not known."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(row, reason)
        self.row, self.reason = row, reason


class Scratch(NamedTuple):
    """Where packed columns are unpacked."""

    folder: Path
    limit: int
    """Bytes that one column may take there: a small file can be made that unpacks to any size."""

    @contextmanager
    def file(self) -> Iterator[_Unpacked]:
        """An unnamed file, which lives as long as something is mapped from it."""
        with TemporaryFile(dir=self.folder) as file:
            yield _Unpacked(file, self.limit)

    def native(self, array: Array) -> Array:
        """The array, or, if its bytes or strides are not what torch can take, a mapped copy."""
        np = require("numpy", EXTRA)
        native = array.dtype.newbyteorder("=")
        whole = all(stride >= 0 and stride % array.dtype.itemsize == 0 for stride in array.strides)
        if (array.dtype == native and whole) or not array.size:
            return array
        with self.file() as unpacked:
            step = max(1, PIECE * len(array) // array.nbytes)
            for first in range(0, len(array), step):
                unpacked.write(np.ascontiguousarray(array[first : first + step], native))
            return unpacked.mapped(native, array.shape)


class _Unpacked:
    """A file that is filled, up to a limit, and then mapped."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self.file, self.limit, self.left = file, limit, limit

    def write(self, data: Any) -> None:
        data = memoryview(data).cast("B")
        self._take(len(data))
        self.file.write(data)

    def _take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise InputError(
                f"unpacks to more than {self.limit / 2**30:g} GiB: --max-unpacked allows more, if it is to be trusted"
            )

    def reserve(self, dtype: Any, shape: tuple[int, ...]) -> Array:
        """The file mapped to be written, when its place on the disk is had: a write to a map could not fail."""
        size = math.prod(shape) * dtype.itemsize
        self._take(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.file.fileno(), 0, size)
        return require("numpy", EXTRA).memmap(self.file, dtype, "w+", 0, shape)  # type: ignore[no-any-return]

    def mapped(self, dtype: Any, shape: tuple[int, ...], order: str = "C") -> Array:
        self.file.flush()
        # copy-on-write, as torch warns of memory that it may not write to
        return require("numpy", EXTRA).memmap(self.file, dtype, "c", 0, shape, order)  # type: ignore[no-any-return]


class Format(NamedTuple):
    """How files of one suffix are read and written."""

    open: Callable[[Path, Scratch], Columns]
    """Raises InputError, ImportError and, as columns are read, RowError."""
    write: Callable[[IO[bytes], Mapping[str, Array]], None]
    """Arrays of one length."""
    packages: tuple[str, ...]
    """What writing needs."""


def suffix_of(path: Path) -> str:
    """In lower case; a folder of Parquet files has theirs."""
    return ".parquet" if os.path.isdir(path) and _parts(path) else path.suffix.lower()


def format_of(path: Path) -> Format:
    """The format that the suffix names."""
    suffix = suffix_of(path)
    if suffix not in _FORMATS:
        raise InputError(f"{path}: expected a file that ends in {', '.join(_FORMATS)}, or a folder of .parquet")
    return _FORMATS[suffix]


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Blame the file for whatever goes wrong while it is read, but for a disk that is full, or memory."""
    try:
        yield
    except (ImportError, RowError, MemoryError):
        raise
    except InputError as error:
        if str(error).startswith(str(path)):
            raise
        raise InputError(f"{path}: {error}") from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: is damaged, or holds more than tensors, arrays, lists and dicts, which could run code and is "
            "not loaded (weights_only=True): save what is needed of it, such as a state dict, by itself"
        ) from error
    except Exception as error:  # each format raises its own kinds
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: cannot be read: {first_line}") from error


def load_npy(path: Path) -> Any:
    """The array of an .npy file, mapped; of strings, read."""
    with reading(path):
        np = require("numpy", EXTRA)
        try:
            return np.load(path, mmap_mode="c", allow_pickle=False)  # as above
        except ValueError as error:
            if "object" not in str(error):
                raise
        with path.open("rb") as file:
            _read_header(file)
            return numpy_pickle.load_strings(file)


def load_csv(path: Path) -> Columns:
    """Columns of a .csv, whose first line has their names."""
    with reading(path), path.open(newline="", encoding="utf-8-sig") as file:
        lines = [line for line in csv.reader(file) if line]
    widths = {len(line) for line in lines}
    if len(widths) != 1 or len({*lines[0]}) != len(lines[0]):
        raise InputError(f"{path}: expected names of columns and lines of as many fields, got {sorted(widths)} fields")
    return {name: partial(numbers_or_text, column) for name, *column in zip(*lines, strict=True)}


def numbers_or_text(values: Sequence[str]) -> list[int] | list[str]:
    """Integers, if all are written as integers are: "007" and "1e5" are names of something."""
    return list(map(int, values)) if all(map(_INTEGER.fullmatch, values)) else list(values)


def _open_npy(path: Path, _: Scratch) -> Columns:
    array = load_npy(path)
    if array.dtype.names is None:
        raise InputError(f"{path}: expected an array with named fields, or a second .npy or .csv with the template ids")
    return {name: partial(array.__getitem__, name) for name in array.dtype.names}


def _write_npy(file: IO[bytes], arrays: Mapping[str, Array]) -> None:
    np = require("numpy", EXTRA)
    fields = [(name, array.dtype, array.shape[1:]) for name, array in arrays.items()]
    records = np.empty(len(next(iter(arrays.values()))), fields)
    for name, array in arrays.items():
        records[name] = array
    np.save(file, records)


def _open_npz(path: Path, scratch: Scratch) -> Columns:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    return {m.filename.removesuffix(".npy"): partial(_load_member, path, m, scratch) for m in members}


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, whether in Fortran's order, and dtype of an .npy file or member."""
    numpy_format = require("numpy", EXTRA).lib.format
    version = numpy_format.read_magic(file)
    readers = {(1, 0): numpy_format.read_array_header_1_0, (2, 0): numpy_format.read_array_header_2_0}
    if version not in readers:
        # 3.0 is that of arrays with fields whose names are not Latin-1
        raise InputError(f"expected numbers or strings, of .npy format 1.0 or 2.0, got {version}")
    return readers[version](file)  # type: ignore[no-any-return]


def _load_member(path: Path, member: zipfile.ZipInfo, scratch: Scratch) -> Any:
    """Map an array where it lies, if it is stored as it is; else unpack it first. Its checksum has to be right."""
    np = require("numpy", EXTRA)
    with reading(f"{path}: {member.filename}"), zipfile.ZipFile(path) as archive, archive.open(member) as packed:
        shape, fortran, dtype = _read_header(packed)
        if dtype.hasobject:
            return numpy_pickle.load_strings(packed)
        promised, there = math.prod(shape) * dtype.itemsize, member.file_size - packed.tell()
        if promised != there:
            raise InputError(f"promises {dtype} of shape {shape}, which is {promised} bytes, and has {there}")
        if not promised:
            return np.empty(shape, dtype)
        order = "F" if fortran else "C"
        if member.compress_type == zipfile.ZIP_STORED:
            at = _start(path, member) + packed.tell()
            while packed.read(PIECE):  # at the end of it the checksum is compared
                pass
            return np.memmap(path, dtype, "c", at, shape, order)
        with scratch.file() as unpacked:
            while piece := packed.read(PIECE):
                unpacked.write(piece)
            return unpacked.mapped(dtype, shape, order)


def _start(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a zip member's bytes start: past a local header of 30 bytes, its name and its extra field."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return member.header_offset + 30 + name + extra


def _write_npz(file: IO[bytes], arrays: Mapping[str, Array]) -> None:
    require("numpy", EXTRA).savez(file, **arrays)


def _open_pt(path: Path, _: Scratch) -> Columns:
    stand_ins: list[Any] = [(value, name) for name, value in numpy_pickle.STAND_INS.items()]
    with torch.serialization.safe_globals(stand_ins):
        # files from before PyTorch 1.6 are no zip files, and cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    return {name: partial(_load_pt, content, name) for name in content}


def _load_pt(content: Mapping[str, Any], name: str) -> Any:
    """A list, or a tensor that is laid out in memory as its shape says."""
    column = content[name]
    if isinstance(column, numpy_pickle.PickledArray):
        return column.array()
    if isinstance(column, Tensor):
        if column.is_meta or column.is_quantized or column.is_nested or column.layout != torch.strided:
            kind = "meta" if column.is_meta else "quantized" if column.is_quantized else "nested or sparse"
            raise InputError(f"expected a dense tensor {name!r}, got a {kind} one")
        if column.numel() * column.itemsize > column.untyped_storage().nbytes():
            raise InputError(f"expected a tensor {name!r} with a place for every number, got strides {column.stride()}")
        return column.detach()
    return column


def _write_pt(file: IO[bytes], arrays: Mapping[str, Array]) -> None:
    # tensors have no strings
    torch.save({n: a.tolist() if a.dtype.kind == "U" else torch.from_numpy(a) for n, a in arrays.items()}, file)


def _open_safetensors(path: Path, _: Scratch) -> Columns:
    file = require("safetensors", EXTRA).safe_open(path, framework="pt")
    return {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118 - it is no mapping


def _write_safetensors(file: IO[bytes], arrays: Mapping[str, Array]) -> None:
    file.write(require("safetensors.numpy", EXTRA).save(dict(arrays)))


def _parts(folder: Path) -> list[Path]:
    """The Parquet files of a folder and those in it, in the order of their paths; Spark's other files left out."""
    hidden = re.compile(r"[._]")
    return sorted(p for p in folder.rglob("*.parquet") if not any(map(hidden.match, p.relative_to(folder).parts)))


def _open_parquet(path: Path, scratch: Scratch) -> Columns:
    parquet = require("pyarrow.parquet", EXTRA)
    files = []
    for part in _parts(path) if path.is_dir() else [path]:
        with reading(part):
            # with a buffer, pages are read as they are needed, not a row group at once
            files.append(parquet.ParquetFile(part, buffer_size=1 << 20, pre_buffer=False))
            if not files[-1].schema_arrow.equals(files[0].schema_arrow):
                raise InputError("has other columns or types than the first file of its folder")
    return {name: partial(_load_parquet, files, name, scratch) for name in files[0].schema_arrow.names}


def _load_parquet(files: Sequence[Any], name: str, scratch: Scratch) -> Any:
    """A column of lists as (T, C), by way of a temporary file; any other as (T,)."""
    np, arrow = require("numpy", EXTRA), require("pyarrow", EXTRA)
    types, kind = arrow.types, files[0].schema_arrow.field(name).type
    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        if sum(file.metadata.num_rows for file in files) * 8 > scratch.limit:
            raise InputError(f"has more rows in {name!r} than --max-unpacked allows")
        column = arrow.concat_tables([file.read(columns=[name]) for file in files]).column(0)
        if not types.is_floating(kind):  # a missing float is NaN
            _refuse_nulls(column, 0, name)
        values = column.to_numpy()
        return np.array(values.tolist()) if values.dtype.hasobject else values
    one = kind.value_type
    if not (types.is_floating(one) or types.is_integer(one) or types.is_boolean(one)):
        # of others NumPy has objects, which are addresses in memory
        raise InputError(f"expected lists of numbers in {name!r}, got {kind}")
    shape = 0, kind.list_size if types.is_fixed_size_list(kind) else 0
    with scratch.file() as unpacked:
        for file in files:
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=[name]):
                rows = _dense(batch.column(0), *shape, name)
                unpacked.write(np.ascontiguousarray(rows))
                shape = shape[0] + rows.shape[0], rows.shape[1]
        return unpacked.mapped(rows.dtype, shape) if all(shape) else np.empty(shape, one.to_pandas_dtype())


def stack(columns: Columns, pattern: str, scratch: Scratch) -> Any:
    """Columns of one number a row as (T, C): those whose names match a pattern such as "f*", by the numbers in them."""
    np = require("numpy", EXTRA)
    names = fnmatch.filter(columns, pattern)
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    first = np.asarray(columns[names[0]]())
    shape = len(first), len(names)
    with scratch.file() as unpacked:
        rows = unpacked.reserve(first.dtype, shape)
        for place, name in enumerate(names):
            column = np.asarray(columns[name]())
            if column.shape != first.shape or column.dtype != first.dtype:
                raise InputError(
                    f"expected {first.dtype} of shape {first.shape} in {name!r}, as in {names[0]!r}, "
                    f"got {column.dtype} of shape {column.shape}"
                )
            rows[:, place] = column
        return unpacked.mapped(first.dtype, shape)


def _dense(lists: Any, first: int, width: int, name: str) -> Any:
    """Rows `first` on of a column of lists as an array; all lists have to be as long as those before, `width`."""
    _refuse_nulls(lists, first, name)
    lengths = require("pyarrow.compute", EXTRA).list_value_length(lists).to_numpy(zero_copy_only=False)
    if not first:
        width = int(lengths[0])
    ragged = (lengths != width).nonzero()[0]
    if len(ragged):
        raise RowError(first + int(ragged[0]), f"{lengths[ragged[0]]} values in {name!r}, {width} in the rows before")
    values = lists.flatten()
    if values.null_count and not require("pyarrow", EXTRA).types.is_floating(values.type):
        at = int(require("numpy", EXTRA).asarray(values.is_null()).argmax())
        raise RowError(first + at // width, f"a value in {name!r} is null, expected one in every place of integers")
    return values.to_numpy(zero_copy_only=False).reshape(len(lists), width)


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
    ".pth": Format(_open_pt, _write_pt, ("numpy",)),
    ".safetensors": Format(_open_safetensors, _write_safetensors, ("safetensors.numpy",)),
    ".parquet": Format(_open_parquet, _write_parquet, ("pyarrow.parquet",)),
}
