"""Runs that must give the same bits: what repeats them, on each backend of the machine, and that it can fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.checks.repeats import main, repeat, steps

ROOT = Path(__file__).parents[1]
NAMES = ["streamed", "split", "packed", "attention", "head", "sums", "clustering", "neighbors"]


@pytest.mark.parametrize("cpp", ["1", "0"], ids=["default", "without C++"])
def test_training_steps_give_the_same_bits_again(cpp: str, device: torch.device) -> None:
    """On a GPU the kernels; on a CPU the C++, or PyTorch's operations, by two threads."""
    if cpp == "0" and device.type == "cuda":
        pytest.skip("the test of a CPU's backend")
    # threads that wait without spinning, as other tests may have the cores
    environment = {**os.environ, "FCN_KERNELS_CPP": cpp, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "benchmarks.checks.repeats", "--small", "--times", "5", "--seconds", "100"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [f"{name}: 0 of 5 runs differ from the first" for name in NAMES]
    assert (done.returncode, done.stdout.splitlines()) == (0, lines), done.stderr


def test_a_result_that_differs_now_and_then_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def odd() -> tuple[torch.Tensor, ...]:
        return (torch.tensor(float(next(calls) % 3 == 2)),)

    assert repeat("odd", odd, times=9, seconds=60).differing == 3
    monkeypatch.setattr("benchmarks.checks.repeats.steps", lambda *_: {"odd": odd})
    assert main(["--times", "9"]) == 1


def test_every_step_gives_gradients_that_are_not_all_zero(device: torch.device) -> None:
    """Zeros would be the same bits whatever happens."""
    for name, step in steps(device, small=True).items():
        assert all(result.isfinite().all() and result.any() for result in step()), name
