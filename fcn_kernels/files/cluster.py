"""Cluster and Aggregate over files: descriptors of templates, and their states, which later images join."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fcn_kernels.extras import require
from fcn_kernels.files.aggregate import Batch, Shard, Templates, check_finite, per_template
from fcn_kernels.files.embeddings import Embeddings, alike, column, ids_column
from fcn_kernels.files.formats import EXTRA, InputError, Scratch, format_of, reading
from fcn_kernels.heads.cluster_aggregate import ClusterAggregate
from fcn_kernels.heads.cluster_state import ClusterState

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array

FINISHED_TOGETHER = 2048
"""States that are made descriptors at a time: 40 MB of them at the published sizes."""


class States(NamedTuple):
    """What is known of templates."""

    ids: Array
    """(B,) integers or strings, sorted."""
    state: ClusterState
    """Of B sets, on the CPU."""

    def of(self, shard: Shard | None) -> States:
        """Those of a shard's templates."""
        if shard is None:
            return self
        mine = torch.tensor([shard.has(one) for one in self.ids.tolist()], dtype=torch.bool)
        return States(self.ids[mine.numpy()], self.state[mine])


class Options(NamedTuple):
    """How rows are taken."""

    chunk: int
    device: str
    dtype: torch.dtype
    batch_rows: int
    skip_bad_rows: bool
    shard: Shard | None = None


@torch.inference_mode()
def cluster_templates(
    embeddings: Embeddings, head: ClusterAggregate, options: Options, before: States | None = None, keep: bool = False
) -> tuple[dict[str, Array], States | None]:
    """Cluster and aggregate every template, a batch of whole templates at a time.

    Args:
        embeddings: with styles, if the head has them. head: in ``eval()`` on the device.
        before: states that the rows join; their templates are in the results, also those without new rows.
        keep: give the states, too; 20 kB a template at the published sizes.

    Returns:
        Arrays by name, a row for each template in the order of their ids: template_ids, descriptors (B, C), norms,
        counts, and left_out; and the states, if `keep`.

    Raises:
        InputError: a row is bad, unless it may be skipped; or ids of both files are not of one kind.
        FloatingPointError: a descriptor is not finite.
    """
    np = require("numpy", EXTRA)
    templates = Templates.of(embeddings, options.shard)
    ids, known = templates.ids, None
    if before is not None:
        known_ids, own = alike(("the states", before.ids), (embeddings.source, ids))
        before, templates = before._replace(ids=known_ids).of(options.shard), templates._replace(ids=own)
        ids = np.union1d(before.ids, own)
    if before is not None or keep:
        known = _empty(head, len(ids))
    if before is not None and known is not None:
        _put(known, torch.from_numpy(np.searchsorted(ids, before.ids)), before.state)
    place = torch.from_numpy(np.searchsorted(ids, templates.ids))
    out = _Output(ids, head, embeddings.source)
    _, device, dtype, batch_rows, skip_bad_rows, _ = options
    for batch in templates.batches(embeddings, device, dtype, batch_rows, skip_bad_rows):
        at = place[batch.templates]
        state, bad = _update(head, embeddings, batch, options)
        out.left_out[at] = per_template(bad, batch.starts)
        if known is None:
            out.finish(at, state)
        else:
            _put(known, at, known[at] + state.to("cpu"))
    if known is not None:
        for at in torch.arange(len(ids)).split(FINISHED_TOGETHER):
            out.finish(at, known[at])
    return out.arrays(), States(ids, known) if keep and known is not None else None


def _update(
    head: ClusterAggregate, embeddings: Embeddings, batch: Batch, options: Options
) -> tuple[ClusterState, Tensor]:
    """The state of a batch's rows, and which (n,) are bad."""
    styles, bad = None, batch.bad
    if embeddings.styles is not None:
        styles = embeddings.styles[batch.rows]
        unusable = ~styles.flatten(1).isfinite().all(-1)
        if unusable.any() and not options.skip_bad_rows:
            row = int(batch.rows[int(unusable.int().argmax())])
            raise embeddings.bad_row(row, "its style is not finite (--skip-bad-rows leaves such rows out)")
        bad, styles = bad | unusable, styles.to(options.device)
    unit = batch.unit.to(options.dtype)
    quality = batch.quality.masked_fill(batch.bad.to(options.device), torch.nan)  # the head takes 0, the tool does not
    offsets = batch.starts.to(options.device)
    return head.update(unit, styles, quality, chunk=options.chunk, cu_seqlens=offsets), bad


class _Output:
    """Arrays that are filled, some templates at a time."""

    def __init__(self, ids: Array, head: ClusterAggregate, source: str) -> None:
        self.ids, self.head, self.source = ids, head, source
        self.descriptors = head.centers.new_zeros(len(ids), head.dim, device="cpu")
        self.norms, self.counts = self.descriptors.new_zeros(len(ids)), torch.zeros(len(ids), dtype=torch.int64)
        self.left_out = torch.zeros(len(ids), dtype=torch.int64)

    def finish(self, at: Tensor, state: ClusterState) -> None:
        """Descriptors of the templates at places (n,)."""
        fused = self.head.finish(state.to(str(self.head.centers.device)))
        check_finite(fused.descriptor, self.ids[at.numpy()], self.source)
        for values, found in zip(
            (self.descriptors, self.norms, self.counts), (fused.descriptor, fused.norm, fused.counts), strict=True
        ):
            values[at] = found.cpu()

    def arrays(self) -> dict[str, Array]:
        """By the names of the output's columns."""
        names = ("descriptors", "norms", "counts", "left_out")
        return {"template_ids": self.ids, **{name: getattr(self, name).numpy() for name in names}}


def _empty(head: ClusterAggregate, sets: int) -> ClusterState:
    """Of templates without rows."""
    clusters, width = head.centers.shape
    sums, styles, masses = (
        torch.zeros(sets, clusters, *last, dtype=torch.float64) for last in ((head.dim,), (width,), ())
    )
    return ClusterState(sums, styles, masses, torch.zeros(sets, dtype=torch.int64))


def _put(known: ClusterState, at: Tensor, state: ClusterState) -> None:
    for name, values in vars(known).items():
        values[at] = getattr(state, name)


def head_number(head: ClusterAggregate) -> int:
    """A number that tells a head's parameters from others': states of one head mean nothing to another."""
    digest = hashlib.sha256()
    for name, value in sorted(head.state_dict().items()):
        if "num_batches_tracked" not in name:
            digest.update(name.encode() + value.detach().cpu().double().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "big", signed=True)


def state_columns(states: States, head: ClusterAggregate) -> dict[str, Array]:
    """Columns of one row a template, which every format can hold: sums and styles lie flat."""
    np = require("numpy", EXTRA)
    tensors = {name: values.flatten(1) if values.ndim == 3 else values for name, values in vars(states.state).items()}
    number = np.full(len(states.ids), head_number(head), "int64")
    return {"template_ids": states.ids, **{name: t.numpy() for name, t in tensors.items()}, "head": number}


def read_states(path: Path, head: ClusterAggregate, scratch: Scratch) -> States:
    """What :func:`state_columns` made and a format wrote.

    Raises:
        InputError: the file cannot be read, lacks a column, has a template twice, or is of another head.
    """
    np = require("numpy", EXTRA)
    source = str(path)
    with reading(source):
        columns: Mapping[str, Any] = format_of(path).open(path, scratch)
        ids = ids_column(columns, "template_ids", source)
        names = ("sums", "styles", "masses", "counts", "head")
        found = {name: column(columns, name, source) for name in names}
        read = {n: t.clone() if isinstance(t, Tensor) else torch.from_numpy(np.array(t)) for n, t in found.items()}
        number = read.pop("head")
        if (number != head_number(head)).any():
            raise InputError("is of another checkpoint, or of another --dtype than this run's")
        sets, clusters = len(ids), head.centers.shape[0]
        for name, width in (("sums", head.dim), ("styles", head.centers.shape[1])):
            if tuple(read[name].shape) != (sets, clusters * width):
                raise InputError(f"expected {name!r} of shape ({sets}, {clusters * width}), got {read[name].shape}")
            read[name] = read[name].view(sets, clusters, width)
        unique, order = np.unique(ids, return_index=True)
        if len(unique) != sets:
            raise InputError("expected every template once")
        state = ClusterState(**read)
        if not all(values.isfinite().all() for values in read.values()):
            raise InputError("expected finite sums")
    return States(unique, state[torch.from_numpy(order)])
