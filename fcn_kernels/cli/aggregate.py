"""`python -m fcn_kernels aggregate`: one descriptor a template, from a file of embeddings."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from fcn_kernels.cli.arguments import (
    EXIT_STATUS,
    add_max_unpacked,
    at_least_one,
    check_device,
    finite,
    run_to_status,
)
from fcn_kernels.extras import require
from fcn_kernels.files.aggregate import Pool, aggregate, mean_of_coreset
from fcn_kernels.files.checkpoint import load_checkpoint
from fcn_kernels.files.embeddings import Embeddings, Keys, read
from fcn_kernels.files.formats import EXTRA, InputError, Scratch, format_of, suffix_of
from fcn_kernels.files.output import check_output, replacing
from fcn_kernels.integrations.facecoresetnet import build_head
from fcn_kernels.selection.checks import DTYPES
from fcn_kernels.sets import accumulator

GAMMA = 1.0
"""Without training. On real faces of which most are spoiled it is better than the 0.01 that training starts from, or
level with it (docs/real-faces.md)."""
ABOUT = f"""
Every row f_n of INPUT is made a unit row u_n = f_n / |f_n| of quality q_n: INPUT's quality, or |f_n|. A template's
coreset is K rows i_k, far apart and of good quality. Without a checkpoint its descriptor is their mean, made unit:
  a = 1/K sum_k q_(i_k) u_(i_k),   descriptor = a / |a|,   norm = |a|;
with one, a is what FaceCoresetNet's head gives for the whole template. A template of fewer than K rows uses all.

A good quality says how far a row can be trusted: a face detector's score (exp(score) where it may be negative), a
measure of image quality, or the norm of an embedding that was trained to show it. The norm of any other embedding is
a bad one.

INPUT has the columns features (T, C), template_ids (T,) of integers or strings and, optionally, quality (T,).
Rows of a template may lie anywhere in it.
  .npz          as written by numpy.savez; savez_compressed is read too
  .npy          FEATURES.npy IDS.npy [QUALITY.npy]; FEATURES.npy TABLE.csv, whose first line names its columns, or which
                has the ids alone; or one array with fields of those names
  .pt, .pth     a dict of tensors or arrays (ids may be a list), read with weights_only=True
  .safetensors  tensors
  .parquet      a column of lists and columns of numbers or strings; or a folder of such files, in the order of their
                paths
Features are floating-point numbers or integers. --features 'f*' takes one column for each feature, in the order of the
numbers in their names. .npz that is not compressed, .npy, .pt and .safetensors are mapped, and read as they are needed;
an .npz is read once before, for its checksums. .parquet, compressed .npz and separate columns are unpacked, a piece at
a time, into an unnamed temporary file in OUTPUT's folder, as large as the features. In memory are one batch of rows,
the ids, and OUTPUT.

OUTPUT has, for each template in the order of their ids: template_ids; descriptors (B, C); norms; counts, the picks
that were made; picks (B, K), row numbers of INPUT from 0, -1 where there is none; left_out, rows that
--skip-bad-rows left out. .npy has these as fields of one array. OUTPUT appears when it is whole, or not at
all; a file that appeared there meanwhile is kept, and it is not written where a descriptor is not finite.

{EXIT_STATUS}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = ABOUT
    add = parser.add_argument
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    add(
        "input",
        type=Path,
        nargs="+",
        metavar="INPUT",
        help=".npz, .pt, .safetensors, .parquet, a folder, or several .npy",
    )
    add("--out", type=Path, required=True, metavar="OUTPUT", help=".npz, .npy, .pt, .safetensors or .parquet")
    add("--overwrite", action="store_true", help="replace OUTPUT if it is there")
    add(
        "--checkpoint", type=Path, help="state dict of a CoresetAggregator, or a checkpoint of FaceCoresetNet's authors"
    )
    add("--num-heads", type=at_least_one, default=8, help="of the checkpoint's attentions (default: %(default)s)")
    add("--k", type=at_least_one, default=3, help="picks a template (default: %(default)s)")
    add("--gamma", type=finite, help=f"exponent of the quality (default: the checkpoint's, or {GAMMA})")
    add("--features", metavar="KEY", default=Keys().features, help="name of that column (default: %(default)s)")
    add("--ids", metavar="KEY", default=Keys().ids, help="name of that column (default: %(default)s)")
    add("--quality", metavar="KEY", help="name of that column (default: quality if there is one, else the norms)")
    add("--skip-bad-rows", action="store_true", help="leave out rows that are NaN, infinite or zero, and count them")
    add("--device", default="cpu", help="where selection and head run (default: %(default)s)")
    add("--dtype", choices=dtypes, default="float32", help="of the rows there (default: %(default)s)")
    add(
        "--batch-rows",
        type=at_least_one,
        default=16384,
        help="rows at a time, in whole templates (default: %(default)s)",
    )
    add_max_unpacked(parser)


def run(args: argparse.Namespace) -> int:
    """Read, aggregate, write; returns the exit status that the help promises."""
    return run_to_status("aggregate", partial(run_checked, args), f"{args.out} is as it was")


def run_checked(args: argparse.Namespace) -> str:
    """What :func:`run` does, with errors raised; returns a summary."""
    write = format_of(args.out)
    for package in write.packages:
        require(package, EXTRA)
    read_from = [*args.input, args.checkpoint] if args.checkpoint else args.input
    check_output(args.out, read_from, args.overwrite)
    check_device(args.device)
    keys = Keys(args.features, args.ids, args.quality)
    embeddings = read(args.input, keys, Scratch(args.out.absolute().parent, args.max_unpacked))
    if suffix_of(args.out) == ".safetensors" and embeddings.ids.dtype.kind == "U":
        raise InputError(f"{args.out}: .safetensors cannot hold template ids that are strings: choose another format")
    if args.checkpoint:
        pool = _head(args, embeddings)
    else:
        pool = partial(mean_of_coreset, k=args.k, gamma=GAMMA if args.gamma is None else args.gamma)
    arrays = aggregate(
        embeddings,
        pool,
        k=args.k,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        batch_rows=args.batch_rows,
        skip_bad_rows=args.skip_bad_rows,
    )
    with replacing(args.out, args.overwrite) as file:
        write.write(file, arrays)
    empty, left_out = int((arrays["counts"] == 0).sum()), int(arrays["left_out"].sum())
    summary = f"{args.out}: {len(arrays['counts'])} templates from {len(embeddings.ids)} rows"
    if args.skip_bad_rows:
        summary += f", {left_out} rows left out; templates without a row, whose descriptors are zero: {empty}"
    return summary


def _head(args: argparse.Namespace, embeddings: Embeddings) -> Pool:
    checkpoint = load_checkpoint(args.checkpoint)
    try:
        head = build_head(checkpoint, k=args.k, num_heads=args.num_heads, gamma=args.gamma)
    except (TypeError, ValueError) as error:
        raise InputError(f"{args.checkpoint}: {error}") from error
    columns = embeddings.features.shape[1]
    if columns != head.dim:
        raise InputError(f"{embeddings.source}: has C = {columns} columns, {args.checkpoint} is for C = {head.dim}")
    head.to(args.device, accumulator(getattr(torch, args.dtype)))
    return lambda unit, quality, cu_seqlens: head(unit, quality, cu_seqlens=cu_seqlens)
