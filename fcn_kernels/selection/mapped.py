"""Rows that are mapped from a file: which of them share a page, and pages asked for before they are touched."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 8 << 20  # of rows at a time, in file order
Progress = Callable[[int], None]
"""Called with a number of bytes that were read, in whole pages."""


class MappedRows:
    """Rows (T, C) on the CPU, mapped from a file or in memory, as numbers of another dtype.

    A system reads files in pages, of 4 kB mostly. Rows that lie here and there take whole pages, and what else is on
    these comes for nothing.
    """

    def __init__(self, rows: Tensor, dtype: torch.dtype, progress: Progress = lambda _: None) -> None:
        self.rows, self.dtype, self.progress = rows, dtype, progress
        self.block = max(1, BLOCK_BYTES // max(1, rows.shape[1] * dtype.itemsize))
        """Rows that are taken at a time."""
        self._begin, self._size = rows.data_ptr(), rows.shape[1] * rows.itemsize  # in bytes, of the first; of each
        self._dense = rows.is_contiguous() and rows.numel() > 0
        self._madvise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_WILLNEED") else None

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows, (n, C) at a time, in file order; the system reads ahead."""
        end = self._begin + len(self.rows) * self._size
        self._advise(self._begin, end, "MADV_SEQUENTIAL")
        for begin in range(0, len(self.rows), self.block):
            at = slice(begin, begin + self.block)
            yield at, self._numbers(at)
            self.progress(len(self.rows[at]) * self._size)

    def read_no_further(self) -> None:
        """Let the system read the pages that :meth:`take` needs, and none that come after them."""
        self._advise(self._begin, self._begin + len(self.rows) * self._size, "MADV_RANDOM")

    def take(self, numbers: Tensor) -> Tensor:
        """Rows (n, C) of numbers (n,) in file order. All their pages are asked for at once, not one after another."""
        if not self._dense or not len(numbers):
            self.progress(len(numbers) * self._size)
            return self._numbers(numbers)
        first, last = self._pages(numbers)  # [n]
        apart = (first[1:] > last[:-1] + 1).nonzero()[:, 0]
        begins, ends = torch.cat([first[:1], first[apart + 1]]), torch.cat([last[apart], last[-1:]]) + 1
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            self._advise(begin * mmap.PAGESIZE, end * mmap.PAGESIZE, "MADV_WILLNEED")
        self.progress(int((ends - begins).sum()) * mmap.PAGESIZE)
        return self._numbers(numbers)

    def row(self, number: int) -> Tensor:
        """One row (C,)."""
        return self._numbers(slice(number, number + 1))[0]

    def _numbers(self, at: slice | Tensor) -> Tensor:
        """Rows (n, C) side by side, also of a file in Fortran's order: sums of others may round otherwise."""
        return self.rows[at].to(self.dtype).contiguous()

    def on_pages_of(self, numbers: Tensor) -> Tensor:
        """All rows that lie whole on the pages that rows (n,) need: these and some more, in file order."""
        if not self._dense:
            return numbers.sort().values
        first, last = self._pages(numbers)
        low = (first * mmap.PAGESIZE - self._begin + self._size - 1).floor_divide(self._size).clamp(min=0)
        high = ((last + 1) * mmap.PAGESIZE - self._begin).floor_divide(self._size).clamp(max=len(self.rows))
        near = low[:, None] + torch.arange(int((high - low).amax()), device="cpu")  # [n, rows on as many pages]
        rows: Tensor = torch.cat([near[near < high[:, None]], numbers]).unique()
        return rows

    def _pages(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the last page (n,), (n,) of each row."""
        begin = self._begin + numbers * self._size
        return begin // mmap.PAGESIZE, (begin + self._size - 1) // mmap.PAGESIZE

    def _advise(self, begin: int, end: int, advice: str) -> None:
        """Tell the system how the bytes of these addresses will be read."""
        if self._dense and self._madvise is not None:
            begin -= begin % mmap.PAGESIZE
            self._madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(getattr(mmap, advice)))
