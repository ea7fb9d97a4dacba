"""Runs that must give the same bits: the check itself, and that it can fail."""

import pytest
import torch

from benchmarks.checks.repeats import main, repeat, steps


def test_training_steps_give_the_same_bits_again(device: torch.device) -> None:
    for name, step in steps(device, small=True).items():
        result = repeat(name, step, times=3, seconds=60)
        assert (result.times, result.differing) == (3, 0)


def test_a_result_that_differs_now_and_then_is_counted() -> None:
    calls = iter(range(100))
    result = repeat("odd", lambda: (torch.tensor(float(next(calls) % 3 == 2)),), times=9, seconds=60)
    assert result.differing == 3


def test_the_command_says_what_it_ran(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--times", "2", "--small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{name}: 0 of 2 runs differ from the first" for name in ("streamed", "split", "packed", "head")]
