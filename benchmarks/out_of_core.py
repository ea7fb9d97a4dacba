"""Bytes and seconds of 50 picks from a file that does not fit memory: the `select` command beside a walk of all rows.

    mkdir /sys/fs/cgroup/memory/fcn && echo 800M > /sys/fs/cgroup/memory/fcn/memory.limit_in_bytes
    python -m benchmarks.out_of_core FOLDER --cgroup /sys/fs/cgroup/memory/fcn --out TABLE.md

Files of --rows x --columns float32 are made in FOLDER, which has to be on a disk. Each run is a process of its own in
the control group, whose limit holds for the pages that the system keeps, too; bytes are those that /proc/self/io counts
from when the modules are imported. Before a run the file's pages are dropped.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.report.tables import table
from fcn_kernels.cli.arguments import at_least_one
from fcn_kernels.files.output import check_output, replacing

SELECT = """
from fcn_kernels.__main__ import main
def work(path, k, out):
    assert main(["select", path, "--k", str(k), "--out", out, "--overwrite"]) == 0
"""
EAGER = """
import numpy, torch
from fcn_kernels import coreset_select
def work(path, k, out):
    picks = coreset_select(torch.from_numpy(numpy.load(path, mmap_mode="c")), k, distinct=True).indices
    numpy.savez(out, picks=picks.numpy())
"""
MEASURE = """
import json, sys, time
def read():
    return int(open("/proc/self/io").read().split("\\nread_bytes: ")[1].split()[0])
before, wall, cpu = read(), time.perf_counter(), time.process_time()
work(sys.argv[1], int(sys.argv[2]), sys.argv[3])
print(json.dumps([read() - before, time.perf_counter() - wall, time.process_time() - cpu]))
"""
WAYS = {"`select`": SELECT, "`coreset_select`, mapped": EAGER}
BLOCK = 25_000  # rows that are made at a time


def make(path: Path, rows: int, columns: int, centers: int) -> None:
    """Rows about so many centers, or none."""
    generator = np.random.default_rng(0)
    middle = generator.standard_normal((max(1, centers), columns), dtype="float32") * bool(centers)
    file = np.lib.format.open_memmap(path, "w+", "float32", (rows, columns))
    for at in range(0, rows, BLOCK):
        count = min(BLOCK, rows - at)
        noise = generator.standard_normal((count, columns), dtype="float32")
        file[at : at + count] = middle[generator.integers(0, len(middle), count)] + (0.7 if centers else 1) * noise
    file.flush()


def measure(way: str, path: Path, k: int, cgroup: Path | None) -> tuple[list[float], np.ndarray]:
    """Bytes read, seconds and CPU seconds; and the picks."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    out = path.with_suffix(".picks.npz")
    join = f"import os; open({str(cgroup / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n" if cgroup else ""
    command = [sys.executable, "-c", join + WAYS[way] + MEASURE, str(path), str(k), str(out)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    with np.load(out) as file:
        return json.loads(printed.splitlines()[-1]), file["picks"]


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.out_of_core", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="where the files are made")
    add("--cgroup", type=Path, metavar="FOLDER", help="of the control group that limits memory (default: no limit)")
    add("--rows", type=at_least_one, default=750_000, help="default: %(default)s")
    add("--columns", type=at_least_one, default=512, help="default: %(default)s")
    add("--k", type=at_least_one, nargs="+", default=[50], help="default: 50")
    add("--out", type=Path, required=True, metavar="TABLE.md")
    args = parser.parse_args()
    check_output(args.out, [], overwrite=True)
    lines = []
    for name, centers in (("about 200 centers", 200), ("without structure", 0)):
        path = args.folder / f"{centers}.npy"
        make(path, args.rows, args.columns, centers)
        for k in args.k:
            found = {way: measure(way, path, k, args.cgroup) for way in WAYS}
            same = len({tuple(picks.tolist()) for _, picks in found.values()}) == 1
            for way, ((size, wall, cpu), _) in found.items():
                cells = [f"{size / path.stat().st_size:.2f}", f"{wall:.0f} s", f"{cpu:.0f} s", "yes" if same else "NO"]
                lines.append([name, str(k), way, *cells])
                print(*lines[-1], sep="  ", flush=True)
        path.unlink()
    size = args.rows * args.columns * 4 / 1e9
    head = ["rows", "K", "way", "passes of bytes", "wall", "CPU", "same picks"]
    made = [f"{args.rows:,} rows of {args.columns} float32, {size:.2f} GB", "", *table(head, lines)]
    with replacing(args.out, overwrite=True) as file:
        file.write("\n".join(made).encode())


if __name__ == "__main__":
    main()
