"""`python -m fcn_kernels aggregate`: one descriptor a template, from a file of embeddings."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_kernels.extras import require
from fcn_kernels.files.embeddings import Embeddings, Keys, read
from fcn_kernels.files.formats import EXTRA, InputError, format_of, reading, replacing
from fcn_kernels.heads.facecoresetnet import Aggregate, CoresetAggregator
from fcn_kernels.integrations.facecoresetnet import build_head
from fcn_kernels.selection.checks import DTYPES
from fcn_kernels.selection.select import coreset_select
from fcn_kernels.sets import RowSets, accumulator

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array

# Unit rows (T, C), quality (T,) and cu_seqlens (B + 1,) to B descriptors.
Pool: TypeAlias = Callable[[Tensor, Tensor, Tensor], Aggregate]

GAMMA = 1.0
"""Without training. On real faces of which most are spoiled it is better than the 0.01 that training starts from, or
level with it (docs/real-faces.md)."""
ABOUT = """
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
  .npy          FEATURES.npy IDS.npy [QUALITY.npy]; or one array with fields of those names
  .pt           a dict of tensors (ids may be a list), read with weights_only=True
  .safetensors  tensors
  .parquet      a column of lists and columns of numbers or strings
.npz that is not compressed, .npy, .pt and .safetensors are mapped, and read as they are needed. .parquet and
compressed .npz are unpacked, a piece at a time, into an unnamed temporary file in OUTPUT's folder, as large as the
features. In memory are one batch of rows, the ids, and OUTPUT.

OUTPUT has, for each template in the order of their ids: template_ids; descriptors (B, C); norms; counts, the picks
that were made; picks (B, K), row numbers of INPUT from 0, -1 where there is none; left_out, rows that
--skip-bad-rows left out. .npy has these as fields of one array. OUTPUT appears when it is whole, or not at all.

Exit status: 0 done, 1 could not write, 2 bad usage or input, 130 or more interrupted.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = ABOUT
    add = parser.add_argument
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    add("input", type=Path, nargs="+", metavar="INPUT", help=".npz, .pt, .safetensors, .parquet, or two or three .npy")
    add("--out", type=Path, required=True, metavar="OUTPUT", help=".npz, .npy, .pt, .safetensors or .parquet")
    add("--overwrite", action="store_true", help="replace OUTPUT if it is there")
    add(
        "--checkpoint", type=Path, help="state dict of a CoresetAggregator, or a checkpoint of FaceCoresetNet's authors"
    )
    add("--num-heads", type=at_least_one, default=8, help="of the checkpoint's attentions (default: %(default)s)")
    add("--k", type=at_least_one, default=3, help="picks a template (default: %(default)s)")
    add("--gamma", type=_finite, help=f"exponent of the quality (default: the checkpoint's, or {GAMMA})")
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


def run(args: argparse.Namespace) -> int:
    """Read, aggregate, write; returns the exit status that the help promises."""
    try:
        with _unwinding_on_signals():
            print(run_checked(args))
        return 0
    except InputError as error:
        message, status = str(error), 2
    except OSError as error:
        message, status = str(error), 1
    except KeyboardInterrupt:
        message, status = f"interrupted, {args.out} is as it was", 130
    print(f"python -m fcn_kernels aggregate: {message}", file=sys.stderr)
    return status


def run_checked(args: argparse.Namespace) -> str:
    """What :func:`run` does, with errors raised; returns a summary."""
    dtype = getattr(torch, args.dtype)
    _check_paths(args)
    _check_device(args.device)
    embeddings = read(args.input, Keys(args.features, args.ids, args.quality), args.out.absolute().parent)
    if args.out.suffix == ".safetensors" and embeddings.ids.dtype.kind == "U":
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
        dtype=dtype,
        batch_rows=args.batch_rows,
        skip_bad_rows=args.skip_bad_rows,
    )
    with replacing(args.out) as file:
        format_of(args.out).write(file, arrays)
    empty, left_out = int((arrays["counts"] == 0).sum()), int(arrays["left_out"].sum())
    summary = f"{args.out}: {len(arrays['counts'])} templates from {len(embeddings.ids)} rows"
    if args.skip_bad_rows:
        summary += f", {left_out} rows left out; templates without a row, whose descriptors are zero: {empty}"
    return summary


def mean_of_coreset(unit: Tensor, quality: Tensor, cu_seqlens: Tensor, *, k: int, gamma: float) -> Aggregate:
    """The mean of the coreset's rows q u: its direction, its length, and the coreset.

    Args:
        unit: (T, C) unit rows, packed. quality: (T,), above 0. cu_seqlens: (B + 1,) offsets of the sets.
        k, gamma: as in :func:`coreset_select`.
    """
    coreset = coreset_select(unit, k, quality, gamma, normalized=True, cu_seqlens=cu_seqlens)
    scale = RowSets.packed(cu_seqlens, unit.device).take(quality, coreset.indices)
    mean = (coreset.features * scale[..., None]).sum(1) / coreset.counts.clamp(min=1)[:, None]
    return Aggregate(F.normalize(mean, dim=-1), torch.linalg.vector_norm(mean, dim=-1), coreset)


@torch.inference_mode()
def aggregate(
    embeddings: Embeddings,
    pool: Pool,
    *,
    k: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_rows: int = 16384,
    skip_bad_rows: bool = False,
) -> dict[str, Array]:
    """Aggregate every template, a batch of whole templates at a time.

    Returns:
        Arrays by name, a row for each template in the order of their ids: template_ids, descriptors (B, C), norms,
        counts, picks (B, k) and left_out; see ABOUT.

    Raises:
        InputError: a row has a norm or a quality that is not finite or not above 0, unless `skip_bad_rows`.
    """
    np = require("numpy", EXTRA)
    template_ids, template_of, sizes = np.unique(embeddings.ids, return_inverse=True, return_counts=True)
    order = torch.from_numpy(np.argsort(template_of, kind="stable"))
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]))
    templates = len(template_ids)
    out = {
        "descriptors": torch.zeros(templates, embeddings.features.shape[1], dtype=accumulator(dtype)),
        "norms": torch.zeros(templates, dtype=accumulator(dtype)),
        "counts": torch.zeros(templates, dtype=torch.int64),
        "picks": torch.full((templates, k), -1),
        "left_out": torch.zeros(templates, dtype=torch.int64),
    }
    with require("tqdm", EXTRA).tqdm(total=len(order), desc="aggregating", unit="row", unit_scale=True) as bar:
        for first, last in _batches(offsets, batch_rows):
            rows = order[offsets[first] : offsets[last]]
            starts = offsets[first : last + 1] - offsets[first]
            unit, quality, bad = _unit_rows(embeddings, rows, device, accumulator(dtype), skip_bad_rows)
            descriptor, norm, coreset = pool(unit.to(dtype), quality, starts.to(device, torch.int32))
            picks = coreset.indices.cpu()
            results = {
                "descriptors": descriptor,
                "norms": norm,
                "counts": coreset.counts,
                "picks": torch.where(picks < 0, -1, rows[starts[:-1, None] + picks]),
                "left_out": F.pad(bad.cumsum(0), (1, 0))[starts].diff(),
            }
            for name, values in results.items():
                out[name][first:last] = values
            bar.update(len(rows))
    return {"template_ids": template_ids, **{name: values.numpy() for name, values in out.items()}}


def load_head(path: Path, *, k: int = 3, num_heads: int = 8, gamma: float | None = None) -> CoresetAggregator:
    """The head of a checkpoint, in ``eval()``: a CoresetAggregator's state dict or a checkpoint of the authors'.

    Args:
        path: of the file, read with ``weights_only=True``; or .safetensors.
        k, num_heads: what a state dict does not tell. gamma: instead of the checkpoint's.
    """
    with reading(path):
        if path.suffix == ".safetensors":
            state = require("safetensors.torch", EXTRA).load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, Mapping):
            raise InputError(f"{path}: expected a state dict, got {type(state).__name__}")
        return build_head(state, k=k, num_heads=num_heads, gamma=gamma)


def _head(args: argparse.Namespace, embeddings: Embeddings) -> Pool:
    head = load_head(args.checkpoint, k=args.k, num_heads=args.num_heads, gamma=args.gamma)
    columns = embeddings.features.shape[1]
    if columns != head.dim:
        raise InputError(f"{embeddings.source}: has C = {columns} columns, {args.checkpoint} is for C = {head.dim}")
    head.to(args.device, accumulator(getattr(torch, args.dtype)))
    return lambda unit, quality, cu_seqlens: head(unit, quality, cu_seqlens=cu_seqlens)


def _batches(offsets: Tensor, batch_rows: int) -> Iterator[tuple[int, int]]:
    """Runs [first, last) of templates with at most `batch_rows` rows, or of one template with more."""
    first, templates = 0, len(offsets) - 1
    while first < templates:
        fits = int(torch.searchsorted(offsets, offsets[first] + batch_rows, right=True)) - 1
        last = max(fits, first + 1)
        yield first, last
        first = last


def _unit_rows(
    embeddings: Embeddings, rows: Tensor, device: str, dtype: torch.dtype, skip_bad_rows: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows: unit (n, C) and quality (n,) on the device, and, on the CPU, which (n,) are bad.

    Bad rows end as NaN or zero rows or keep their bad quality: all that selection and head leave out by themselves.
    """
    unit = embeddings.features[rows].to(device, dtype)
    norms = torch.linalg.vector_norm(unit, dim=-1)
    quality = norms if embeddings.quality is None else embeddings.quality[rows].to(norms)
    usable = (norms > 0) & (norms < math.inf)
    bad = ~(usable & (quality > 0) & (quality < math.inf)).cpu()
    if bad.any() and not skip_bad_rows:
        at = int(torch.where(bad, rows, len(embeddings.ids)).argmin())
        what, value = ("its quality", quality) if usable[at] else ("the norm of its features", norms)
        kind = str(dtype).removeprefix("torch.")
        raise embeddings.bad_row(
            int(rows[at]),
            f"{what} is {float(value[at]):g} in {kind}, expected finite and above 0 "
            "(--skip-bad-rows leaves such rows out)",
        )
    return unit.div_(norms[:, None]), quality, bad


def _check_paths(args: argparse.Namespace) -> None:
    """Refuse before the work what could not be written after it, or would be lost."""
    out: Path = args.out
    for package in format_of(out).packages:
        require(package, EXTRA)
    if not os.access(out.absolute().parent, os.W_OK):
        raise InputError(f"{out}: expected a file in a folder that exists and can be written to")
    if out.is_dir():
        raise InputError(f"{out}: is a folder")
    if out.exists():
        if any(path and path.exists() and path.samefile(out) for path in (*args.input, args.checkpoint)):
            raise InputError(f"{out}: is read from, and cannot be OUTPUT too")
        if not args.overwrite:
            raise InputError(f"{out}: is there already; --overwrite replaces it")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from error


@contextmanager
def _unwinding_on_signals() -> Iterator[None]:
    """Let signals that would end the process at once raise SystemExit instead, so that nothing is left behind."""

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [s for s in (getattr(signal, name) for name in names) if signal.getsignal(s) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def at_least_one(text: str) -> int:
    """A count, as an argument of a command."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
    return value
