"""`python -m fcn_kernels aggregate`: one descriptor a template, from a file of embeddings."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fcn_kernels.checks import DTYPES
from fcn_kernels.cli.arguments import (
    EXIT_STATUS,
    add_max_unpacked,
    at_least_one,
    check_device,
    finite,
    run_to_status,
)
from fcn_kernels.files.aggregate import GAMMA, PICKS, Pool, Shard, aggregate, mean_of_coreset
from fcn_kernels.files.checkpoint import load_checkpoint
from fcn_kernels.files.cluster import Options, cluster_templates, read_states, state_columns
from fcn_kernels.files.embeddings import Embeddings, Keys, read
from fcn_kernels.files.formats import InputError, Scratch
from fcn_kernels.files.output import check_columns_output, check_ids, write_columns
from fcn_kernels.heads.cluster_aggregate import ClusterAggregate
from fcn_kernels.integrations import caface
from fcn_kernels.integrations.facecoresetnet import build_head
from fcn_kernels.sets import accumulator

CHUNK = 512
ABOUT = f"""
Every row f_n of INPUT is made a unit row u_n = f_n / |f_n| of quality q_n: INPUT's quality, or |f_n|. A template's
coreset is K rows i_k, far apart and of good quality. Without a checkpoint its descriptor is their mean, made unit:
  a = 1/K sum_k q_(i_k) u_(i_k),   descriptor = a / |a|,   norm = |a|;
with one, a is what FaceCoresetNet's head gives for the whole template. A template of fewer than K rows uses all.

A checkpoint of a ClusterAggregate, or of CAFace, takes the place of picks: every row is shared out among its centers
(--styles, --chunk; the quality has to be the rows' norms). OUTPUT then has no picks, and counts are the rows that took
part. --state-out keeps what is known of each template, in any of the formats; a later run with --state-in adds its rows
to it and gives the descriptors of all templates in either, without the old rows: to the bit what one run over all the
rows would give, if the templates are cut in the same chunks.

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
the ids, and OUTPUT; and states, with --state-in or --state-out: 20 kB a template at CAFace's sizes.

OUTPUT has, for each template in the order of their ids: template_ids; descriptors (B, C); norms; counts, the picks
that were made; picks (B, K), row numbers of INPUT from 0, -1 where there is none; left_out, rows that
--skip-bad-rows left out. .npy has these as fields of one array. OUTPUT appears when it is whole, or not at
all; a file that appeared there meanwhile is kept, and it is not written where a descriptor is not finite.

Several processes or machines: each takes --shard I/N of the templates, by a hash of their ids, and `merge` makes one
file of what they write. Under torchrun a process takes its own, and writes OUTPUT with I-of-N before the suffix:
  torchrun --nproc-per-node 4 -m fcn_kernels aggregate INPUT --out parts.npz
  python -m fcn_kernels merge parts.*-of-4.npz --out descriptors.npz

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
        "--checkpoint",
        type=Path,
        help="state dict of a CoresetAggregator or a ClusterAggregate, or of the authors of FaceCoresetNet or CAFace",
    )
    add("--num-heads", type=at_least_one, default=8, help="of the checkpoint's attentions (default: %(default)s)")
    add("--k", type=at_least_one, help=f"picks a template (default: {PICKS})")
    add("--gamma", type=finite, help=f"exponent of the quality (default: the checkpoint's, or {GAMMA})")
    add("--features", metavar="KEY", default=Keys().features, help="name of that column (default: %(default)s)")
    add("--ids", metavar="KEY", default=Keys().ids, help="name of that column (default: %(default)s)")
    add("--quality", metavar="KEY", help="name of that column (default: quality if there is one, else the norms)")
    add("--styles", metavar="KEY", help="name of that column, (T, style_dim) or (T, S, 2), for ClusterAggregate")
    add("--chunk", type=at_least_one, metavar="N", help=f"rows that see one another (default: {CHUNK})")
    add("--state-in", type=Path, metavar="STATE", help="what --state-out kept: INPUT's rows join it")
    add("--state-out", type=Path, metavar="STATE", help="keep what is known of each template")
    add("--skip-bad-rows", action="store_true", help="leave out rows that are NaN, infinite or zero, and count them")
    add(
        "--shard",
        type=shard,
        metavar="I/N",
        help="the I-th of N parts of the templates, from 0; `merge` puts them together",
    )
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
    _own_share(args)
    checkpoint = load_checkpoint(args.checkpoint) if args.checkpoint else None
    if checkpoint is not None and caface.recognizes(checkpoint):
        return _cluster(args, checkpoint)
    for name in ("styles", "chunk", "state_in", "state_out"):
        if getattr(args, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')}: expected with --checkpoint of a ClusterAggregate or of CAFace"
            )
    k = args.k or PICKS
    embeddings = _read(args)
    if checkpoint is not None:
        pool = _head(args, checkpoint, k, embeddings)
    else:
        pool = partial(mean_of_coreset, k=k, gamma=GAMMA if args.gamma is None else args.gamma)
    arrays = aggregate(
        embeddings,
        pool,
        k=k,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        batch_rows=args.batch_rows,
        skip_bad_rows=args.skip_bad_rows,
        shard=args.shard,
    )
    write_columns(args.out, arrays, args.overwrite)
    return _summary(args, arrays, len(embeddings.ids))


def _own_share(args: argparse.Namespace) -> None:
    """Under torchrun, the process's shard, outputs and GPU."""
    world = os.environ.get("WORLD_SIZE", "1")
    if args.shard is not None or world in ("0", "1"):
        return
    try:
        args.shard = shard(f"{os.environ.get('RANK', '')}/{world}")
    except argparse.ArgumentTypeError as error:
        raise InputError(f"the environment's RANK/WORLD_SIZE: {error}; --shard takes their place") from error
    for name in ("out", "state_out"):
        path: Path | None = getattr(args, name)
        if path is not None:
            setattr(args, name, path.with_name(f"{path.stem}.{args.shard.number}-of-{world}{path.suffix}"))
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"


def shard(text: str) -> Shard:
    """I/N."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N, got {text}")
    return Shard(int(number), int(count))


def _read(args: argparse.Namespace) -> Embeddings:
    """INPUT, when all outputs can be written."""
    read_from = [path for path in (*args.input, args.checkpoint, args.state_in) if path]
    outputs = [args.out] + [args.state_out] * (args.state_out is not None)
    if len(outputs) == 2 and outputs[0].absolute() == outputs[1].absolute():
        raise InputError(f"{args.out}: expected another file for --state-out")
    for path in outputs:
        check_columns_output(path, read_from, args.overwrite)
    check_device(args.device)
    keys = Keys(args.features, args.ids, args.quality, args.styles)
    embeddings = read(args.input, keys, Scratch(args.out.absolute().parent, args.max_unpacked))
    for path in outputs:
        check_ids(path, embeddings.ids)
    return embeddings


def _summary(args: argparse.Namespace, arrays: Mapping[str, Any], rows: int) -> str:
    empty, left_out = int((arrays["counts"] == 0).sum()), int(arrays["left_out"].sum())
    summary = f"{args.out}: {len(arrays['counts'])} templates from {rows} rows"
    if args.state_in:
        summary += f" and {args.state_in}"
    if args.skip_bad_rows:
        summary += f", {left_out} rows left out; templates without a row, whose descriptors are zero: {empty}"
    return summary


def _head(args: argparse.Namespace, checkpoint: Mapping[str, Any], k: int, embeddings: Embeddings) -> Pool:
    try:
        head = build_head(checkpoint, k=k, num_heads=args.num_heads, gamma=args.gamma)
    except (TypeError, ValueError) as error:
        raise InputError(f"{args.checkpoint}: {error}") from error
    _check_columns(embeddings, head.dim, args.checkpoint)
    head.to(args.device, accumulator(getattr(torch, args.dtype)))
    return lambda unit, quality, cu_seqlens: head(unit, quality, cu_seqlens=cu_seqlens)


def _check_columns(embeddings: Embeddings, dim: int, checkpoint: Path) -> None:
    columns = embeddings.features.shape[1]
    if columns != dim:
        raise InputError(f"{embeddings.source}: has C = {columns} columns, {checkpoint} is for C = {dim}")


def _cluster(args: argparse.Namespace, checkpoint: Mapping[str, Any]) -> str:
    """The whole run with a ClusterAggregate."""
    for name in ("k", "gamma"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name}: {args.checkpoint} is of a ClusterAggregate, which picks no rows")
    embeddings, dtype = _read(args), getattr(torch, args.dtype)
    try:
        head = caface.build_head(checkpoint, num_heads=args.num_heads, dim=embeddings.features.shape[1])
    except (TypeError, ValueError) as error:
        raise InputError(f"{args.checkpoint}: {error}") from error
    _check_styles(embeddings, head, args)
    head.to(args.device, accumulator(dtype))
    before = None
    if args.state_in:
        before = read_states(args.state_in, head, Scratch(args.out.absolute().parent, args.max_unpacked))
    options = Options(args.chunk or CHUNK, args.device, dtype, args.batch_rows, args.skip_bad_rows, args.shard)
    arrays, states = cluster_templates(embeddings, head, options, before, keep=args.state_out is not None)
    if states is not None:
        write_columns(args.state_out, state_columns(states, head), args.overwrite)
    write_columns(args.out, arrays, args.overwrite)
    return _summary(args, arrays, len(embeddings.ids))


def _check_styles(embeddings: Embeddings, head: ClusterAggregate, args: argparse.Namespace) -> None:
    """They are there if and only if the head takes them, in a shape that it takes."""
    styles, source = embeddings.styles, embeddings.source
    if head.style_dim == 0 or styles is None:
        if (styles is None) != (head.style_dim == 0):
            wanted = "no --styles" if head.style_dim == 0 else "--styles with the name of their column"
            raise InputError(f"{source}: expected {wanted}, for {args.checkpoint}, whose style_dim is {head.style_dim}")
        return
    shapes = [(head.style_dim,)] + ([] if head.style is None else [tuple(head.style.mix.shape)])
    if tuple(styles.shape[1:]) not in shapes:
        raise InputError(
            f"{source}: expected a row of {args.styles!r} of shape {shapes}, got {tuple(styles.shape[1:])}"
        )
