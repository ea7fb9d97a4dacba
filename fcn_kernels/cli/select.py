"""`python -m fcn_kernels select`: the few rows of a file that are good and different, of a file of any size."""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcn_kernels.checks import METRICS
from fcn_kernels.cli.arguments import EXIT_STATUS, add_max_unpacked, at_least_one, finite, run_to_status
from fcn_kernels.extras import require
from fcn_kernels.files.embeddings import Keys, read_rows
from fcn_kernels.files.formats import EXTRA, InputError, Scratch, reading
from fcn_kernels.files.output import check_columns_output, write_columns
from fcn_kernels.files.resume import check_state, load_state, save_state, state_path, what_was_kept
from fcn_kernels.selection.out_of_core import Known, Picker
from fcn_kernels.sets import accumulator, finite_marks, row_norms, usable

SAVE_SECONDS, SAVE_TIMES = 20.0, 20  # between states: at least these seconds, and so many times what saving took
ABOUT = f"""
Picked is the row of best quality, then repeatedly the row n that is farthest from all picks:
  distance  q_n^gamma (1 - cosine to the nearest pick), or with --metric sqeuclidean q_n^gamma |x_n - nearest pick|^2
With gamma 0, the default, that is k-center-greedy (farthest-point) sampling. Without a column of qualities these are
the rows' norms, and 1 for squared distances. Rows that are NaN or infinite, or whose quality is not above 0, are never
picked, nor are rows of zeros by cosines. The picks are those of coreset_select on the whole file.

INPUT is an .npy of rows (T, C), or has a column of them: .npz, .pt, .safetensors, .parquet, as `aggregate` reads them.
It may be larger than memory. It is read once in order, and then, for each pick, only those pages that have rows that
could still win: some 3 times in all for 50 picks. In memory are 20 bytes a row, and up to the first picks 17 more. What
is packed (.parquet, compressed .npz) is unpacked first, a piece at a time, into an unnamed file in OUTPUT's folder; an
.npz that is not is read once more, for its checksum. --labelled FILE has rows that are chosen already, in the same
columns: distances begin as those to them, and the first pick is the farthest.

OUTPUT has picks (K,), row numbers from 0; distances (K,), how far each was when it was picked; and covering_radius
(K,), how far the farthest row was from all that were chosen after 1, 2, ... picks: the last, which is printed too, is
that of all. OUTPUT.state is there while the run is not finished, and --resume goes on from it, to the same picks. Both
appear whole, or not at all.

{EXIT_STATUS}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = ABOUT
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="a file of rows")
    add("--k", type=at_least_one, required=True, help="rows to pick")
    add("--out", type=Path, required=True, metavar="OUTPUT", help=".npz, .npy, .pt, .safetensors or .parquet")
    add("--overwrite", action="store_true", help="replace OUTPUT if it is there")
    add("--resume", action="store_true", help="go on from OUTPUT.state")
    add("--labelled", type=Path, metavar="FILE", help="rows that are chosen already")
    add("--metric", choices=METRICS, default=METRICS[0], help="distance (default: %(default)s)")
    add("--gamma", type=finite, default=0.0, help="exponent of the quality (default: %(default)s)")
    add("--start", type=int, metavar="ROW", help="first pick (default: the row of best quality)")
    add("--features", metavar="KEY", default=Keys().features, help="name of that column (default: %(default)s)")
    add("--quality", metavar="KEY", help="name of that column (default: quality if there is one)")
    add_max_unpacked(parser)


def run(args: argparse.Namespace) -> int:
    """Read, pick, write; returns the exit status that the help promises."""
    return run_to_status("select", partial(run_checked, args), partial(what_was_kept, args.out))


def run_checked(args: argparse.Namespace) -> str:
    """What :func:`run` does, with errors raised; returns a summary."""
    inputs = [path for path in (args.input, args.labelled) if path]
    check_columns_output(args.out, inputs, args.overwrite, "numpy", "tqdm")
    check_state(args.out, inputs, args.resume or args.overwrite)
    scratch, keys = Scratch(args.out.absolute().parent, args.max_unpacked), Keys(args.features, quality=args.quality)
    rows, quality = read_rows(args.input, keys, scratch)
    anchors = None if args.labelled is None else _anchors(args, keys, scratch, rows)
    if not rows.is_floating_point():
        raise InputError(f"{args.input}: expected floating-point rows, got {rows.dtype}")
    if not len(rows):
        raise InputError(f"{args.input}: expected at least one row, got none")
    if args.start is not None and not 0 <= args.start < len(rows):
        raise InputError(f"--start {args.start}: expected a row of {args.input}, 0 to {len(rows) - 1}")
    fixed = {
        "rows": list(rows.shape),
        "dtype": str(rows.dtype),
        "size": args.input.stat().st_size,
        "modified": args.input.stat().st_mtime_ns,
        "labelled": 0 if anchors is None else float(anchors.double().sum()),
        "metric": args.metric,
        "gamma": args.gamma,
        "start": args.start,
        # numbers alone: NaN would differ from itself
        "quality": None if quality is None else float(quality.nan_to_num(0.0, 0.0, 0.0).sum()),
    }
    known = _saved(args, fixed) if args.resume else None
    picker, read = _pick(args, rows, quality, anchors, known, fixed)
    if not len(picker.known.picks):
        raise InputError(f"{args.input}: no row can be picked, or not the one that --start names")
    picks, distances, radius = picker.known.picks, picker.known.distances, picker.radius()  # which reads rows
    radii = torch.cat([distances[1:], distances.new_tensor([radius])])
    arrays = {"picks": picks.numpy(), "distances": distances.numpy(), "covering_radius": radii.numpy()}
    write_columns(args.out, arrays, args.overwrite)
    state_path(args.out).unlink(missing_ok=True)
    asked = "" if len(picks) == args.k else f", not the {args.k} asked for, as no other can be picked"
    return (
        f"{args.out}: {len(picks)} of {len(rows)} rows{asked}, covering radius {radius:.6g}; "
        f"read {read / (rows.numel() * rows.itemsize):.2f} times"
    )


def _pick(
    args: argparse.Namespace, rows: Tensor, quality: Tensor | None, anchors: Tensor | None, known: Known | None,
    fixed: dict[str, Any],
) -> tuple[Picker, int]:  # fmt: skip
    """Make the picks, saving a state now and then; also how many bytes were read."""
    read, next_save = 0, -math.inf
    done = 0 if known is None else len(known.picks)
    with require("tqdm", EXTRA).tqdm(total=args.k, initial=done, desc="picking", unit="pick") as bar:

        def progress(count: int) -> None:
            nonlocal read
            read += count
            bar.set_postfix(read=f"{read / (rows.numel() * rows.itemsize):.2f}x", refresh=False)

        picker = Picker(rows, quality, args.gamma, anchors, args.start, known, progress, args.metric)
        while len(picker.known.picks) < args.k and picker.pick():
            bar.update()
            if (begin := time.monotonic()) > next_save:
                save_state(args.out, picker.known._asdict(), fixed)
                next_save = time.monotonic() + max(SAVE_SECONDS, SAVE_TIMES * (time.monotonic() - begin))
    return picker, read


def _anchors(args: argparse.Namespace, keys: Keys, scratch: Scratch, rows: Tensor) -> Tensor:
    path = args.labelled
    anchors, _ = read_rows(path, keys, scratch)
    if anchors.shape[1] != rows.shape[1]:
        raise InputError(f"{path}: expected rows of {rows.shape[1]} columns, as in the input, got {anchors.shape[1]}")
    anchors = anchors.to(accumulator(rows.dtype))
    norms = row_norms(anchors) if args.metric == "cosine" else finite_marks(anchors)
    bad = ~usable(norms, norms)
    if bad.any():
        raise InputError(f"{path}: row {int(bad.int().argmax())}: is not finite, or zero")
    return anchors


def _saved(args: argparse.Namespace, fixed: dict[str, Any]) -> Known:
    path, state = state_path(args.out), load_state(args.out, fixed)
    with reading(path):
        known = Known(**{name: state[name] for name in Known._fields})
    if len(known.picks) > args.k:
        raise InputError(f"{path}: has {len(known.picks)} picks already, more than --k {args.k}")
    return known
