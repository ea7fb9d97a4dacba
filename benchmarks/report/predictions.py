"""What the model of a GPU predicts of calls that were measured, from the table that it wrote."""

from pathlib import Path
from typing import NamedTuple

from benchmarks.model.calls import BACKWARD, CALLS, EVAL, NOT_PREDICTED, SAMPLE, TRAINING
from benchmarks.report.results import Row
from benchmarks.workloads import FORWARD, FUSED

TABLE = Path(__file__).parents[1] / "results/predictions-h100.md"
ATTENTION = "attention"
UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


class Key(NamedTuple):
    """A line of the table."""

    section: str  # as its heading has it
    call: str
    k: int
    work: str


def load(path: Path = TABLE) -> dict[Key, float]:
    """Seconds of each line that has them.

    Raises:
        ValueError: a table has no column for what is looked for.
    """
    found, section, head = {}, "", list[str]()
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            section, head = line.strip("# "), []
        elif line.startswith("|--"):
            continue
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            if not head:
                head = cells
                continue
            row = dict(zip(head, cells, strict=True))
            if not {"call", "work", "predicted"} <= row.keys():
                raise ValueError(f"expected columns call, work and predicted in {path}, got {', '.join(head)}")
            if row["predicted"] == NOT_PREDICTED:
                continue
            number, unit = row["predicted"].split()
            key = Key(section, row["call"], int(row.get("K", "3").replace(",", "")), row["work"])
            found[key] = float(number) * UNITS[unit]
    return found


def seconds(row: Row, known: dict[Key, float]) -> float | None:
    """What was predicted of a measured call; a training step is its forward and its backward pass."""
    if (row.device_type, row.dtype, row.implementation) != ("cuda", "bfloat16", FUSED):
        return None
    attended = row.group == ATTENTION
    section = "The head's attention" if attended else "Selection"
    works = (EVAL,) if row.work == FORWARD else (TRAINING if attended else SAMPLE, BACKWARD)
    for call in CALLS:
        rows = "packed" if call.rows is None else call.rows
        if (call.sets, rows, call.all_rows, call.dim) != (row.sets, row.rows, row.all_rows, row.dim):
            continue
        times = [known.get(Key(section, call.name, row.k, work)) for work in works]
        if None not in times:
            return sum(time for time in times if time is not None)
    return None
