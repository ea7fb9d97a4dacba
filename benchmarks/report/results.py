"""Result rows as the report and the targets read them."""

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
"""``extra_info`` of one benchmark; see benchmarks/conftest.py."""


class Results(NamedTuple):
    """One run."""

    rows: list[Row]
    missing: dict[str, str]
    """Benchmarks without a row, and why."""
    when: str

    def of(self, group: str, **facts: Any) -> list[Row]:
        """The rows of a group that have these facts."""
        return [r for r in self.rows if r["group"] == group and all(r.get(k) == v for k, v in facts.items())]

    def one(self, group: str, **facts: Any) -> Row | None:
        """The row of a group that has these facts, if it was measured."""
        return next(iter(self.of(group, **facts)), None)


def load(path: Path) -> Results:
    """Read what ``--benchmark-json`` wrote."""
    text = path.read_text()
    if not text.strip():
        raise ValueError(f"{path} is empty: the benchmarks did not finish")
    found = json.loads(text)
    rows = [b["extra_info"] for b in found["benchmarks"] if "group" in b["extra_info"]]
    if not rows:
        raise ValueError(f"expected rows of fcn_kernels' benchmarks in {path}, got none")
    return Results(rows, found.get("missing", {}), found["datetime"])


def exponent(rows: list[Row], least_rows: int) -> float | None:
    """b of time = a N^b, by least squares of the logarithms over the medians from ``least_rows`` rows on."""
    points = [(math.log(r["rows"]), math.log(r["median_s"])) for r in rows if r["rows"] >= least_rows]
    if len({x for x, _ in points}) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope
