"""The rows of some sets, and the passes over them that the torch backend makes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fcn_kernels.sets import GROUP_BYTES, accumulator


class Rows:
    """A group's rows in the accumulation dtype; a large set in half precision is converted block by block."""

    def __init__(self, raw: Tensor) -> None:
        self.dtype = accumulator(raw.dtype)
        self.block = max(1, GROUP_BYTES // (raw.shape[-1] * self.dtype.itemsize))
        self.rows = raw.to(self.dtype) if raw.shape[0] > 1 or raw.shape[1] <= self.block else raw
        adjacent = self.rows.stride(0) == self.rows.shape[1] * self.rows.stride(1)
        self.flat = self.rows.flatten(0, 1) if adjacent else None

    def take(self, places: Tensor) -> Tensor:
        """Rows by their numbers among the G n, (..., C). index_select costs a third of an advanced index."""
        if self.flat is None:
            n = self.rows.shape[1]
            return self.rows[places // n, places % n]
        return self.flat.index_select(0, places.flatten()).view(*places.shape, self.flat.shape[1])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows that fit the cache, converted."""
        for first in range(0, self.rows.shape[1], self.block):
            where = slice(first, first + self.block)
            yield where, self.rows[:, where].to(self.dtype)

    def norms(self) -> Tensor:
        """|x_n|, (G, n)."""
        blocks = [self.rows] if self.rows.dtype == self.dtype else (x for _, x in self.blocks())
        norms: list[Tensor] = [torch.linalg.vector_norm(x, dim=-1) for x in blocks]
        return norms[0] if len(norms) == 1 else torch.cat(norms, 1)

    def products(self, vectors: Tensor) -> Tensor:
        """x_n . v for each set's own v (G, C), (G, n)."""
        if self.rows.dtype == self.dtype:
            return _products(self.rows, vectors)
        return torch.cat([_products(x, vectors) for _, x in self.blocks()], 1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """sum_n weights(n) x_n for weights (G, n), (G, C)."""
        if self.rows.dtype == self.dtype:
            return _weighted_sum(self.rows, weights)
        return torch.stack([_weighted_sum(x, weights[:, where]) for where, x in self.blocks()]).sum(0)


def _products(x: Tensor, vectors: Tensor) -> Tensor:
    """(G, n, C), (G, C) -> (G, n). One set is split between the threads, as PyTorch's products run a set on one."""
    sets, n = x.shape[:2]
    threads = torch.get_num_threads()
    if sets > 1 or n < 2 * threads:
        return torch.bmm(vectors[:, None], x.transpose(1, 2))[:, 0]
    even = n - n % threads
    shared = torch.bmm(vectors[:, None].expand(threads, -1, -1), x[0, :even].view(threads, -1, x.shape[2]).mT)
    shared = shared.view(1, even)
    return shared if even == n else torch.cat((shared, vectors @ x[0, even:].T), 1)


def _weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """(G, n, C), (G, n) -> (G, C), split between the threads likewise."""
    sets, n = x.shape[:2]
    threads = torch.get_num_threads()
    if sets > 1 or n < 2 * threads:
        return torch.bmm(weights[:, None], x)[:, 0]
    even = n - n % threads
    shared = torch.bmm(weights[0, :even].view(threads, 1, -1), x[0, :even].view(threads, -1, x.shape[2])).sum(0)
    return shared if even == n else shared.addmm_(weights[:, even:], x[0, even:])
