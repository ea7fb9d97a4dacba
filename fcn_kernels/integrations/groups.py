"""For engines that bring the rows of a template together (Ray Data, Spark, Dask, pandas): from groups to descriptors.

None of them is imported here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fcn_kernels.extras import require
from fcn_kernels.files.aggregate import GAMMA, PICKS, aggregate, mean_of_coreset
from fcn_kernels.files.checkpoint import load_checkpoint
from fcn_kernels.files.embeddings import Embeddings, Keys, column, from_columns
from fcn_kernels.files.formats import EXTRA, InputError, Scratch
from fcn_kernels.heads.facecoresetnet import Aggregate
from fcn_kernels.integrations import caface
from fcn_kernels.integrations.facecoresetnet import build_head

if TYPE_CHECKING:
    from fcn_kernels.files.formats import Array

BUCKET = "fcn_kernels_bucket"
"""Name of a column that is there for the time of a grouping."""
GROUP = "the group"  # in messages, where files have their names
MOST_BYTES = 1 << 40  # of columns whose bytes are not laid out as the machine's


class AggregateGroups:
    """Rows of whole templates in, one row a template out: what ``python -m fcn_kernels aggregate`` makes of a file.

    A call takes the columns of a group, as a dict of arrays, and :meth:`pandas` takes a frame. A group is one template
    or several whole ones: several at a time are faster, and give the same numbers. It can be pickled.

    Args:
        features: name of the column of rows f_n: (T, C), or T lists or arrays of C numbers.
        ids: name of the column that tells the template of a row, of integers or strings.
        quality: name of the column of qualities; None: "quality" if there is one, else the norms |f_n|.
        rows: name of a column of integers that number the rows. Engines bring rows together in no order of their own;
            by these numbers they are sorted, so that results are the same on any number of workers, to the bit, and
            these numbers are the picks. None: rows are taken as they come, and no picks are given.
        k, gamma: picks a template, and the exponent of the quality (None: the checkpoint's, or 1).
        checkpoint: state dict of a :class:`fcn_kernels.CoresetAggregator` or of FaceCoresetNet's authors, or its file;
            None: the descriptor is the mean of the picked rows, made unit.
        num_heads: of the checkpoint's attentions.
        skip_bad_rows: leave out rows that are NaN, infinite or zero, and count them; else they raise.
        device: where selection and head run.

    Raises:
        InputError (a ValueError): the checkpoint is of something else or cannot be read. In a call: a column is missing
            or of a wrong shape or type, or a row is bad.

    Example:
        >>> groups = AggregateGroups(k=2, rows="row")
        >>> rows = [[3.0, 0.0], [0.0, 2.0], [2.9, 0.1], [1.0, 1.0]]
        >>> made = groups({"template_ids": [7, 7, 7, 4], "features": rows, "row": [10, 11, 12, 13]})
        >>> made["template_ids"].tolist(), made["counts"].tolist(), made["picks"].tolist()
        ([4, 7], [1, 2], [[13, -1], [10, 11]])
    """

    def __init__(
        self,
        *,
        features: str = Keys().features,
        ids: str = Keys().ids,
        quality: str | None = None,
        rows: str | None = None,
        k: int = PICKS,
        gamma: float | None = None,
        checkpoint: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        num_heads: int = 8,
        skip_bad_rows: bool = False,
        device: str = "cpu",
    ) -> None:
        if k < 1:
            raise InputError(f"expected k of at least 1, got {k}")
        self.keys, self.rows, self.k, self.device = Keys(features, ids, quality), rows, k, device
        self.skip_bad_rows, self.head = skip_bad_rows, None
        self._mean = partial(mean_of_coreset, k=k, gamma=GAMMA if gamma is None else gamma)
        if checkpoint is None:
            return
        state = checkpoint if isinstance(checkpoint, Mapping) else load_checkpoint(checkpoint)
        if caface.recognizes(state):
            raise InputError("expected a checkpoint of a CoresetAggregator: a ClusterAggregate's is for `aggregate`")
        try:
            self.head = build_head(state, k=k, num_heads=num_heads, gamma=gamma)
        except TypeError as error:
            raise InputError(str(error)) from error

    def __call__(self, columns: Mapping[str, Any]) -> dict[str, Array]:
        """Columns of T rows to columns of their B templates.

        Returns:
            template_ids (B,), sorted, under the name that ``ids`` has; descriptors (B, C), norms, counts, left_out; and
            picks (B, k), -1 where there is none, if ``rows`` are named.
        """
        found = {name: partial(_plain, values) for name, values in columns.items()}
        embeddings, numbers = from_columns(found, self.keys, GROUP, Scratch(Path(gettempdir()), MOST_BYTES)), None
        if self.rows is not None:
            numbers = column(found, self.rows, GROUP)
            if numbers.dtype.kind not in "iu":
                raise InputError(f"{GROUP}: expected integers in {self.rows!r}, got {numbers.dtype}")
            order = numbers.argsort(kind="stable")
            embeddings, numbers = _ordered(embeddings, order), torch.from_numpy(numbers[order].astype("int64"))
        if self.head is not None and embeddings.features.shape[1] != self.head.dim:
            raise InputError(f"{GROUP}: expected C = {self.head.dim}, got {embeddings.features.shape[1]}")
        made = aggregate(
            embeddings, self._pool, k=self.k, device=self.device, skip_bad_rows=self.skip_bad_rows, show=False
        )
        made = {self.keys.ids if name == "template_ids" else name: values for name, values in made.items()}
        picks = torch.from_numpy(made.pop("picks"))
        if numbers is not None:
            made["picks"] = torch.where(picks < 0, -1, numbers[picks]).numpy()
        return made

    def pandas(self, frame: Any) -> Any:
        """A pandas frame of rows to one of templates; descriptors and picks are lists, which Spark takes as arrays."""
        made = self({name: frame[name].to_numpy() for name in frame.columns})
        return require("pandas", EXTRA).DataFrame(
            {name: list(values) if values.ndim > 1 else values for name, values in made.items()}
        )

    def _pool(self, unit: Tensor, quality: Tensor, cu_seqlens: Tensor) -> Aggregate:
        if self.head is None:
            return self._mean(unit, quality, cu_seqlens)
        made: Aggregate = self.head.to(self.device)(unit, quality, cu_seqlens=cu_seqlens)
        return made


def check_buckets(buckets: int | None) -> None:
    """Raise ValueError unless a number of groups is None or at least 1."""
    if buckets is not None and buckets < 1:
        raise ValueError(f"expected at least 1 bucket, got {buckets}")


def _plain(values: Any) -> Array:
    """An array of numbers or strings that may be written to; engines have columns of objects, and read-only ones."""
    np = require("numpy", EXTRA)
    objects = isinstance(values, np.ndarray) and values.dtype.hasobject
    array: Array = np.array(values.tolist() if objects else values)
    return array


def _ordered(embeddings: Embeddings, order: Array) -> Embeddings:
    quality = None if embeddings.quality is None else embeddings.quality[order]
    return embeddings._replace(features=embeddings.features[order], ids=embeddings.ids[order], quality=quality)
