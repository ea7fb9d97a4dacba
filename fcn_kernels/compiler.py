"""Compiles the package's C++ on the machine that runs it, once, as Triton does with its kernels.

So the package stays the same files everywhere, and the code is made for the CPU that it runs on. What is kept is code
that later processes run: it is loaded only from a folder and a file that are ours alone to write, and only if it is
what was written, to the last byte.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

_log = logging.getLogger(__name__)
_SHARED = Path(__file__).with_name("cpp")
"""Headers of several operations."""
_FLAGS = (
    f"-I{_SHARED}",
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-pthread",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
)
_DIGEST = hashlib.sha256
"""Of a library, and appended to it: what a file has beyond its last section is not loaded."""
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class CompilerError(RuntimeError):
    """The code does not compile, or what is compiled does not load."""


class NoCompilerError(CompilerError):
    """There is no compiler here."""


@functools.cache
def load(source: Path, *definitions: str) -> ctypes.CDLL:
    """The library that ``source`` makes with ``-D`` definitions: compiled, or taken from an earlier process.

    The compiler is ``$CXX``, or g++, c++ or clang++ (whose code has one thread). Libraries are kept in ``fcn_kernels``
    under ``$XDG_CACHE_HOME`` or ``~/.cache``, under a name that changes with the sources beside it, the shared headers,
    the compiler, the CPU and PyTorch's threads. One that is damaged is made again. Where nothing can be kept, or the
    folder is not ours alone to write, each process compiles for itself.

    Raises:
        CompilerError: no library can be made or loaded.
    """
    try:
        return _load(source, definitions)
    except CompilerError:
        raise
    except Exception as error:  # whatever it is, there are PyTorch's operations
        raise CompilerError(f"{type(error).__name__}: {error}") from error


def _load(source: Path, definitions: tuple[str, ...]) -> ctypes.CDLL:
    compiler, (cpu, march) = _compiler(), _cpu()
    version = _run([*compiler, "--version"])
    openmp = _openmp(version)
    files = (*sorted(source.parent.glob("*.[ch]*")), *sorted(_SHARED.glob("*.h")))
    sources = [path.read_bytes() for path in files]
    made_of = (sources, definitions, compiler, version, _FLAGS, march, [Path(flag).name for flag in openmp], cpu)
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:20]
    folder = _folder()
    kept = None if folder is None else folder / f"{source.stem}-{key}.so"
    if kept is not None and (library := _kept(kept)):
        return library
    with _alone(kept) as waited:
        if waited and kept is not None and (library := _kept(kept)):
            return library
        _log.info("compiling %s", source.name)
        with tempfile.TemporaryDirectory(prefix="fcn_kernels-") as place:  # 0700
            made = Path(place) / f"{source.stem}.so"
            defined = (f"-D{d}" for d in definitions)
            _run([str(part) for part in (*compiler, *_FLAGS, *march, *defined, source, *openmp, "-o", made)])
            if not made.is_file():
                raise CompilerError(f"{' '.join(compiler)} wrote no library")
            if kept is not None:
                _keep(made.read_bytes(), kept)
            return ctypes.CDLL(str(made))  # which stays when its file is removed


@contextlib.contextmanager
def _alone(kept: Path | None) -> Iterator[bool]:
    """One process at a time makes a library: others that need it, as the ranks of a job do, wait and find it made.

    Gives whether there was one to wait for. A lock ends with its process; where there can be none, each compiles.
    """
    if kept is None:
        yield False
        return
    lock, held, waited = kept.with_suffix(".lock"), None, False
    try:
        import fcntl  # not where nothing is compiled

        held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(held, fcntl.LOCK_EX)
            waited = True
    except OSError as error:
        _log.info("%s is compiled without a lock: %s", kept.name, error)
    try:
        yield waited
    finally:
        if held is not None:
            with contextlib.suppress(OSError):
                os.unlink(lock)
            os.close(held)


def _kept(path: Path) -> ctypes.CDLL | None:
    """An earlier process's library, or None where there is none that can be trusted."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if reason := _not_ours(os.fstat(file), stat.S_ISREG):
            _log.warning("%s is not loaded: %s", path, reason)
            return None
        with open(file, "rb", closefd=False) as reader:
            content = reader.read()
        size = _DIGEST().digest_size
        if len(content) <= size or _DIGEST(content[:-size]).digest() != content[-size:]:
            _log.warning("%s is damaged, and made again", path)
            return None
        return ctypes.CDLL(str(path))  # nobody else can put another file in its place
    except OSError as error:
        _log.warning("%s is not loaded: %s", path, error)
        return None
    finally:
        os.close(file)


def _keep(library: bytes, path: Path) -> None:
    """Write a library for later processes: whole or not at all, whoever else does the same."""
    temporary = None
    try:
        file, temporary = tempfile.mkstemp(dir=path.parent)  # 0600, of a new name
        with open(file, "wb") as writer:
            writer.write(library + _DIGEST(library).digest())
            writer.flush()
            os.fsync(writer.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _log.info("%s is not kept: %s", path.name, error)
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _folder() -> Path | None:
    """The folder of kept libraries, made if need be; None where there is none that is ours alone to write."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # one that is not absolute is to be ignored, says the specification of these folders
        folder = (Path(named) if os.path.isabs(named) else Path.home() / ".cache") / "fcn_kernels"
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        if reason := _not_ours(folder.lstat(), stat.S_ISDIR):
            _log.warning("%s is not used: %s", folder, reason)
            return None
        return folder
    except (OSError, RuntimeError):  # read-only, or no home
        return None


def _not_ours(found: os.stat_result, is_kind: object) -> str:
    """Why a file or folder is not to be trusted, or ""."""
    if not is_kind(found.st_mode):  # type: ignore[operator]
        return "it is a link or of another kind"
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}"
    if found.st_mode & _WRITABLE_BY_OTHERS:
        return f"others may write to it (mode {stat.S_IMODE(found.st_mode):o})"
    return ""


def _run(command: list[str]) -> str:
    """What a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise CompilerError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _compiler() -> tuple[str, ...]:
    if sys.platform != "linux":
        raise NoCompilerError("it is compiled on Linux alone")
    named = os.environ.get("CXX")
    if named:
        return tuple(named.split())
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return (name,)
    raise NoCompilerError("there is no C++ compiler: no $CXX, g++, c++ or clang++")


def _openmp(version: str) -> list[str]:
    """OpenMP by a compiler of this version, with PyTorch's own library, where its wheel carries one: two of them would
    be two teams of threads.

    Regions by clang and its kin run on a library of their own while PyTorch's, which is GCC's, answers what is asked in
    them, as it was loaded before: all threads are told that they are the first. So what these compile has one thread.
    """
    if "Free Software Foundation" not in version:
        return ["-Wno-unknown-pragmas"]
    folder = Path(torch.__file__).parent / "lib"
    return ["-fopenmp", *map(str, sorted(folder.glob("libgomp*.so*"))[:1])]


def _cpu() -> tuple[str, tuple[str, ...]]:
    """What tells this processor from others that may share a home folder, and the flags to build for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "any", ()
    named = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(sorted({line for line in lines if line.startswith(named)})), ("-march=native",)
