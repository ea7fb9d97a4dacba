"""Predictions of what selection and the head's attention take on a GPU that is not here.

python -m benchmarks.model                    # a Markdown table of each, of all calls, ten minutes and 4 GB
python -m benchmarks.model --device b200      # for another GPU
python -m benchmarks.model --only "8,000"     # of those whose name has this
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator

import triton

from benchmarks.model import attention, lazy
from benchmarks.model.calls import BACKWARD, CALLS, EVAL, NOT_PREDICTED, Call
from benchmarks.model.machines import CAP, MACHINES, Machine
from benchmarks.model.multiprocessor import UnknownInstructionError
from benchmarks.model.predict import MOST_STEPS, WORKS, Prediction, predict
from benchmarks.model.walk import UnknownWayError
from benchmarks.report.targets import time_of

REFUSED = (UnknownWayError, UnknownInstructionError)


def table(calls: list[Call], machine: Machine) -> Iterator[str]:
    """Lines, each as soon as it is known."""
    yield from _heading(machine)
    yield from _selection(calls, machine)
    yield from _attention([call for call in calls if call in attention.ATTENTION_CALLS], machine)


def _heading(m: Machine) -> Iterator[str]:
    yield f"# Predictions for {m.article} {m.name}, not measurements"
    yield ""
    yield (
        f"Machine code of Triton {triton.__version__} for {m.target}, bfloat16, quality and gamma given, issued by a "
        f"model of one of {m.processors} multiprocessors at {m.ghz} GHz. Counted: registers, programs, instructions. "
        f"Assumed: {m.dram_bytes_per_s / 1e12:.1f} TB/s of which a copy reaches {CAP:.0%}, latencies of "
        f"{m.dram} (memory), {m.l2} (L2), {m.shared} (shuffles) and {m.barrier} (barriers) cycles, "
        f"{m.launch:.0f} us for a launch; no square root of a number so small that it takes the compiler's slow path. "
        "Not modelled: the instruction cache, bank conflicts, a clock that changes. "
        "Off by a quarter in either direction would not surprise."
    )
    yield ""


def _selection(calls: list[Call], m: Machine) -> Iterator[str]:
    yield "## Selection"
    yield ""
    counted = "registers | programs at once | warp instructions a row"
    yield f"| call | K | work | {counted} | predicted | bytes alone | share |"
    yield "|---" * 9 + "|"
    for call in calls:
        if call.k > MOST_STEPS:
            yield from _many_picks(call, m)
            continue
        for work in WORKS:
            yield _line_of(call, work, functools.partial(predict, call, work, m))
        if call.k == 3 and call.rows:  # of packed sets that would take minutes
            more = call._replace(k=16)
            for work in (EVAL, BACKWARD):
                yield _line_of(more, work, functools.partial(predict, more, work, m))


def _many_picks(call: Call, machine: Machine) -> Iterator[str]:
    """A call of which rows are left out, beside the launch that would read all of them."""
    yield _line_of(call, f"{EVAL}, all rows read", functools.partial(predict, call, EVAL, machine))
    try:
        p, turns, costs, *parts = lazy.predict(call, machine)
    except REFUSED as unknown:
        yield _refusal(call, EVAL, unknown)
        return
    yield _line(call, EVAL, p)
    eager, alone, collects, tiles, meetings = (time_of(part / 1e6) for part in parts)
    yield ""
    yield (
        f"The latter of Gaussian rows: {turns.reads / (call.k * call.all_rows):.2%} are read after the first picks. "
        f"{turns.meetings.sum():,} times a tile of rows meets a pick, {turns.meetings.max(1).sum():,} one after the "
        f"other, in {len(turns.again):,} turns, of which {turns.again.sum():,} make no pick. The first picks take "
        f"{eager}, turns in which no row meets one {alone}, further lists of rows {collects}, tiles {tiles}, meetings "
        f"{meetings}: a turn is {costs.turn.cycles:,.0f} cycles, a list {costs.collect.cycles:,.0f}, a tile "
        f"{costs.tile.cycles:,.0f}, a meeting {costs.meeting.cycles:,.0f}."
    )


def _line_of(call: Call, work: str, predicted: Callable[[], Prediction]) -> str:
    """With what the model does not know in the place of what it predicts."""
    try:
        return _line(call, work, predicted())
    except REFUSED as unknown:
        return _refusal(call, work, unknown)


def _refusal(call: Call, work: str, unknown: Exception) -> str:
    """The line of a call that is not predicted; why goes to stderr."""
    print(f"{call.name}, {work}: {unknown}", file=sys.stderr)
    return f"| {call.name} | {call.k:,} | {work} | | | | {NOT_PREDICTED} | | |"


def _line(call: Call, work: str, p: Prediction) -> str:
    return f"| {call.name} | {call.k:,} | {work} | {_counts(p)} | {_times(p)} |"


def _attention(calls: list[Call], machine: Machine) -> Iterator[str]:
    yield ""
    yield "## The head's attention"
    yield ""
    yield (
        f"{attention.QUERIES} queries a set, 8 heads of 3 picks, without the head's own products. Launches are the "
        "kernels' and those of PyTorch's operations around them. Costs are the device functions with the most "
        "instructions of their own."
    )
    yield ""
    counted = "registers | programs at once | warp instructions a row | barriers a tile | launches"
    yield f"| call | work | {counted} | predicted | bytes alone | share | largest costs |"
    yield "|---" * 11 + "|"
    for call in calls:
        for work in attention.WORKS:
            yield _line_of_attention(call, work, machine)


def _line_of_attention(call: Call, work: str, machine: Machine) -> str:
    try:
        p, barriers, launches, largest = attention.predict(call, work, machine)
    except REFUSED as unknown:
        print(f"{call.name}, {work}: {unknown}", file=sys.stderr)
        return f"| {call.name} | {work} | | | | | | {NOT_PREDICTED} | | | |"
    costs = ", ".join(f"{name} {share:.0%}" for name, share in largest)
    return f"| {call.name} | {work} | {_counts(p)} | {barriers:.0f} | {launches} | {_times(p)} | {costs} |"


def _counts(p: Prediction) -> str:
    return f"{p.registers} | {p.programs} | {p.instructions:.0f}"


def _times(p: Prediction) -> str:
    return f"{time_of(p.microseconds / 1e6)} | {time_of(p.least / 1e6)} | {p.share:.0%}"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=MACHINES, default="h100", help="the GPU; by default an H100")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="calls whose name has one of these")
    args = parser.parse_args()
    calls = [call for call in CALLS if any(text in call.name for text in args.only)]
    for line in table(calls, MACHINES[args.device]):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
