"""Every kernel's launch arrives at a driver as it was meant to: `benchmarks/checks/launches.py` has one that stands in.

The runtime that brings it there is Triton's own, which the interpreter, where all other tests of kernels run, replaces.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.checks import launches
from benchmarks.checks.builds import (
    ATTENTION_KERNELS,
    CHUNK_KERNELS,
    NEIGHBORS_KERNELS,
    SELECTION_KERNELS,
    SUMS_KERNELS,
)

LAUNCH = launches.Launch("kernel", 12, 128, 1024, 64, True, 3)
CODE = ".visible .entry kernel(.param .u64 a, .param .u64 b, .param .u32 c, .param .u64 d, .param .u64 e)"


@pytest.mark.xdist_group("launches")
def test_launches_of_every_kernel_arrive_as_they_were_asked_for():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.checks.launches", "--dtypes", "float32"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    every = {*SELECTION_KERNELS, *ATTENTION_KERNELS, *SUMS_KERNELS, *CHUNK_KERNELS, *NEIGHBORS_KERNELS}
    assert {row[0] for row in rows} == every
    cooperative = launches.Launch._fields.index("cooperative")
    assert {row[0] for row in rows if row[cooperative] == "True"} == set(SELECTION_KERNELS)


def _check(launch: launches.Launch = LAUNCH, shape: tuple[int, ...] = (12, 1, 1), **changes: Any) -> None:
    metadata = SimpleNamespace(num_warps=4, shared=1024)
    asked = {"num_warps": 4, "launch_cooperative_grid": True} | changes
    launches.check(launch, shape, (12,), asked, SimpleNamespace(metadata=metadata, asm={"ptx": CODE}))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"shape": (12, 2, 1)}, "grid"),
        ({"num_warps": 8}, "threads"),
        ({"launch": LAUNCH._replace(threads=256)}, "threads"),
        ({"launch": LAUNCH._replace(shared=0)}, "shared bytes"),
        ({"launch": LAUNCH._replace(arguments=4)}, "arguments that the code"),
        ({"launch_cooperative_grid": False}, "cooperative"),
        ({"launch": LAUNCH._replace(cooperative=False)}, "cooperative"),
        ({"launch": LAUNCH._replace(programs=5000)}, "at once"),
    ],
)
def test_a_launch_that_is_not_the_one_asked_for(changes, what):
    _check()
    with pytest.raises(AssertionError, match=what):
        _check(**changes)


def test_the_interpreter_launches_nothing():
    with pytest.raises(RuntimeError, match="expected TRITON_INTERPRET unset"), launches.stand_in():
        pass
