"""The plots of a report: time against rows, speed-ups, memory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.report.results import Results, Row, exponent
from benchmarks.report.targets import FITTED_FROM, time_of
from benchmarks.workloads import BOTH, COMPILED, EAGER, FORWARD, FUSED, LOOP
from fcn_kernels.extras import require

COLORS = {FUSED: "#1b5fa8", EAGER: "#d9772b", COMPILED: "#7a5ba6", LOOP: "#d9772b"}
LIMIT, INK, GRID = "#555555", "#222222", "#e4e4e4"
WORKS = (FORWARD, BOTH)


def draw(results: Results, out: Path) -> list[Path]:
    """Every plot that there are rows for; returns the files."""
    plots = {"scaling": ("time.png", time), "selection": ("speedup.png", speedup), "memory": ("memory.png", memory)}
    written = []
    for group, (name, plot) in plots.items():
        rows = results.of(group)
        if rows:
            figure = plot(rows)
            figure.savefig(out / name, dpi=160, facecolor="white", bbox_inches="tight")
            written.append(out / name)
    return written


def time(rows: list[Row]) -> Any:
    """Time against N on logarithmic axes, with the memory-bound limit."""
    first = rows[0]
    figure, axes = _figure(2, (10, 4.2))
    for axis, work in zip(axes, WORKS, strict=True):
        here = [r for r in rows if r.work == work]
        for name in (EAGER, FUSED):
            line = sorted((r for r in here if r.implementation == name), key=lambda r: r.rows)
            if not line:
                continue
            slope = exponent(line, FITTED_FROM)
            label = name if slope is None else rf"{name}, time $\sim N^{{{slope:.2f}}}$"
            lengths = [r.rows for r in line]
            axis.fill_between(
                lengths, [r.q1_s for r in line], [r.q3_s for r in line], color=COLORS[name], alpha=0.25, lw=0
            )
            axis.plot(lengths, [r.median_s for r in line], "o-", ms=4, lw=1.8, color=COLORS[name], label=label)
        limit = sorted({(r.rows, r.least_bytes / (r.copy_gb_per_s * 1e9)) for r in here})
        passes = "rows read once" if work == FORWARD else "read twice, gradient written"
        axis.plot(*zip(*limit, strict=True), "--", lw=1.2, color=LIMIT, label=f"memory limit: {passes}")
        _logarithmic(axis, "rows of a set, N", time_of)
        axis.set_ylim(top=20 * max(r.q3_s for r in rows))  # room for the legend
        axis.set_title(work, loc="left", color=INK)
        axis.legend(frameon=False, fontsize=9, loc="upper left")
    axes[0].set_ylabel("time a call")
    shape = f"{first.sets} sets of N rows, K = {first.k}, C = {first.dim}, {first.dtype}"
    _title(figure, f"Selection from {shape}", first)
    return figure


def speedup(rows: list[Row]) -> Any:
    """How many times longer the listing takes, eager and compiled."""
    cases = list(dict.fromkeys(_case(r) for r in rows))
    figure, axes = _figure(2, (10, 1.3 + 0.5 * len(cases)))
    others = (EAGER, COMPILED)
    least = most = 1.0
    for axis, work in zip(axes, WORKS, strict=True):
        for row, case in enumerate(cases):
            times = {r.implementation: r.median_s for r in rows if _case(r) == case and r.work == work}
            if LOOP in times:
                times[EAGER] = times[LOOP]
            shown = [name for name in others if name in times and FUSED in times]
            for place, name in enumerate(shown):
                ratio = times[name] / times[FUSED]
                least, most = min(least, ratio), max(most, ratio)
                height = 0.36
                at = row + (place - (len(shown) - 1) / 2) * height
                axis.barh(at, ratio - 1, left=1, height=height * 0.92, color=COLORS[name])
                axis.text(
                    max(ratio, 1) * 1.06,
                    at,
                    f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x",
                    va="center",
                    ha="left",
                    fontsize=8.5,
                    color=INK,
                )
        axis.axvline(1, color=INK, lw=1)
        axis.set_xscale("log")
        axis.set_title(work, loc="left", color=INK)
        axis.set_yticks(range(len(cases)), cases, fontsize=9)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("times the fused path's time")
    for axis in axes:
        axis.set_xlim(least * 0.9 if least < 1 else 1, most * 1.8)
        axis.set_ylim(len(cases) - 0.45, -0.55)
        ticks = [t for t in (0.3, 1, 3, 10, 30, 100, 300, 1000) if least * 0.9 <= t <= most * 1.8]
        axis.set_xticks(ticks, [f"{t}x" for t in ticks])
        axis.minorticks_off()
    _legend(figure, others)
    _title(figure, "Speed-up over the paper's listing in PyTorch", rows[0])
    return figure


def memory(rows: list[Row]) -> Any:
    """Peak of a training step and what is kept between its two passes, against N."""
    first = rows[0]
    figure, axes = _figure(2, (10, 4.2))
    panels = {"peak_bytes": "peak of a training step", "kept_bytes": "kept for the backward pass"}
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for name in (EAGER, FUSED):
            line = sorted((r for r in rows if r.implementation == name), key=lambda r: r.all_rows)
            axis.plot(
                [r.all_rows for r in line],
                [getattr(r, key) for r in line],
                "o-",
                ms=4,
                lw=1.8,
                color=COLORS[name],
                label=name,
            )
        features = sorted({(r.all_rows, r.input_bytes) for r in rows})
        axis.plot(*zip(*features, strict=True), "--", lw=1.2, color=LIMIT, label="the features themselves")
        _logarithmic(axis, "rows in the set, N", _bytes)
        axis.set_title(title, loc="left", color=INK)
    axes[0].set_ylabel("bytes beyond the inputs")
    axes[0].legend(frameon=False, fontsize=9, loc="upper left")
    _title(figure, f"Memory, K = {first.k}, C = {first.dim}, {first.dtype}", first)
    return figure


def _case(row: Row) -> str:
    if row.rows == "packed":
        shape = f"{row.sets:,} sets, {row.all_rows:,} rows packed"
    else:
        shape = f"B = {row.sets:,}, N = {row.rows:,}"
    return f"{shape}, K = {row.k}, {row.dtype}"


def _figure(panels: int, size: tuple[float, float]) -> tuple[Any, Any]:
    require("matplotlib", "bench")
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, panels, sharey=True)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=GRID, lw=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=INK, labelsize=9)
    return figure, axes


def _logarithmic(axis: Any, label: str, form: Any) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(label)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.yaxis.set_major_formatter(lambda value, _: form(value))
    axis.minorticks_off()


def _legend(figure: Any, names: Iterable[str]) -> None:
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=COLORS[name], label=f"the {name}") for name in names],
        loc="outside lower right",
        ncols=2,
        frameon=False,
        fontsize=9,
    )


def _title(figure: Any, text: str, row: Row) -> None:
    machine = f"{row.device}, PyTorch {row.torch}"
    figure.suptitle(f"{text}\n", fontsize=12.5, fontweight="bold", x=0.01, ha="left", color=INK)
    figure.text(0.01, 1 - 0.3 / figure.get_figheight(), machine, fontsize=9, ha="left", va="top", color=LIMIT)


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:,.3g} {unit}"
    return f"{value:.0f} B"
