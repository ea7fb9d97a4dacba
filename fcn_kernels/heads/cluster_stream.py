"""Frames of one track as they come: Cluster and Aggregate with the rows that do not fill a chunk yet held back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fcn_kernels import checks
from fcn_kernels.clustering.torch_backend import usable_rows
from fcn_kernels.heads.cluster_aggregate import ClusterAggregate, Fused
from fcn_kernels.heads.cluster_state import ClusterState
from fcn_kernels.sets import accumulator


class ClusterStream:
    """One set whose rows come in portions of any size, cut in chunks of ``chunk`` rows as they come.

    What it gives depends on the rows and their order, not on the portions: the same bits row by row or all at once.
    Rows that are not finite are left out where they stand. Rows are copied while they wait; nothing has a gradient.

    Args:
        head: in ``eval()``. chunk: rows that see one another.

    Raises:
        TypeError, ValueError: chunk is no integer of at least 1; or, when rows are pushed, they do not fit the head or
            the head is in ``train()``.

    Example:
        >>> stream = ClusterStream(ClusterAggregate(dim=512).eval(), chunk=32)
        >>> for frame, style in zip(20 * torch.randn(40, 512), torch.randn(40, 64)):
        ...     stream.push(frame[None], style[None])
        >>> stream.fused().counts.item(), stream.pending
        (40, 8)
    """

    def __init__(self, head: ClusterAggregate, chunk: int = 32) -> None:
        self.head, self.chunk = head, checks.at_least_one("chunk", chunk)
        self._closed: ClusterState | None = None  # of whole chunks
        self._tail: list[Any] = [None, None, None]  # features, styles and quality of the rows that wait

    @property
    def pending(self) -> int:
        """Rows that do not fill a chunk yet."""
        return 0 if self._tail[0] is None else len(self._tail[0])

    @torch.no_grad()
    def push(self, features: Tensor, styles: Tensor | None = None, quality: Tensor | None = None) -> None:
        """Take n more rows: features (n, C), styles (n, style_dim) or (n, S, 2), quality (n,).

        Raises:
            TypeError, ValueError: as :meth:`ClusterAggregate.update`; or the kind of styles or quality changes.
        """
        if self.head.training:
            raise ValueError("expected a head in eval(): in train() each portion would have its own batch statistics")
        if not isinstance(features, Tensor) or features.ndim != 2:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"expected features of shape (n, C), got {got}")
        self.head.check_rows(features, styles, quality, (features.shape[0],))
        if quality is not None:
            quality = quality.flatten()
        given: list[Any] = [features, styles, quality]
        if self._tail[0] is not None:
            _check_alike(self._tail, given)
        dtype = accumulator(self.head.centers.dtype)  # in which all are taken: float64 may leave its range
        flat, norms = (None if t is None else t.to(dtype) for t in (styles, quality))
        taking, _ = usable_rows(features, norms, None if flat is None else flat.flatten(1), dtype)
        given = _picked(given, taking)
        if self.pending:
            given = [None if t is None else torch.cat([t, new]) for t, new in zip(self._tail, given, strict=True)]
        whole = len(given[0]) // self.chunk * self.chunk
        if whole:
            x, s, q = _picked(given, slice(whole))
            self._closed = self.head.update(x, s, q, self._closed, chunk=self.chunk)
        self._tail = [None if t is None else t.clone() for t in _picked(given, slice(whole, None))]

    @torch.no_grad()
    def state(self) -> ClusterState:
        """Of all rows so far, those that wait as one short chunk. The stream goes on as if it had not been asked.

        Raises:
            ValueError: nothing was pushed yet.
        """
        features, styles, quality = self._tail
        if features is None:
            raise ValueError("expected rows to have been pushed, got none yet")
        if self._closed is not None and not len(features):
            return self._closed
        return self.head.update(features, styles, quality, self._closed)

    @torch.no_grad()
    def fused(self) -> Fused:
        """The descriptor (C,) of all rows so far, and the rest of :class:`Fused` without B; weights is None."""
        fused = self.head.finish(self.state())
        return Fused(*(None if value is None else value[0] for value in fused))  # type: ignore[arg-type]


def _picked(tensors: list[Any], rows: Tensor | slice) -> list[Any]:
    return [None if t is None else t[rows] for t in tensors]


def _check_alike(waiting: list[Any], given: list[Any]) -> None:
    """Raise ValueError unless a portion has the shapes and dtypes of those before it."""
    for name, old, new in zip(("features", "styles", "quality"), waiting, given, strict=True):
        before, now = (None if t is None else (tuple(t.shape[1:]), t.dtype) for t in (old, new))
        if before != now:
            raise ValueError(
                f"expected {name} of shape (n, ...) and dtype {before}, as in the portions before, got {now}"
            )
