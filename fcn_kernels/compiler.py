"""Compiles the package's C++ on the machine that runs it, once, as Triton does with its kernels.

So the package stays the same files everywhere, and the code is made for the CPU that it runs on.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

_log = logging.getLogger(__name__)
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fopenmp",
    "-pthread",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
)


class CompilerError(RuntimeError):
    """The code does not compile, or what is compiled does not load."""


class NoCompilerError(CompilerError):
    """There is no compiler here."""


@functools.cache
def load(source: Path, *definitions: str) -> ctypes.CDLL:
    """The library that ``source`` makes with ``-D`` definitions: compiled, or taken from an earlier process.

    The compiler is ``$CXX``, or c++, g++ or clang++. Libraries are kept in ``fcn_kernels`` under ``$XDG_CACHE_HOME``
    or ``~/.cache``, under a name that changes with the sources beside it, the compiler, the CPU and PyTorch's threads.

    Raises:
        CompilerError: no library can be made or loaded.
    """
    compiler, threads = _compiler(), _threads()
    version = _run([*compiler, "--version"])
    sources = [path.read_bytes() for path in sorted(source.parent.glob("*.[ch]*"))]
    made_of = (sources, definitions, compiler, version, _FLAGS, [t.name for t in threads], _cpu())
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:20]
    library = _folder() / f"{source.stem}-{key}.so"
    if not library.exists():
        _log.info("compiling %s", source.name)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            defined = (f"-D{d}" for d in definitions)
            _run([str(part) for part in (*compiler, *_FLAGS, *defined, source, *threads, "-o", made)])
            made.replace(library)  # whole or not at all, whoever else does the same
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CompilerError(str(error)) from error


def _run(command: list[str]) -> str:
    """What a command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CompilerError(str(error)) from error
    if done.returncode:
        raise CompilerError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _compiler() -> tuple[str, ...]:
    if sys.platform != "linux":
        raise NoCompilerError("it is compiled on Linux alone")
    named = os.environ.get("CXX")
    if named:
        return tuple(named.split())
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return (name,)
    raise NoCompilerError("there is no C++ compiler: no $CXX, c++, g++ or clang++")


def _threads() -> list[Path]:
    """PyTorch's own OpenMP library, where its wheel carries one: two of them would be two teams of threads."""
    folder = Path(torch.__file__).parent / "lib"
    return sorted(folder.glob("libgomp*.so*"))[:1]


def _cpu() -> str:
    """What -march=native depends on; a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


@functools.cache
def _folder() -> Path:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fcn_kernels"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # read-only, or no home: compile anew in each process
        return Path(tempfile.mkdtemp(prefix="fcn_kernels-"))
