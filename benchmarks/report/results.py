"""Result rows as the report and the targets read them."""

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one benchmark measured: ``extra_info`` of pytest-benchmark's JSON. 0 and "" stand for what it did not."""

    # the machine
    device: str
    device_type: str
    python: str
    torch: str
    triton: str
    fcn_kernels: str
    commit: str
    threads: int
    copy_gb_per_s: float
    # what ran
    group: str
    implementation: str
    work: str
    sets: int
    rows: int | str  # of a set, or "packed"
    all_rows: int
    dim: int
    k: int
    dtype: str
    chunk: int = 0  # rows that see one another; 0: all of a set
    bank: int = 0  # rows that these are searched in
    tiers: list[str] | tuple[str, ...] = ()  # of the fused path, forward and backward
    scaled_by: float = 1.0  # the times are of a sample of the sets, times this
    # its time, a call
    clock: str = ""
    median_s: float = 0.0
    q1_s: float = 0.0
    q3_s: float = 0.0
    samples: int = 0
    # its work, counted
    multiply_adds: int | str = 0  # or why they could not be counted
    least_bytes: int = 0
    bytes_moved: int | None = None
    gb_per_s: float | None = None
    copy_share: float | None = None  # of the bandwidth of a plain copy
    input_bytes: int = 0
    peak_bytes: int = 0
    kept_bytes: int = 0
    # over processes
    ranks: int = 0  # 0: one process without a group
    collective_share: float = 0.0  # of the time

    def as_json(self) -> dict[str, Any]:
        """For ``extra_info``."""
        return asdict(self)


class Results(NamedTuple):
    """One run."""

    rows: list[Row]
    missing: dict[str, str]
    """Benchmarks without a row, and why."""
    when: str

    def of(self, group: str, **facts: Any) -> list[Row]:
        """The rows of a group that have these facts."""
        return [r for r in self.rows if r.group == group and all(getattr(r, k) == v for k, v in facts.items())]

    def one(self, group: str, **facts: Any) -> Row | None:
        """The row of a group that has these facts, if it was measured."""
        return next(iter(self.of(group, **facts)), None)


def load(path: Path) -> Results:
    """Read what ``--benchmark-json`` wrote."""
    text = path.read_text()
    if not text.strip():
        raise ValueError(f"{path} is empty: the benchmarks did not finish")
    found = json.loads(text)
    rows = [Row(**b["extra_info"]) for b in found["benchmarks"] if "group" in b["extra_info"]]
    if not rows:
        raise ValueError(f"expected rows of fcn_kernels' benchmarks in {path}, got none")
    return Results(rows, found.get("missing", {}), found["datetime"])


def exponent(rows: list[Row], least_rows: int) -> float | None:
    """b of time = a N^b, by least squares of the logarithms over the medians from ``least_rows`` rows on."""
    lengths = [(r.rows, r.median_s) for r in rows if isinstance(r.rows, int)]
    points = [(math.log(n), math.log(seconds)) for n, seconds in lengths if n >= least_rows]
    if len({x for x, _ in points}) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope
