"""One descriptor per template, from rows on disk: a batch of whole templates at a time."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_kernels.extras import require
from fcn_kernels.files.embeddings import Embeddings
from fcn_kernels.files.formats import EXTRA, InputError
from fcn_kernels.heads.facecoresetnet import Aggregate
from fcn_kernels.selection.select import Coreset, coreset_select
from fcn_kernels.sets import RowSets, accumulator, row_norms, usable

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array

# Unit rows (T, C), quality (T,) and cu_seqlens (B + 1,) to B descriptors.
Pool: TypeAlias = Callable[[Tensor, Tensor, Tensor], Aggregate]

PICKS = 3
"""Of a template, where nothing else is asked for."""
GAMMA = 1.0
"""Without training. On real faces of which most are spoiled it is better than the 0.01 that training starts from, or
level with it (docs/real-faces.md)."""
MOST_PICKS = 4096
"""More are asked for only where a template has as many rows."""


def mean_of_coreset(unit: Tensor, quality: Tensor, cu_seqlens: Tensor, *, k: int, gamma: float) -> Aggregate:
    """The mean of the coreset's rows q u: its direction, its length, and the coreset.

    Args:
        unit: (T, C) unit rows, packed. quality: (T,), above 0. cu_seqlens: (B + 1,) offsets of the sets.
        k, gamma: as in :func:`coreset_select`.
    """
    coreset = coreset_select(unit, k, quality, gamma, normalized=True, cu_seqlens=cu_seqlens)
    assert isinstance(coreset, Coreset)
    scale = RowSets.packed(cu_seqlens, unit.device).take(quality, coreset.indices)
    mean = (coreset.features * scale[..., None]).sum(1) / coreset.counts.clamp(min=1)[:, None]
    norm = row_norms(mean)  # not F.normalize, which leaves a length below 1e-12 and makes zeros where squares overflow
    return Aggregate(mean / torch.where(norm > 0, norm, 1)[:, None], norm, coreset)


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
    shard: Shard | None = None,
    show: bool = True,
) -> dict[str, Array]:
    """Aggregate every template, or those of a shard, a batch of whole templates at a time; ``show`` how far it is.

    Returns:
        Arrays by name, a row for each template in the order of their ids: template_ids, descriptors (B, C), norms,
        counts, picks (B, k) and left_out.

    Raises:
        InputError: a row has a norm or a quality that is not finite or not above 0, unless `skip_bad_rows`; or k is
            above 4096 and above the rows of the largest template.
        FloatingPointError: a descriptor is not finite.
    """
    templates = Templates.of(embeddings, shard)
    count = len(templates.ids)
    most = int(templates.offsets.diff().max()) if count else 0
    if k > max(MOST_PICKS, most):
        raise InputError(f"--k {k}: expected at most {MOST_PICKS}, or the {most} rows of the largest template")
    out = {
        "descriptors": torch.zeros(count, embeddings.features.shape[1], dtype=accumulator(dtype)),
        "norms": torch.zeros(count, dtype=accumulator(dtype)),
        "counts": torch.zeros(count, dtype=torch.int64),
        "picks": torch.full((count, k), -1),
        "left_out": torch.zeros(count, dtype=torch.int64),
    }
    for batch in templates.batches(embeddings, device, dtype, batch_rows, skip_bad_rows, show):
        descriptor, norm, coreset = pool(batch.unit.to(dtype), batch.quality, batch.starts.to(device, torch.int32))
        check_finite(descriptor, templates.ids[batch.templates], embeddings.source)
        picks = coreset.indices.cpu()
        results = {
            "descriptors": descriptor,
            "norms": norm,
            "counts": coreset.counts,
            "picks": torch.where(picks < 0, -1, batch.rows[batch.starts[:-1, None] + picks]),
            "left_out": per_template(batch.bad, batch.starts),
        }
        for name, values in results.items():
            out[name][batch.templates] = values
    return {"template_ids": templates.ids, **{name: values.numpy() for name, values in out.items()}}


class Shard(NamedTuple):
    """Every template is in one of N shards, wherever and in whatever order it is asked."""

    number: int
    """0 to N - 1."""
    shards: int
    """N."""

    def has(self, template: int | str) -> bool:
        """Whether a template is in this shard."""
        return shard_of(template, self.shards) == self.number


def shard_of(template: int | str, shards: int) -> int:
    """The number of the shard that a template is in, from its id alone."""
    return zlib.crc32(str(template).encode()) % shards


class Batch(NamedTuple):
    """Some whole templates."""

    templates: slice
    rows: Tensor
    """(n,), their numbers in the file."""
    starts: Tensor
    """(templates + 1,) offsets of the templates among these rows."""
    unit: Tensor
    """(n, C) on the device; rows that are bad end as NaN or zero, or have a bad quality."""
    quality: Tensor
    """(n,) on the device."""
    bad: Tensor
    """(n,) bool, on the CPU."""


class Templates(NamedTuple):
    """Which rows of a file belong to which template."""

    ids: Array
    """(B,), sorted."""
    order: Tensor
    """(T,) rows, template after template."""
    offsets: Tensor
    """(B + 1,) where these begin in ``order``."""

    @classmethod
    def of(cls, embeddings: Embeddings, shard: Shard | None = None) -> Templates:
        """Those of a file, or of one of its shards."""
        np = require("numpy", EXTRA)
        ids, template_of, sizes = np.unique(embeddings.ids, return_inverse=True, return_counts=True)
        order = np.argsort(template_of, kind="stable")
        if shard is not None:
            mine = np.array([shard.has(one) for one in ids.tolist()], dtype=bool)
            order, ids, sizes = order[np.repeat(mine, sizes)], ids[mine], sizes[mine]
        return cls(ids, torch.from_numpy(order), torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)])))

    def batches(
        self,
        embeddings: Embeddings,
        device: str,
        dtype: torch.dtype,
        batch_rows: int,
        skip_bad_rows: bool,
        show: bool = True,
    ) -> Iterator[Batch]:
        """Their rows, so many at a time, with a bar that shows how far it is, or without."""
        rows_of = (embeddings, device, accumulator(dtype), skip_bad_rows)
        bar = require("tqdm", EXTRA).tqdm
        with bar(total=len(self.order), desc="aggregating", unit="row", unit_scale=True, disable=not show) as done:
            for first, last in _batches(self.offsets, min(batch_rows, len(self.order))):
                rows = self.order[self.offsets[first] : self.offsets[last]]
                starts = self.offsets[first : last + 1] - self.offsets[first]
                yield Batch(slice(first, last), rows, starts, *_unit_rows(rows, *rows_of))
                done.update(len(rows))


def per_template(marked: Tensor, starts: Tensor) -> Tensor:
    """How many rows (n,) are marked in each template."""
    return F.pad(marked.cumsum(0), (1, 0))[starts].diff()


def _batches(offsets: Tensor, batch_rows: int) -> Iterator[tuple[int, int]]:
    """Runs [first, last) of templates with at most `batch_rows` rows, or of one template with more."""
    first, templates = 0, len(offsets) - 1
    while first < templates:
        fits = int(torch.searchsorted(offsets, offsets[first] + batch_rows, right=True)) - 1
        last = max(fits, first + 1)
        yield first, last
        first = last


def _unit_rows(
    rows: Tensor, embeddings: Embeddings, device: str, dtype: torch.dtype, skip_bad_rows: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows: unit (n, C) and quality (n,) on the device, and, on the CPU, which (n,) are bad.

    Bad rows end as NaN or keep their bad quality: what selection and head leave out by themselves.
    """
    unit = embeddings.features[rows].to(device, dtype)
    norms = row_norms(unit)
    quality = norms if embeddings.quality is None else embeddings.quality[rows].to(norms)
    has_norm = usable(norms, norms)
    bad = ~usable(norms, quality).cpu()
    if bad.any() and not skip_bad_rows:
        at = int(torch.where(bad, rows, len(embeddings.ids)).argmin())
        what, value = "its quality", quality[at]
        if not has_norm[at]:
            what, value = "the norm of its features", torch.linalg.vector_norm(unit[at])
        kind = str(dtype).removeprefix("torch.")
        raise embeddings.bad_row(
            int(rows[at]),
            f"{what} is {float(value):g} in {kind}, expected finite and above 0 (--skip-bad-rows leaves such rows out)",
        )
    return unit.div_(norms.where(has_norm, torch.nan)[:, None]), quality, bad


def check_finite(descriptors: Tensor, template_ids: Array, source: str) -> None:
    """Raise FloatingPointError naming the first template whose descriptor is not finite."""
    bad = ~descriptors.isfinite().all(-1).cpu()
    if bad.any():
        raise FloatingPointError(
            f"{source}: the descriptor of template {template_ids[int(bad.int().argmax())]} is not finite, and nothing "
            "is written: its rows leave the range of --dtype, or the checkpoint's numbers do"
        )
