"""`python -m fcn_kernels merge`: one file of the parts that processes or machines wrote."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fcn_kernels.cli.arguments import EXIT_STATUS, add_max_unpacked, run_to_status
from fcn_kernels.extras import require
from fcn_kernels.files.embeddings import alike, column, ids_column
from fcn_kernels.files.formats import EXTRA, InputError, Scratch, format_of, reading
from fcn_kernels.files.output import check_columns_output, check_ids, write_columns

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array

IDS = "template_ids"
ABOUT = f"""
PARTs are what `aggregate --shard` wrote, descriptors or states: files with the same columns, and each template in one
of them. OUTPUT has the rows of all, in the order of their template_ids: what one process would have written. It appears
when it is whole, or not at all.

{EXIT_STATUS}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = ABOUT
    add = parser.add_argument
    add("parts", type=Path, nargs="+", metavar="PART", help="a file that `aggregate` wrote")
    add("--out", type=Path, required=True, metavar="OUTPUT", help=".npz, .npy, .pt, .safetensors or .parquet")
    add("--overwrite", action="store_true", help="replace OUTPUT if it is there")
    add_max_unpacked(parser)


def run(args: argparse.Namespace) -> int:
    """Read, merge, write; returns the exit status that the help promises."""
    return run_to_status("merge", partial(run_checked, args), f"{args.out} is as it was")


def run_checked(args: argparse.Namespace) -> str:
    """What :func:`run` does, with errors raised; returns a summary."""
    check_columns_output(args.out, args.parts, args.overwrite, "numpy")
    scratch = Scratch(args.out.absolute().parent, args.max_unpacked)
    arrays = merged({str(path): _columns(path, scratch) for path in args.parts})
    check_ids(args.out, arrays[IDS])
    write_columns(args.out, arrays, args.overwrite)
    return f"{args.out}: {len(arrays[IDS])} templates of {len(args.parts)} parts"


def _columns(path: Path, scratch: Scratch) -> dict[str, Array]:
    np, source = require("numpy", EXTRA), str(path)
    with reading(source):
        columns = format_of(path).open(path, scratch)
    ids = ids_column(columns, IDS, source, empty=True)
    with reading(source):
        found = {name: np.asarray(column(columns, name, source)) for name in columns if name != IDS}
    others = [f"{values.dtype} in {name!r}" for name, values in found.items() if values.dtype.kind not in "biufU"]
    if others:
        raise InputError(f"{source}: expected numbers or strings, got {', '.join(others)}")
    short = [name for name, values in found.items() if len(values) != len(ids)]
    if short:
        raise InputError(f"{source}: expected {len(ids)} rows, as in {IDS!r}, in {', '.join(map(repr, short))}")
    return {IDS: ids, **found}


def merged(parts: dict[str, dict[str, Array]]) -> dict[str, Array]:
    """The columns of all parts, in the order of the ids.

    Raises:
        InputError: a part has other columns or other widths than the first, or a template is in two.
    """
    np = require("numpy", EXTRA)
    (first, columns), *_ = parts.items()
    shapes = {name: values.shape[1:] for name, values in columns.items()}
    for source, part in parts.items():
        if (others := {name: values.shape[1:] for name, values in part.items()}) != shapes:
            raise InputError(f"{source}: expected the columns of {first}, {shapes}, got {others}")
    full = {source: part for source, part in parts.items() if len(part[IDS])} or {first: columns}
    ids = np.concatenate(alike(*((source, part[IDS]) for source, part in full.items())))
    order = ids.argsort(kind="stable")
    twice = (ids[order][1:] == ids[order][:-1]).nonzero()[0]
    if len(twice):
        one = ids[order][int(twice[0])]
        where = " and ".join(source for source, part in parts.items() if (part[IDS] == one).any())
        raise InputError(f"template {one} is in {where}: expected each template in one part")
    columns_of = {name: np.concatenate([part[name] for part in full.values()]) for name in shapes if name != IDS}
    return {IDS: ids[order], **{name: values[order] for name, values in columns_of.items()}}
