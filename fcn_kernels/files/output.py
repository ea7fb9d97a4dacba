"""Files that appear whole, under the name that was asked for, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from fcn_kernels.extras import require
from fcn_kernels.files.formats import EXTRA, InputError, format_of, suffix_of

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array


def check_output(path: Path, read_from: Iterable[Path], overwrite: bool) -> None:
    """Raise InputError, before the work, for what could not be written after it, or would be lost.

    Args:
        path: where the output will go.
        read_from: files that the work reads, which the output cannot replace.
        overwrite: whether a file that is there may be replaced.
    """
    try:
        there = os.stat(path)
    except FileNotFoundError:
        there = None
    except (OSError, ValueError) as error:  # too long, a loop of links, a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{str(path)!r}: cannot be written: {reason}") from error
    try:
        descriptor, trial = _new_file(_target(path))
    except OSError as error:
        raise InputError(f"{path}: expected a file in a folder that exists and can be written to") from error
    os.close(descriptor)
    trial.unlink()
    if there is None:
        return
    if not stat.S_ISREG(there.st_mode):
        raise InputError(f"{path}: is a folder" if path.is_dir() else f"{path}: is no regular file")
    if any(other.exists() and other.samefile(path) for other in read_from):
        raise InputError(f"{path}: is read from, and cannot be written too")
    if not overwrite:
        raise InputError(f"{path}: is there already; --overwrite replaces it")


def check_columns_output(path: Path, read_from: Iterable[Path], overwrite: bool, *packages: str) -> None:
    """As :func:`check_output`, for :func:`write_columns`.

    Raises:
        ImportError: what the format needs, or one of these packages, is not installed.
        InputError: no format has the suffix; or as :func:`check_output`.
    """
    for package in (*format_of(path).packages, *packages):
        require(package, EXTRA)
    check_output(path, read_from, overwrite)


def check_ids(path: Path, ids: Array) -> None:
    """Raise InputError if a file of this suffix cannot hold ids of this kind."""
    if suffix_of(path) == ".safetensors" and ids.dtype.kind == "U":
        raise InputError(f"{path}: .safetensors cannot hold template ids that are strings: choose another format")


def write_columns(path: Path, columns: Mapping[str, Array], overwrite: bool) -> None:
    """Write arrays of one length by their names, in the format of the suffix."""
    with replacing(path, overwrite) as file:
        format_of(path).write(file, columns)


@contextmanager
def replacing(path: Path, overwrite: bool) -> Iterator[IO[bytes]]:
    """A file to write, which becomes `path` when all is written, and is gone on any exception.

    It is written beside `path` under a name that no one can know beforehand, and is never opened where something is
    already. A file that is replaced hands on its mode; a link stays a link.

    Raises:
        FileExistsError: not `overwrite`, and a file has appeared at `path` meanwhile. It stays as it is.
    """
    target = _target(path)
    descriptor, temporary = _new_file(target)
    try:
        with open(descriptor, "wb") as file:
            if overwrite and target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(target)
        else:
            _move_to_new(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _new_file(target: Path) -> tuple[int, Path]:
    """A descriptor and the name of a new file beside the target."""
    temporary = target.with_name(f".fcn-{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.open(temporary, flags, 0o666), temporary


def _target(path: Path) -> Path:
    """Where a path leads, also if nothing is there yet."""
    return Path(os.path.realpath(path))


def _move_to_new(temporary: Path, target: Path) -> None:
    """Rename, but only where nothing is: a hard link fails there, which a rename does not."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if error.errno == errno.EEXIST or target.exists():
            raise FileExistsError(
                errno.EEXIST, "appeared during the run, and stays as it is; --overwrite would replace it", str(target)
            ) from None
        temporary.replace(target)  # a file system without hard links
