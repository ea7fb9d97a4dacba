"""Tables and plots of a benchmark run.

    pytest benchmarks/ --benchmark-only --benchmark-json=RESULTS.json
    python -m benchmarks.report RESULTS.json --out FOLDER

writes FOLDER/report.md, time.png, speedup.png and memory.png. Nothing is measured here.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.report import predictions
from benchmarks.report.plots import draw
from benchmarks.report.results import Results, Row, exponent, load
from benchmarks.report.targets import FITTED_FROM, judge, time_of, unit_of
from benchmarks.workloads import BOTH, COMPILED, EAGER, FORWARD, FUSED, LOOP

PREDICTED = ("one large set", "selection", "attention", "k-center-greedy")
"""Groups of which the model knows calls."""


def report(results: Results) -> str:
    """The whole report, in Markdown."""
    sections = (
        _machine,
        _targets,
        _predictions,
        _bandwidth,
        _selection,
        _attention,
        _scaling,
        _kcenter,
        _peers,
        _samplers,
        _neighbors,
        _memory,
        _cost,
        _clustering,
        _host,
        _apart,
        _threads,
        _distributed,
        _missing,
    )
    return "\n".join(line for section in sections for line in section(results)) + "\n"


def table(head: Iterable[str], lines: Iterable[Iterable[object]]) -> list[str]:
    """A Markdown table."""
    heads = list(head)
    return [
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(f"| {' | '.join(map(str, line))} |" for line in lines),
        "",
    ]


def _machine(results: Results) -> Iterator[str]:
    r = results.rows[0]
    yield f"# Benchmarks on {r.device}"
    yield ""
    yield (
        f"{results.when[:10]}, commit {r.commit}. Python {r.python}, PyTorch {r.torch}, Triton {r.triton}, "
        f"fcn_kernels {r.fcn_kernels}, {r.threads} threads. A plain copy in the same run moves "
        f"{r.copy_gb_per_s:,.1f} GB/s, bytes read and written."
    )
    clock = "device events" if r.device_type == "cuda" else "the wall clock"
    yield ""
    yield (
        f"Times are medians by {clock}, with quartiles in brackets, of calls in turns over inputs that together do not "
        "fit the last-level cache. Forward is inference (argmax); forward + backward is a training step, noise drawn "
        "in it, with gradients to features, quality and gamma. GB/s are the bytes of feature rows that the plan of "
        "the fused path asks for, over its time; rows that it asks for again may come from cache."
    )
    yield ""


def _targets(results: Results) -> Iterator[str]:
    yield "## Targets"
    yield ""
    words = {True: "reached", False: "**short**", None: "not measured"}
    yield from table(
        ("target", "wanted", "measured", ""),
        ((t.name, t.wanted, t.measured, words[t.reached]) for t in judge(results)),
    )


def _predictions(results: Results) -> Iterator[str]:
    """Beside what was measured, and never without: a prediction fills no gap."""
    known = predictions.load()
    pairs = [(r, predictions.seconds(r, known)) for r in results.rows if r.group in PREDICTED]
    lines = [
        (r.group, *_shape(r), r.work, _time(r), time_of(expected), f"{r.median_s / expected:.2f}x")
        for r, expected in pairs
        if expected is not None and r.median_s > 0
    ]
    if not lines:
        return
    yield "## Measured, and predicted beforehand"
    yield ""
    yield (
        f"Predictions are those of {predictions.TABLE.name}, for an H100: computed from the kernels' machine code "
        f"without a GPU. This is {results.rows[0].device}. Of a training step they are the sum of its passes."
    )
    yield ""
    heads = ("", "B", "N", "C", "K", "dtype", "work", "measured", "predicted for an H100", "measured / predicted")
    yield from table(heads, lines)


def _selection(results: Results) -> Iterator[str]:
    rows = results.of("selection")
    if not rows:
        return
    yield "## Selection against the paper's listing"
    yield ""
    yield "![speed-up](speedup.png)"
    yield ""
    lines = []
    for ours in (r for r in rows if r.implementation == FUSED):
        eager, compiled = (_beside(results, ours, name) for name in (EAGER, COMPILED))
        eager = eager or _beside(results, ours, LOOP)
        lines.append(
            (
                *_shape(ours),
                ours.work,
                _time(ours),
                _time(eager) + ("\\*" if eager and eager.implementation == LOOP else ""),
                _time(compiled),
                _ratio(eager, ours),
                _ratio(compiled, ours),
                ", ".join(ours.tiers),
                f"{ours.bytes_moved / 1e6:,.1f}",
                f"{ours.gb_per_s:,.1f}",
                f"{ours.copy_share:.0%}",
            )
        )
    yield from table(
        (
            *("B", "N", "C", "K", "dtype", "work", "fused", "eager", "compiled", "eager / fused"),
            *("compiled / fused", "tier", "MB moved", "GB/s", "of copy"),
        ),
        lines,
    )
    loop = next(iter(results.of("selection", implementation=LOOP)), None)
    if loop:
        sampled = round(loop.sets / loop.scaled_by)
        yield f"\\* It has no packed form: looped over {sampled} of the sets, drawn at random, and scaled to all."
        yield ""


def _scaling(results: Results) -> Iterator[str]:
    first = results.one("scaling")
    if first is None:
        return
    yield "## Time against the number of rows"
    yield ""
    yield "![time](time.png)"
    yield ""
    yield (
        f"{first.sets} sets of N rows each, C = {first.dim}, K = {first.k}, {first.dtype}. The lengths of "
        "a line took turns."
    )
    yield ""
    lengths = sorted({r.rows for r in results.of("scaling")})
    lines = []
    for work in (FORWARD, BOTH):
        for name in (FUSED, EAGER):
            rows = results.of("scaling", work=work, implementation=name)
            found = exponent(rows, FITTED_FROM)
            times = {r.rows: r for r in rows}
            lines.append((work, name, *(_time(times.get(n)) for n in lengths), "" if found is None else f"{found:.3f}"))
    yield from table(
        ("work", "", *(f"N = {n:,}" for n in lengths), f"exponent from {FITTED_FROM:,} rows"),
        lines,
    )


def _bandwidth(results: Results) -> Iterator[str]:
    yield from _pairs(results, "bandwidth", "What memory does: a plain copy and a sum of two vectors")
    yield from _pairs(results, "one large set", "One large set, measured before all else")


def _attention(results: Results) -> Iterator[str]:
    rows = results.of("attention")
    if not rows:
        return
    yield "## The head's attention"
    yield ""
    yield "24 queries a set; forward is inference, forward + backward a training step with dropout 0.1."
    yield ""
    lines = [(*_shape(r), r.work, r.implementation, _time(r), _ratio(r, _beside(results, r, FUSED))) for r in rows]
    yield from table(("B", "N", "C", "K", "dtype", "work", "", "time", "of fused"), lines)


def _kcenter(results: Results) -> Iterator[str]:
    yield from _pairs(results, "k-center-greedy", "k-center-greedy: one large set, many picks")


def _peers(results: Results) -> Iterator[str]:
    yield from _pairs(results, "peers", "Farthest-point samplers: unit rows, gamma = 0, same start, the same picks")


def _samplers(results: Results) -> Iterator[str]:
    titles = {
        "points": "Farthest-point samplers by Euclidean distance: same start and picks (but for fpsample's buckets)",
        "memory bank": "A coreset of patch features: anomalib's loop, same start; the projected one picks other rows",
        "PatchCore's coreset step": "PatchCore's coreset step with anomalib's class and with ours, same start",
        "active learning": "A query with labelled rows: the adapter, the selection alone, scikit-activeml's CoreSet",
        "resumed": "Half of the picks, and the other half from the state",
        "K per set": "A number of picks for each set, from an eighth to all",
        "anchors": "With 1,000 anchors, and without",
    }
    for group, title in titles.items():
        yield from _pairs(results, group, title)


def _neighbors(results: Results) -> Iterator[str]:
    rows = results.of("neighbors")
    if not rows:
        return
    yield "## Nearest bank rows, their mean and deviation"
    yield ""
    yield (
        "N rows against a bank of M, unit rows, own identities left out (not by faiss). Memory is what the process "
        "grows by at the most, beyond its inputs. Multiply-adds are by the formula, N M C."
    )
    yield ""
    lines = []
    for r in rows:
        ours = _beside(results, r, FUSED)
        sample = f" by {r.all_rows / r.scaled_by:,.0f} of them" if r.scaled_by != 1 else ""
        lines.append(
            (
                f"{r.rows:,}{sample}",
                f"{r.bank:,}",
                r.k,
                r.work,
                r.implementation,
                _time(r),
                _ratio(r, ours),
                _megabytes(r.peak_bytes),
                _counted(r.multiply_adds),
            )
        )
    yield from table(("N", "M", "K", "work", "", "time", "of fused", "memory, MB", "multiply-adds"), lines)
    cost = [
        (f"{r.rows:,}", f"{r.bank:,}", r.implementation, _counted(r.multiply_adds))
        for r in results.of("neighbors cost")
    ]
    if cost:
        yield "By fvcore, which counts the operator by its formula, and of the others the products alone:"
        yield ""
        yield from table(("N", "M", "", "multiply-adds"), cost)


def _pairs(results: Results, group: str, title: str) -> Iterator[str]:
    rows = results.of(group)
    if not rows:
        return
    yield f"## {title}"
    yield ""
    lines = []
    for r in rows:
        ours = _beside(results, r, FUSED)
        rate = "" if r.gb_per_s is None else f"{r.gb_per_s:,.1f} ({r.copy_share:.0%})"
        lines.append((*_shape(r), r.implementation, _time(r), _ratio(r, ours), rate))
    yield from table(("B", "N", "C", "K", "dtype", "", "time", "of fused", "GB/s (of copy)"), lines)


def _memory(results: Results) -> Iterator[str]:
    rows = results.of("memory")
    if not rows:
        return
    yield "## Memory of a training step, beyond its inputs"
    yield ""
    yield "![memory](memory.png)"
    yield ""
    lines = [
        (
            *_shape(r),
            r.implementation,
            *(_megabytes(getattr(r, key)) for key in ("input_bytes", "peak_bytes", "kept_bytes")),
        )
        for r in rows
    ]
    yield from table(("B", "N", "C", "K", "dtype", "", "features, MB", "peak, MB", "kept for backward, MB"), lines)


def _cost(results: Results) -> Iterator[str]:
    rows = results.of("cost")
    if not rows:
        return
    yield "## Multiply-adds (fvcore) and bytes of inference"
    yield ""
    yield (
        "Of the listing, fvcore counts the matrix products alone; its bytes are those that eager operations read and "
        "write, one after another."
    )
    yield ""
    lines = [(*_shape(r), r.implementation, _counted(r.multiply_adds), _megabytes(r.bytes_moved)) for r in rows]
    yield from table(("B", "N", "C", "K", "dtype", "", "multiply-adds", "MB moved"), lines)


def _clustering(results: Results) -> Iterator[str]:
    timed, memory, cost = (results.of(group) for group in ("clustering", "clustering memory", "clustering cost"))
    if not (timed or memory or cost):
        return
    yield "## Cluster and Aggregate"
    yield ""
    yield (
        "Against the plain form, one template at a time; inference, styles made before. K is the number of centers. "
        "Multiply-adds are those that PyTorch's counter finds, the fused operator's by its formula; fvcore also counts "
        "normalizations."
    )
    yield ""
    lines = [
        (*_shape(r), r.chunk or "one shot", r.implementation, _time(r), _ratio(r, _beside(results, r, FUSED)))
        for r in timed
    ]
    yield from table(("B", "N", "C", "K", "dtype", "chunk", "", "time", "of fused"), lines)
    lines = [
        (*_shape(r), r.chunk or "one shot", r.implementation, _megabytes(r.peak_bytes), _megabytes(r.kept_bytes))
        for r in memory
    ]
    heads = ("B", "N", "C", "K", "dtype", "chunk", "", "peak of a training step, MB", "kept for backward, MB")
    yield from table(heads, lines)
    lines = [(*_shape(r), r.implementation, _counted(r.multiply_adds)) for r in cost]
    yield from table(("B", "N", "C", "K", "dtype", "", "multiply-adds"), lines)


def _host(results: Results) -> Iterator[str]:
    rows = results.of("host") + results.of("CUDA graphs")
    if not rows:
        return
    yield "## Cost of a call on the host, and replay from a CUDA graph"
    yield ""
    lines = [(*_shape(r), r.work, r.implementation, _time(r), r.clock) for r in rows]
    yield from table(("B", "N", "C", "K", "dtype", "work", "", "time", "clock"), lines)


def _apart(results: Results) -> Iterator[str]:
    rows = results.of("apart")
    if not rows:
        return
    yield "## In processes of their own"
    yield ""
    yield (
        f"Medians over {rows[0].samples} processes of each, in turns, as a training script runs one of them. In a "
        "process that they share, as above, a step's time also depends on what the others leave in the allocator."
    )
    yield ""
    yield from _times(rows)


def _threads(results: Results) -> Iterator[str]:
    rows = results.of("threads")
    if not rows:
        return
    yield "## Threads on a busy machine"
    yield ""
    yield from _times(rows)


def _distributed(results: Results) -> Iterator[str]:
    rows = results.of("distributed")
    if not rows:
        return
    yield "## Rows of one set on several processes"
    yield ""
    yield from table(
        ("N", "C", "K", "work", "", "time", "a step", "in collectives"),
        [
            (
                *_shape(r)[1:4],
                r.work,
                r.implementation,
                _time(r),
                time_of(r.median_s / r.k),
                f"{r.collective_share:.0%}",
            )
            for r in rows
        ],
    )


def _missing(results: Results) -> Iterator[str]:
    if not results.missing:
        return
    yield "## Not measured"
    yield ""
    reasons: dict[str, list[str]] = {}
    for name, why in results.missing.items():
        reasons.setdefault(why, []).append(name.split("::")[-1])
    for why, names in reasons.items():
        yield f"- {why}: {', '.join(names)}"
    yield ""


def _beside(results: Results, row: Row, name: str) -> Row | None:
    """The row of another implementation in the same race."""
    same = ("sets", "all_rows", "rows", "bank", "dim", "k", "dtype", "work", "chunk")
    return results.one(row.group, implementation=name, **{key: getattr(row, key) for key in same})


def _times(rows: Iterable[Row]) -> list[str]:
    """What each implementation takes."""
    heads = ("B", "N", "C", "K", "dtype", "work", "", "time")
    return table(heads, ((*_shape(r), r.work, r.implementation, _time(r)) for r in rows))


def _shape(row: Row) -> tuple[str, ...]:
    rows = f"{row.all_rows:,} packed" if row.rows == "packed" else f"{row.rows:,}"
    return f"{row.sets:,}", rows, str(row.dim), str(row.k), row.dtype


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    _, size = unit_of(row.median_s)
    return f"{time_of(row.median_s)} [{row.q1_s / size:.3g}, {row.q3_s / size:.3g}]"


def _ratio(row: Row | None, ours: Row | None) -> str:
    return "" if row is None or ours is None else f"{row.median_s / ours.median_s:.2f}x"


def _counted(multiply_adds: int | str) -> str:
    return multiply_adds if isinstance(multiply_adds, str) else f"{multiply_adds:,}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.3f}"


def write(results: Results, out: Path) -> list[Path]:
    """The report and its plots, into a folder that is made if need be."""
    out.mkdir(parents=True, exist_ok=True)
    text = out / "report.md"
    text.write_text(report(results))
    return [text, *draw(results, out)]


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and plots of a run.")
    parser.add_argument("results", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--out", type=Path, help="folder to write to (default: that of the results)")
    args = parser.parse_args(argv)
    try:
        written = write(load(args.results), args.out or args.results.parent)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print("\n".join(map(str, written)))
    return 0
