"""The C++ under the address and undefined-behavior sanitizers, over its tests.

    python -m benchmarks.checks.sanitize [PYTEST ARGUMENTS]

The libraries are compiled anew with the sanitizers, into a folder that is removed; a finding ends the run with its
report and exit status 1. It needs g++ with its sanitizers' libraries.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = [
    "tests/test_clustering_cpp.py",
    "tests/test_cpp.py",
    "tests/test_faults_numbers.py",
    "tests/test_neighbors.py",
    "tests/test_select.py",
]
LEFT_OUT = (
    "not triton and not torch] and not [torch and not torch- and not without_a_compiler and not with_a_compiler"
    " and not compiles_ and not running_out_of_memory and not more_picks_than_memory and not switched"
)
"""The other backends, those of the compiler itself, and those that limit the memory that sanitizers want."""
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"


def preloaded(compiler: str) -> str:
    """The libraries that have to be there before Python's own, for LD_PRELOAD."""
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        found.append(str(Path(path.strip()).resolve()))
    return " ".join(found)


def main(arguments: list[str]) -> int:
    """Run the tests; returns the exit status."""
    compiler = shutil.which("g++")
    if compiler is None:
        print("expected g++ with its sanitizers, and there is none")
        return 2
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "CXX": f"{compiler} {FLAGS}",
            "XDG_CACHE_HOME": cache,
            "LD_PRELOAD": preloaded(compiler),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it allocates
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT]
        return subprocess.run([*command, *(arguments or TESTS)], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
