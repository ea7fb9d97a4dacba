"""Everything that wants a GPU, in one command of under ten minutes, with its results in one folder.

    python -m benchmarks.checks.gpu_suite OUT

runs the kernels on small shapes, grid barriers alone, the benchmarks (copies of memory and one large set first, what
others' code compiles last), training steps again and again, which must give the same bits, the tests on the device, and
the small shapes again under compute-sanitizer (memcheck, racecheck). It writes OUT/report.md (tables and targets, with
plots beside it), results.json (pytest-benchmark's), suite.json (what each step did) and log.txt (all output). A step
that cannot run here is left out, and it is said why; without a GPU the tests run in Triton's interpreter and the
benchmarks on the CPU.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

import torch

from benchmarks.harness import device_name, machine
from benchmarks.report.tables import table

SECONDS = 520.0
"""For all steps together. What is stopped at its limit gets INTERRUPT_SECONDS more to write what it has."""
INTERRUPT_SECONDS = 10.0
LIMIT = "LIMIT"
"""Stands in a command for the seconds after which it is to begin nothing new."""
ROW_SECONDS = 40.0
"""That what was begun before that may take: torch.compile of a shape, and the listing on the largest."""
BENCHMARKS = ["benchmarks"]
ROOT = Path(__file__).parents[2]


class Step(NamedTuple):
    """One command with its time limit, or the reason why it is left out."""

    name: str
    command: list[str]
    seconds: float
    left_out: str = ""


class Outcome(NamedTuple):
    """What became of a step."""

    name: str
    outcome: str
    """passed, failed, stopped (at its time limit) or left out."""
    seconds: float
    detail: str
    """The last line that the step printed, or why it was left out."""


def steps(out: Path, quick: bool) -> list[Step]:
    """The suite; ``quick`` runs all of it small, to see that it runs."""
    python = [sys.executable, "-m"]
    no_gpu = "" if torch.cuda.is_available() else "no CUDA device"
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    no_sanitizer = no_gpu or ("" if sanitizer else "compute-sanitizer was not found")
    small = [*python, "benchmarks.checks.small_shapes"]
    workers = str(min(os.cpu_count() or 1, 16))  # the first run compiles, which takes a core seconds a kernel
    sanitized = [sanitizer or "compute-sanitizer", "--error-exitcode", "9", "--tool"]
    parallel = ["-n", workers] if find_spec("xdist") and not quick else []
    tests = ["tests/test_report.py", "-k", "targets"] if quick else ["tests", "--on-device"]
    results = out / "results.json"
    timed = [*python, "pytest", "-q", "-rs", *BENCHMARKS]
    timed += ["--benchmark-only", f"--benchmark-json={results}", f"--time-limit={LIMIT}", *["--quick"] * quick]
    return [
        Step("small shapes", [*small, workers], 40, no_gpu),
        Step("barriers", [*python, "benchmarks.checks.barriers"], 20, no_gpu),
        Step("benchmarks", timed, 200),
        Step("repeats", [*python, "benchmarks.checks.repeats"], 40, no_gpu),
        # interpreted, with the time of what is left out
        Step("tests", [*python, "pytest", "-q", *parallel, *tests], 300 if no_gpu else 150),
        Step("memcheck", [*sanitized, "memcheck", *small], 50, no_sanitizer),
        # hazards, not warnings: those it gives for the reductions that Triton itself makes
        Step("racecheck", [*sanitized, "racecheck", "--racecheck-detect-level", "error", *small], 50, no_sanitizer),
        Step("report", [*python, "benchmarks.report", str(results), "--out", str(out)], 30),
    ]


def run(step: Step, seconds: float, log: IO[str]) -> Outcome:
    """Run one step for at most ``seconds``, with its output in the log."""
    if step.left_out:
        log.write(f"\n===== {step.name}: left out, {step.left_out}\n")
        return Outcome(step.name, "left out", 0.0, step.left_out)
    log.write(f"\n===== {step.name}: {' '.join(step.command)}\n")
    log.flush()
    start, begin = log.tell(), time.monotonic()
    command = [word.replace(f"={LIMIT}", f"={max(seconds - ROW_SECONDS, 0):.0f}") for word in step.command]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        outcome = "passed" if process.wait(timeout=max(seconds, 0)) == 0 else "failed"
    except subprocess.TimeoutExpired:
        outcome = "stopped"
        _stop(process)
    log.seek(0, os.SEEK_END)
    return Outcome(step.name, outcome, time.monotonic() - begin, _last_line(Path(log.name), start))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a step and all that it started, and kill what does not end."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=INTERRUPT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(log: Path, start: int) -> str:
    """The last line of the log from byte ``start`` on that says something."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip("=- \t") for line in file.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:300]


def tools() -> dict[str, str]:
    """What the suite can use here."""
    driver = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "GPU": device_name(torch.device("cuda")) if torch.cuda.is_available() else "none",
        "driver": driver or "none",
        **{name: "there" if find_spec(name) else "missing" for name in ("fvcore", "matplotlib", "triton", "xdist")},
        **{
            name: "there" if find_spec(name) else "missing" for name in ("torch_fps", "torch_quickfps", "torch_cluster")
        },
    }


def summary(outcomes: list[Outcome], found: dict[str, str]) -> str:
    """The suite's part of the report."""
    lines = ["## The suite", ""]
    lines += table(("step", "", "seconds", ""), ((o.name, o.outcome, f"{o.seconds:.0f}", o.detail) for o in outcomes))
    lines += [", ".join(f"{name}: {value}" for name, value in found.items()), ""]
    if found["GPU"] == "none":
        lines += ["There is no GPU here: what a GPU would do is still to be measured.", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command: 0 if every step that could run passed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checks.gpu_suite", description="Test and measure on a GPU."
    )
    parser.add_argument("out", type=Path, help="folder for the results; what the suite left there is replaced")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    args = parser.parse_args(argv)
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "report.md"):
        (out / name).unlink(missing_ok=True)
    deadline = time.monotonic() + SECONDS
    outcomes = []
    planned = steps(out, args.quick)
    with (out / "log.txt").open("w+") as log:
        for number, step in enumerate(planned):
            still = sum(later.seconds for later in planned[number + 1 :] if later.name == "report")
            outcome = run(step, min(step.seconds, deadline - time.monotonic() - still), log)
            print(f"{outcome.name}: {outcome.outcome} in {outcome.seconds:.0f} s. {outcome.detail}", flush=True)
            outcomes.append(outcome)
    found = tools()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {"machine": machine(device), "tools": found, "steps": [o._asdict() for o in outcomes]}
    (out / "suite.json").write_text(json.dumps(record, indent=1) + "\n")
    with (out / "report.md").open("a") as report:
        report.write(summary(outcomes, found))
    print(out / "report.md")
    return int(any(o.outcome in ("failed", "stopped") for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
