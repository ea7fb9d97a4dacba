"""What this package set out to reach, held against results. Times are medians."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.report.results import Results, Row, exponent
from benchmarks.workloads import BOTH, COMPILED, EAGER, FORWARD, FUSED, IJBC_ROWS, IJBC_SETS

WORKS = (FORWARD, BOTH)
LARGEST = 1_000_000
FITTED_FROM = 10_000  # rows; below, a launch costs more than the rows do


class Target(NamedTuple):
    """One line of the table. ``reached`` is None where it was not measured."""

    name: str
    wanted: str
    measured: str
    reached: bool | None


def judge(results: Results) -> list[Target]:
    """The targets of the kind of machine that the results are of."""
    on_gpu = results.rows[0].device_type == "cuda"
    return list(_gpu(results) if on_gpu else _cpu(results))


def _gpu(results: Results) -> Iterator[Target]:
    """On an H100, bfloat16, C = 512, K = 3."""
    times = [
        ("B = 256, N = 20", {"sets": 256, "rows": 20}, (9e-6, 30e-6)),
        ("B = 64, N = 256", {"sets": 64, "rows": 256}, (15e-6, 50e-6)),
        ("B = 1, N = 8,000", {"sets": 1, "rows": 8000}, (17e-6, 50e-6)),
        ("B = 1, N = 100,000", {"sets": 1, "rows": 100_000}, (80e-6, 240e-6)),
        ("IJB-C packed", {"sets": IJBC_SETS, "all_rows": IJBC_ROWS}, (0.30e-3, 1.0e-3)),
    ]
    common = {"dtype": "bfloat16", "dim": 512, "k": 3, "implementation": FUSED}
    for name, shape, limits in times:
        for work, limit in zip(WORKS, limits, strict=True):
            row = results.one("selection", work=work, **shape, **common)
            yield _at_most(f"{name}, {work}", None if row is None else row.median_s, limit)
    for work, passes, share in ((FORWARD, "K - 1 reads", 0.9), (BOTH, "2K - 1 reads and 1 write", 0.8)):
        row = results.one("selection", work=work, sets=1, rows=LARGEST, **common)
        yield _at_least(
            f"B = 1, N = {LARGEST:,}, {work}: share of the copy bandwidth at {passes}",
            None if row is None else _share(row, work),
            share,
            "{:.0%}",
        )
    row = results.one("k-center-greedy", rows=200_000, k=2000, implementation=FUSED)
    name = "k-center-greedy, 2,000 picks of 200,000 x 1,536"
    yield _at_most(name, None if row is None else row.median_s, 40e-3)
    yield from _ratios(results, ((256, 20), (1, 8000)), {EAGER: 10.0, COMPILED: 3.0}, "bfloat16")
    yield from _exponents(results, 0.03, LARGEST)


def _cpu(results: Results) -> Iterator[Target]:
    """float32, C = 512, K = 3."""
    yield from _ratios(results, ((64, 20), (1, 8000)), {EAGER: 4.0}, "float32")
    ratio = _times(results, "apart", COMPILED, sets=64, rows=20)
    name = f"B = 64, N = 20, {BOTH}, processes of their own: against the {COMPILED}"
    yield _at_least(name, ratio, 2.5, "{:.1f}x")
    kept = [results.one("memory", rows=4000, implementation=name) for name in (FUSED, EAGER)]
    ratio = None if kept[0] is None or kept[1] is None else kept[1].kept_bytes / kept[0].kept_bytes
    yield _at_least("bytes kept for backward at N = 4,000, times fewer than the listing", ratio, 40.0, "{:.0f}x")
    yield from _exponents(results, 0.05, 100_000)
    yield from _peers(results)
    if results.of("neighbors"):
        yield from _neighbors(results)


def _peers(results: Results) -> Iterator[Target]:
    """Samplers of others, in Euclidean distance; of point clouds the fastest that gives the same picks."""
    for sets, n, k in ((8, 1024, 256), (4, 16_384, 1024)):
        rows = results.of("points", sets=sets, rows=n, k=k)
        own = [r.median_s for r in rows if r.implementation == FUSED]
        others = [r.median_s for r in rows if r.implementation != FUSED and "buckets" not in r.implementation]
        ratio = min(others) / own[0] if own and others else None
        yield _at_least(f"{sets} clouds of {n:,}, K = {k:,}: against the fastest sampler", ratio, 1.0, "{:.1f}x")
    for group, other, least in (
        ("memory bank", "anomalib's loop", 5.0),
        ("memory bank", "anomalib's loop, projected", 1.0),
        ("active learning", "skactiveml", 5.0),
    ):
        yield _at_least(f"{group}: against {other}", _times(results, group, other), least, "{:.1f}x")


def _neighbors(results: Results) -> Iterator[Target]:
    """Of 4,000 rows, or a few, in a bank of 50,000, against all scores at once."""
    for rows, k, work, own, least in (
        *((rows, 50, FORWARD, FUSED, 1.0) for rows in (1, 4, 15)),
        (4000, 50, FORWARD, FUSED, 3.5),
        (4000, 300, FORWARD, FUSED, 2.5),
        (4000, 50, FORWARD, "fused, float32 alone", 1.2),
        (4000, 50, BOTH, FUSED, 4.0),
    ):
        pair = _in_bank(results, rows, k, work, own)
        ratio = None if pair is None else pair[1].median_s / pair[0].median_s
        yield _at_least(f"{own}, N = {rows:,}, k = {k}, {work}: against matmul + topk", ratio, least, "{:.2f}x")
    for k, least in ((50, 25.0), (300, 15.0)):
        pair = _in_bank(results, 4000, k, FORWARD, FUSED)
        ratio = None if pair is None else pair[1].peak_bytes / max(1, pair[0].peak_bytes)
        yield _at_least(f"memory, N = 4,000, k = {k}: times less than matmul + topk", ratio, least, "{:.0f}x")


def _in_bank(results: Results, rows: int, k: int, work: str, name: str) -> tuple[Row, Row] | None:
    shape = {"rows": rows, "bank": 50_000, "k": k, "work": work}
    own, other = (results.one("neighbors", implementation=n, **shape) for n in (name, "matmul + topk"))
    return None if own is None or other is None else (own, other)


def _ratios(
    results: Results,
    shapes: tuple[tuple[int, int], ...],
    wanted: dict[str, float],
    dtype: str,
    works: tuple[str, ...] = WORKS,
) -> Iterator[Target]:
    for other, least in wanted.items():
        for sets, n in shapes:
            for work in works:
                shape = {"sets": sets, "rows": n, "k": 3, "dim": 512, "dtype": dtype, "work": work}
                ratio = _times(results, "selection", other, **shape)
                yield _at_least(f"B = {sets}, N = {n:,}, {work}: against the {other}", ratio, least, "{:.1f}x")


def _times(results: Results, group: str, other: str, **facts: Any) -> float | None:
    """How many times longer another takes, None where one of the two was not measured."""
    own, theirs = (results.one(group, implementation=name, **facts) for name in (FUSED, other))
    return None if own is None or theirs is None else theirs.median_s / own.median_s


def _exponents(results: Results, tolerance: float, most: int) -> Iterator[Target]:
    for work in WORKS:
        rows = results.of("scaling", work=work, implementation=FUSED)
        found = exponent(rows, FITTED_FROM) if any(r.rows == most for r in rows) else None
        name = f"exponent of time against N, {FITTED_FROM:,} to {most:,}, {work}"
        reached = None if found is None else abs(found - 1) <= tolerance
        yield Target(name, f"1.00 +- {tolerance:.2f}", "" if found is None else f"{found:.3f}", reached)


def _share(row: Row, work: str) -> float:
    """Of the copy bandwidth, if each step but the last read the rows once, forward, and each step, backward."""
    passes = row.k - 1 if work == FORWARD else (row.k - 1) + row.k + 1
    size = row.all_rows * row.dim * 2
    return float(passes * size / row.median_s / (row.copy_gb_per_s * 1e9))


def _at_most(name: str, seconds: float | None, limit: float) -> Target:
    reached = None if seconds is None else seconds <= limit
    return Target(name, f"<= {time_of(limit)}", "" if seconds is None else time_of(seconds), reached)


def _at_least(name: str, value: float | None, limit: float, form: str) -> Target:
    reached = None if value is None else value >= limit
    return Target(name, f">= {form.format(limit)}", "" if value is None else form.format(value), reached)


def unit_of(seconds: float) -> tuple[str, float]:
    """The unit in which three digits of a time are below 1,000, and its seconds."""
    units = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))
    return next(((unit, size) for unit, size in units if seconds >= 0.9995 * size), ("ns", 1e-9))


def time_of(seconds: float) -> str:
    """Three digits and a unit."""
    unit, size = unit_of(seconds)
    return f"{seconds / size:.3g} {unit}"
