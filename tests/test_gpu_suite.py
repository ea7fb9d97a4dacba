"""The GPU suite: its steps one by one, and the whole of it, small, on whatever machine this is."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.checks import gpu_suite
from benchmarks.checks.gpu_suite import LIMIT, Outcome, Step, run, steps, summary
from benchmarks.conftest import ORDER

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")


def python(code: str, seconds: float = 30, name: str = "step") -> Step:
    return Step(name, [sys.executable, "-c", code], seconds)


def outcome_of(step: Step, folder: Path, seconds: float | None = None) -> Outcome:
    with (folder / "log.txt").open("w+") as log:
        return run(step, step.seconds if seconds is None else seconds, log)


def test_exit_code_decides_and_the_last_line_tells(tmp_path: Path) -> None:
    good = outcome_of(python("print('first'); print('== 3 passed =='); print()"), tmp_path)
    assert (good.outcome, good.detail) == ("passed", "3 passed")
    assert "first" in (tmp_path / "log.txt").read_text()
    bad = outcome_of(python("print('Error: why'); raise SystemExit(9)"), tmp_path)
    assert (bad.outcome, bad.detail) == ("failed", "Error: why")


def test_a_step_is_stopped_at_its_limit_and_may_write_what_it_has(tmp_path: Path) -> None:
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('wrote what there was')"
    begin = time.monotonic()
    stopped = outcome_of(python(code), tmp_path, seconds=1.5)
    assert time.monotonic() - begin < 30
    assert (stopped.outcome, stopped.detail) == ("stopped", "wrote what there was")


def test_a_step_that_does_not_heed_the_interrupt_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "INTERRUPT_SECONDS", 0.5)
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    begin = time.monotonic()
    assert outcome_of(python(code), tmp_path, seconds=1.5).outcome == "stopped"
    assert time.monotonic() - begin < 30


def test_a_step_learns_how_long_it_may_begin_new_things(tmp_path: Path) -> None:
    step = Step("step", [sys.executable, "-c", "import sys; print(sys.argv[1])", f"--time-limit={LIMIT}"], 100)
    assert outcome_of(step, tmp_path, seconds=70).detail.endswith("time-limit=30")


def test_the_interpreter_is_never_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert outcome_of(python("import os; print(os.environ.get('TRITON_INTERPRET'))"), tmp_path).detail == "None"


def test_all_limits_together_stay_under_ten_minutes(tmp_path: Path) -> None:
    planned = steps(tmp_path, quick=False)
    assert gpu_suite.SECONDS + gpu_suite.INTERRUPT_SECONDS * len(planned) <= 600
    assert [s.name for s in planned] == [
        "small shapes",
        "barriers",
        "benchmarks",
        "repeats",
        "tests",
        "memcheck",
        "racecheck",
        "report",
    ]


def test_benchmarks_begin_with_memory_and_end_with_what_others_compile() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q", "--benchmark-only", "--quick"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=gpu_suite.ROOT, env=environment, capture_output=True, text=True, check=False)
    files = [line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line]
    order = [Path(name).stem.removeprefix("test_") for name in dict.fromkeys(files)]
    first = [line for line in done.stdout.splitlines() if "::" in line][:4]
    assert order[0] == "bandwidth", done.stdout + done.stderr
    assert [name in line for name, line in zip(("copy", "sum", "large", "large"), first, strict=True)] == [True] * 4
    assert order == [name for name in ORDER if name in order]  # none is left out of it
    assert set(order[-2:]) == {"samplers", "peers"}


def test_what_cannot_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda *_, **__: None)
    by_name = {s.name: s for s in steps(tmp_path, quick=False)}
    assert by_name["memcheck"].left_out == by_name["racecheck"].left_out == "compute-sanitizer was not found"
    assert by_name["small shapes"].left_out == by_name["benchmarks"].left_out == ""
    assert "--on-device" in by_name["tests"].command
    assert by_name["repeats"].left_out == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    by_name = {s.name: s for s in steps(tmp_path, quick=False)}
    for name in ("small shapes", "barriers", "memcheck", "racecheck", "repeats"):
        assert by_name[name].left_out == "no CUDA device"
        assert outcome_of(by_name[name], tmp_path) == Outcome(name, "left out", 0.0, "no CUDA device")


def test_on_device_leaves_out_the_tests_that_show_nothing_of_a_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/test_op.py", "--on-device"]
    done = subprocess.run(command, cwd=gpu_suite.ROOT, capture_output=True, text=True, check=False)
    assert "test_opcheck_of_the_forward_operator[" in done.stdout, done.stdout + done.stderr
    assert "test_compiles" not in done.stdout
    assert "deselected" in done.stdout


def test_summary_says_that_there_was_no_gpu() -> None:
    text = summary([Outcome("memcheck", "left out", 0.0, "no CUDA device")], {"GPU": "none", "fvcore": "missing"})
    assert "| memcheck | left out | 0 | no CUDA device |" in text
    assert "fvcore: missing" in text
    assert "still to be measured" in text
    assert "still to be measured" not in summary([], {"GPU": "NVIDIA H100"})


def test_the_whole_suite_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "BENCHMARKS", ["benchmarks/test_scaling.py"])
    out = tmp_path / "new" / "results"
    code = gpu_suite.main([str(out), "--quick"])
    record = json.loads((out / "suite.json").read_text())
    outcomes = {s["name"]: s["outcome"] for s in record["steps"]}
    assert outcomes["tests"] == outcomes["benchmarks"] == outcomes["report"] == "passed", (out / "log.txt").read_text()
    if not torch.cuda.is_available():
        assert code == 0
        assert {n for n in outcomes if outcomes[n] == "left out"} == {
            *("small shapes", "barriers", "memcheck", "racecheck", "repeats")
        }
        assert record["tools"]["GPU"] == "none"
    text = (out / "report.md").read_text()
    assert "## Targets" in text
    assert "## The suite" in text
    # few enough to be fetched from a machine by hand
    assert {p.name for p in out.iterdir()} == {"suite.json", "results.json", "report.md", "log.txt", "time.png"}


def test_a_failed_step_fails_the_suite_and_the_rest_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = [python("raise SystemExit(1)", name="tests"), python("print('done')", name="report")]
    monkeypatch.setattr(gpu_suite, "steps", lambda out, quick: planned)
    assert gpu_suite.main([str(tmp_path)]) == 1
    assert [s["outcome"] for s in json.loads((tmp_path / "suite.json").read_text())["steps"]] == ["failed", "passed"]
