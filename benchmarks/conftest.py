"""What the benchmarks share: one device, one copy bandwidth, and result rows that carry where they come from.

Columns of the JSON that ``--benchmark-json`` writes: ``stats`` is pytest-benchmark's own, wall-clock time of a few
calls with the wait for the device in it, useful as a cross-check; ``extra_info`` is a
:class:`benchmarks.report.results.Row`, with times by the clock that it names (device events on a GPU).
"""

import os
import re
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.harness import Clock, Contender, Timing, copy_bandwidth, free_memory, interleave, machine, reason
from benchmarks.report.results import Row
from benchmarks.workloads import (
    COMPILED,
    FORWARD,
    FUSED,
    LOOP,
    LOOPED_SETS,
    Case,
    Inputs,
    implementations,
    least_bytes,
    moved_bytes,
    tiers,
)

CONTENDER_SECONDS = {"cuda": 0.2, "cpu": 0.5, "quick": 0.02}
COMPILE_SECONDS = {"cuda": 120.0, "cpu": 40.0, "quick": 0.0}
"""What torch.compile may take in all: it builds C++ on a CPU and Triton on a GPU, 5 to 20 s for each shape."""

CPU_SECONDS = 180.0
"""After which a CPU starts no new row, so that all of it ends within four minutes."""
ORDER = (
    "bandwidth",
    "scaling",
    "memory",
    "flops",
    "host",
    "graphs",
    "kcenter",
    "selection",
    "attention",
    "clustering",
    "neighbors",
    "threads",
    "distributed",
    "apart",
    "samplers",
    "peers",
)
"""The short and the most wanted first, should time run out; what others' code takes to compile is not ours to bound."""


class Race(NamedTuple):
    """Contenders timed in turns."""

    contenders: Mapping[str, Contender]
    inputs: list[Inputs]
    timings: dict[str, Timing]
    failures: dict[str, str]


class Bench:
    """The device of this run, and what was measured of it."""

    def __init__(self, size: str) -> None:
        self.size = size
        """"cuda", "cpu" or "quick", which chooses what is measured."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.clock = Clock(self.device)
        self.copy_rate = copy_bandwidth(self.clock)
        self.about = machine(self.device) | {"copy_gb_per_s": self.copy_rate / 1e9}
        self.compile_left = COMPILE_SECONDS[size]
        self._key: object = None
        self._race: Race | None = None

    def race(self, key: object, build: Callable[[], tuple[dict[str, Contender], list[Inputs]]]) -> Race:
        """Time contenders side by side, once for the rows that come of them. Only the last race is remembered."""
        if self._race is None or key != self._key:
            self._race = None
            free_memory()
            contenders, inputs = build()
            failures = {}
            if COMPILED in contenders:
                failures = self._compile(contenders)
            timings, failed = interleave(contenders, self.clock, CONTENDER_SECONDS[self.size] * len(contenders))
            self._key, self._race = key, Race(contenders, inputs, timings, failures | failed)
        return self._race

    def record(
        self, benchmark: Any, race: Race, name: str, group: str, moved: int | None, timed_as: str = "", **facts: Any
    ) -> None:
        """The result row of an implementation, which the race may call otherwise; skipped if a baseline failed."""
        contender = timed_as or name
        if contender in race.failures:
            (pytest.fail if name == FUSED else pytest.skip)(race.failures[contender])
        timing = race.timings[contender]
        scale = facts.get("scaled_by", 1.0)
        rate = None if moved is None else moved / (timing.median * scale)
        self.facts(
            benchmark,
            group,
            implementation=name,
            clock=self.clock.name,
            median_s=timing.median * scale,
            q1_s=timing.q1 * scale,
            q3_s=timing.q3 * scale,
            samples=timing.samples,
            bytes_moved=moved,
            gb_per_s=None if rate is None else rate / 1e9,
            copy_share=None if rate is None else rate / self.copy_rate,
            **facts,
        )

        def call() -> None:
            race.contenders[contender](0)
            self.clock.wait()

        benchmark.pedantic(call, rounds=3 if timing.median < 0.1 else 1, iterations=1)

    def selection(self, benchmark: Any, group: str, case: Case, work: str, name: str, names: tuple[str, ...]) -> Race:
        """The row of one implementation of a case, timed in turns with the others of ``names``."""
        race = self.race((names, case, work), lambda: implementations(names, case, work, self.device))
        self.selected(benchmark, group, race, case, work, name, race.inputs[0])
        return race

    def selected(
        self, benchmark: Any, group: str, race: Race, case: Case, work: str, name: str, inputs: Inputs,
        timed_as: str = "",
    ) -> None:  # fmt: skip
        """The row of one implementation of a case in a race, and what is known of the work."""
        facts = {"work": work, "least_bytes": least_bytes(case, work), **case.facts}
        moved = None
        if name == FUSED:
            moved = moved_bytes(case, inputs, work)
            facts["tiers"] = tiers(case, inputs)[: 1 if work == FORWARD else 2]
        elif name == LOOP:
            facts["scaled_by"] = case.sets / min(LOOPED_SETS, case.sets)
        self.record(benchmark, race, name, group, moved, timed_as, **facts)

    def facts(self, benchmark: Any, group: str, **facts: Any) -> None:
        """What a result row says beside its time."""
        benchmark.group = group
        benchmark.extra_info.update(Row(**self.about, group=group, **facts).as_json())

    def _compile(self, contenders: dict[str, Contender]) -> dict[str, str]:
        """Compile the compiled contender, or take it out where its time is up."""
        if self.compile_left <= 0:
            del contenders[COMPILED]
            return {COMPILED: f"the {COMPILE_SECONDS[self.size]:.0f} s that torch.compile may take here were spent"}
        begin = time.perf_counter()
        try:
            contenders[COMPILED](0)
        except Exception as error:
            del contenders[COMPILED]
            return {COMPILED: reason(error)}
        finally:
            self.compile_left -= time.perf_counter() - begin
        return {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The benchmarks' own options."""
    group = parser.getgroup("fcn_kernels benchmarks")
    group.addoption("--quick", action="store_true", help="tiny sizes, to see that all runs; its times mean nothing")
    group.addoption(
        "--time-limit", type=float, default=None, metavar="S", help="skip what would start later (CPU: 180)"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each module lists its rows for a size of machine."""
    if "row" in metafunc.fixturenames:
        rows = metafunc.module.rows(_size(metafunc.config))
        metafunc.parametrize("row", rows, ids=["-".join(map(_name, row)) for row in rows])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which the benchmarks run; within a module it stays."""
    places = {Path(__file__).with_name(f"test_{name}.py"): place for place, name in enumerate(ORDER)}
    items.sort(key=lambda item: places.get(item.path, len(ORDER)))


def _name(part: object) -> str:
    """In a form that ``-k`` can choose by."""
    return re.sub(r"\W+", "_", str(part).replace("=", ""))


def _size(config: pytest.Config) -> str:
    if config.getoption("--quick"):
        return "quick"
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config) -> Generator[Bench]:
    """The one of this run. Triton's interpreter is never timed."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("TRITON_INTERPRET=1 is set: the benchmarks would time Triton's interpreter")
    made = Bench(_size(pytestconfig))
    yield made
    free_memory()


_began = time.monotonic()
_skipped: dict[str, str] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Keep to the time limit."""
    limit = item.config.getoption("--time-limit")
    if limit is None and _size(item.config) == "cpu":
        limit = CPU_SECONDS
    if limit is not None and time.monotonic() - _began > limit:
        pytest.skip(f"the time limit of {limit:.0f} s was reached")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember why a row is missing."""
    if report.skipped and isinstance(report.longrepr, tuple):
        _skipped[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        _skipped[report.nodeid] = "failed"


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """The results say what is missing from them, and why."""
    output_json["missing"] = dict(_skipped)
