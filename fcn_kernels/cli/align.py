"""`python -m fcn_kernels align`: how descriptors stand to a bank of other people, and scores corrected by it."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fcn_kernels.cli.arguments import EXIT_STATUS, add_max_unpacked, at_least_one, finite, run_to_status
from fcn_kernels.evaluation.templates import cosines
from fcn_kernels.extras import require
from fcn_kernels.files import tables
from fcn_kernels.files.align import Bank, check_rows, contexts, read_bank, warnings_of
from fcn_kernels.files.embeddings import Embeddings, Keys, read
from fcn_kernels.files.formats import EXTRA, InputError, Scratch
from fcn_kernels.files.output import check_columns_output, check_ids, write_columns
from fcn_kernels.neighbors.context import Context
from fcn_kernels.neighbors.scores import METHODS, align_scores, unit_rows

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array

ABOUT = f"""
INPUT has the columns template_ids (B,) and descriptors (B, C), as `aggregate` writes them. BANK has descriptors of
other people, as many and as like those in INPUT in kind as can be had: the same columns, or an .npy of rows alone. A
descriptor's context is its K best cosines in BANK: their mean, standard deviation and number. With mean m and
deviation d of the two descriptors of a pair, whose cosine is s:
  --method mean      s - (m_1 + m_2) / 2                       half of CSLS
  --method mean-std  ((s - m_1) / d_1 + (s - m_2) / d_2) / 2   AS-norm
A descriptor of zeros has no context, and scores 0 - m_2 / 2.

Without --pairs, OUTPUT has template_ids, mean, std and counts (B,). With them, lines `template template same` as
`evaluate` takes them, it has first and second (P,), the templates; same; raw, their cosine; and aligned.

BANK may hold the people of INPUT too, if both say who they are: --id-key and --bank-id-key name the columns, and a
descriptor's context leaves out rows of its own identity. That helps where every probe is someone in BANK; where
strangers are among the probes it does harm, and BANK should be of other people.

It can do harm. Measure on pairs of your own with `evaluate --bank`, and choose thresholds anew.

BANK is mapped where its format allows it (.npz that is not compressed, .npy, .pt, .safetensors) and may be larger than
memory; it is read once for each 4096 templates, or more often. In memory are INPUT's ids, with
--pairs its descriptors, and OUTPUT, which appears when it is whole, or not at all.

{EXIT_STATUS}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = ABOUT
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="a file of descriptors, as `aggregate` writes it")
    add("--bank", type=Path, required=True, help="a file of descriptors of other people")
    add("--pairs", type=Path, help="pairs of templates to score")
    add("--out", type=Path, required=True, metavar="OUTPUT", help=".npz, .npy, .pt, .safetensors or .parquet")
    add("--overwrite", action="store_true", help="replace OUTPUT if it is there")
    add_method(parser)
    add("--features", metavar="KEY", default="descriptors", help="that column of INPUT (default: %(default)s)")
    add("--ids", metavar="KEY", default=Keys().ids, help="INPUT's templates (default: %(default)s)")
    add("--bank-features", metavar="KEY", default="descriptors", help="that column of BANK (default: %(default)s)")
    add("--id-key", metavar="KEY", help="INPUT's identities, to leave out their own rows of BANK")
    add("--bank-id-key", metavar="KEY", help="BANK's identities (default: as --id-key)")
    add_max_unpacked(parser)


def add_method(parser: argparse.ArgumentParser) -> None:
    """Declare what a context is and what is done with it."""
    add = parser.add_argument
    add("--k", type=at_least_one, help="neighbors in a context (default: 50, or all that --min-cosine admits)")
    add("--min-cosine", type=finite, metavar="S", help="least cosine of a neighbor, -1 to 1 (default: any)")
    add("--method", choices=METHODS, default="mean", help="(default: %(default)s)")


def neighbors_of(args: argparse.Namespace) -> int | None:
    """The number of neighbors that the options ask for, None for no limit; raises InputError for bad ones."""
    if args.min_cosine is not None and not -1 <= args.min_cosine <= 1:
        raise InputError(f"--min-cosine {args.min_cosine:g}: expected -1 to 1")
    k: int | None = args.k or (50 if args.min_cosine is None else None)
    if k == 1 and args.method == "mean-std":
        raise InputError("--k 1: expected at least 2 with --method mean-std")
    return k


def run(args: argparse.Namespace) -> int:
    """Read, align, write; returns the exit status that the help promises."""
    return run_to_status("align", partial(run_checked, args), f"{args.out} is as it was")


def run_checked(args: argparse.Namespace) -> str:
    """What :func:`run` does, with errors raised; returns a summary."""
    k = neighbors_of(args)
    if args.bank_id_key and not args.id_key:
        raise InputError("--bank-id-key: expected --id-key with it")
    read_from = [path for path in (args.input, args.bank, args.pairs) if path]
    packages = ("numpy", "tqdm", *(["pyarrow.csv"] if args.pairs else []))
    check_columns_output(args.out, read_from, args.overwrite, *packages)
    scratch = Scratch(args.out.absolute().parent, args.max_unpacked)
    embeddings, own = _input(args, scratch)
    check_ids(args.out, embeddings.ids)
    bank_keys = Keys(args.bank_features, args.bank_id_key or args.id_key or Keys().ids)
    bank = read_bank(args.bank, bank_keys, args.id_key is not None, scratch)
    _warn(args, bank, k)
    context = contexts(embeddings.features, bank, ids=own, source=embeddings.source, k=k, min_cosine=args.min_cosine)
    if args.pairs:
        arrays = pair_columns(args.pairs, embeddings, context, args.method)
    else:
        named = {"mean": context.mean, "std": context.std, "counts": context.counts}
        arrays = {"template_ids": embeddings.ids, **{name: column.numpy() for name, column in named.items()}}
    write_columns(args.out, arrays, args.overwrite)
    none, short = int((context.counts == 0).sum()), 0 if k is None else int((context.counts < k).sum())
    what = f"{len(arrays['raw'])} pairs of {len(embeddings.ids)}" if args.pairs else f"{len(embeddings.ids)}"
    summary = f"{args.out}: {what} templates against {len(bank.rows)} bank rows"
    if short:
        summary += f"; fewer than {k} neighbors: {short}, none: {none}"
    return summary


def _input(args: argparse.Namespace, scratch: Scratch) -> tuple[Embeddings, Array | None]:
    """The templates, and their identities if these are to be left out."""
    embeddings = read([args.input], Keys(args.features, args.ids), scratch)
    check_rows(embeddings.features, embeddings.ids, embeddings.source)
    if args.id_key in (None, args.ids):
        return embeddings, None if args.id_key is None else embeddings.ids
    return embeddings, read([args.input], Keys(args.features, args.id_key), scratch).ids


def _warn(args: argparse.Namespace, bank: Bank, k: int | None) -> None:
    for message in warnings_of(bank, k, None if args.id_key else args.input):
        print(f"python -m fcn_kernels align: warning: {message}", file=sys.stderr)


def pair_columns(path: Path, embeddings: Embeddings, context: Context, method: str) -> dict[str, Array]:
    """first, second, same, raw and aligned (P,) of the pairs of a file."""
    np = require("numpy", EXTRA)
    unit = unit_rows(embeddings.features)
    columns: list[tuple[Array, ...]] = []
    for block in tables.pairs(path, embeddings.ids, embeddings.source):
        sides = tuple(torch.from_numpy(side.astype("int64")) for side in (block.first, block.second))
        raw = cosines(unit, *sides)
        one, other = (Context(context.mean[at], context.std[at], context.counts[at], None) for at in sides)
        aligned = align_scores(raw, one, other, method)
        columns.append((block.first, block.second, block.same, raw.numpy(), aligned.numpy()))
    first, second, same, raw, aligned = (np.concatenate(column) for column in zip(*columns, strict=True))
    ids = embeddings.ids
    return {"first": ids[first], "second": ids[second], "same": same, "raw": raw, "aligned": aligned}
