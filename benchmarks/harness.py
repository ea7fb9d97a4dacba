"""How the benchmarks measure: calls timed in turns, the machine's copy bandwidth, and what is known of the machine.

On a GPU a sample is the time between two device events around some calls, with the queue held back by a spinning
kernel while the host fills it, so that what is timed is the device and not the launches. On a CPU it is wall-clock
time, after an untimed call on other inputs: there the contender before would leave its traces, in caches and in what
the allocator holds. Contenders take turns, and each turn takes the next of several inputs, together larger than the
last-level cache.
"""

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fcn_kernels

Contender = Callable[[int], object]
"""One call of what is timed. The number is the turn, by which it chooses among its inputs."""

CACHE_BYTES = 64 << 20  # the H100's L2 is 50 MiB; the last-level cache of a CPU socket is seldom larger
COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
SAMPLE_SECONDS = 2e-4  # a sample of short calls holds several: device events tell times apart by about a microsecond
MOST_CALLS = 20
LEAST_ROUNDS, MOST_ROUNDS = 3, 200
LONG_ROUND = 5.0  # seconds; of longer ones, two are enough
LONGEST_LED = 0.05  # seconds; a longer call does not notice what was before it
MOST_LEAD = 0.02  # seconds that the queue is held back: longer than the host takes for all but loops over sets


class Timing(NamedTuple):
    """Seconds a call: median and quartiles over the samples."""

    median: float
    q1: float
    q3: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        """Quartiles of at least two samples."""
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3, len(samples))


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = "device events" if device.type == "cuda" else "wall clock"
        if device.type == "cuda":
            self.cycles = self._cycles_per_second()

    def sample(self, contender: Contender, turn: int, calls: int = 1, host: float = 0.0, led: bool = False) -> float:
        """Seconds a call; ``host`` is what the host needs to queue one; ``led``: after an untimed one, on a CPU."""
        if self.device.type == "cpu":
            if led:
                contender(turn * calls - 1)
            begin = time.perf_counter()
            for call in range(calls):
                contender(turn * calls + call)
            return (time.perf_counter() - begin) / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        lead = min(1.5 * host * calls + 5e-5, MOST_LEAD)
        torch.cuda._sleep(int(lead * self.cycles))
        start.record()
        for call in range(calls):
            contender(turn * calls + call)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls

    def host_seconds(self, contender: Contender, turn: int) -> float:
        """Wall-clock seconds until a call returns, which on a GPU is when its work is queued."""
        self.wait()
        begin = time.perf_counter()
        contender(turn)
        seconds = time.perf_counter() - begin
        self.wait()
        return seconds

    def wait(self) -> None:
        """Until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _cycles_per_second(self) -> float:
        spin = 10_000_000
        torch.cuda._sleep(spin)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(spin)
        end.record()
        end.synchronize()
        return spin / (float(start.elapsed_time(end)) / 1e3)


def interleave(
    contenders: Mapping[str, Contender], clock: Clock, seconds: float
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time contenders in turns, for about ``seconds`` in all.

    Returns the timings, and for each contender that raised in its warm-up the error: a baseline that cannot run
    here is missing from the results, with the reason, and the others are timed.
    """
    plans: dict[str, _Plan] = {}
    failures: dict[str, str] = {}
    for name, contender in contenders.items():
        try:
            contender(0)
            host = clock.host_seconds(contender, 1) if clock.device.type == "cuda" else 0.0
            estimate = clock.sample(contender, 2, host=host)
        except Exception as error:
            failures[name] = reason(error)
            continue
        calls = max(1, min(MOST_CALLS, int(SAMPLE_SECONDS / estimate)))
        led = clock.device.type == "cpu" and estimate < LONGEST_LED
        plans[name] = _Plan(contender, calls, host, led, (calls + led) * max(estimate, host))
    of_round = sum(plan.seconds for plan in plans.values())
    rounds = int(seconds / max(of_round, 1e-9))
    rounds = max(LEAST_ROUNDS if of_round < LONG_ROUND else 2, min(MOST_ROUNDS, rounds))
    samples: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(rounds):
        for name, plan in plans.items():
            if plan.led:
                plan.contender(turn * plan.calls - 1)
            samples[name].append(clock.sample(plan.contender, turn, plan.calls, plan.host))
    return {name: Timing.of(s) for name, s in samples.items()}, failures


class _Plan(NamedTuple):
    contender: Contender
    calls: int  # in a sample
    host: float  # seconds that the host needs to queue one
    led: bool  # by an untimed call
    seconds: float  # of a round


def reason(error: BaseException) -> str:
    """One line for why something could not be measured."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def copy_bandwidth(clock: Clock) -> float:
    """Bytes a second, read and written, of the fastest plain copy of a tensor larger than any cache."""
    size = COPY_BYTES[clock.device.type]
    source = torch.ones(size // 4, device=clock.device)
    target = torch.empty_like(source)
    samples = [clock.sample(lambda _: target.copy_(source), turn) for turn in range(12)]
    return 2 * size / statistics.median(samples[2:])


def machine(device: torch.device) -> dict[str, Any]:
    """What every row says of where it was measured."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fcn_kernels": fcn_kernels.__version__,
        "commit": commit(),
        "threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of its cores that this process has."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def commit() -> str:
    """The commit measured: from git, or where there is no repository from FCN_COMMIT."""
    root = Path(__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FCN_COMMIT", "unknown")
    return found


def free_memory() -> None:
    """Give back what the last measurement held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
