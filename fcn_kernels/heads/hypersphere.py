"""Embeddings of people who do not exist, drawn after those of people who do."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from fcn_kernels import checks
from fcn_kernels.backends import without_autocast
from fcn_kernels.neighbors.scores import unit_rows


class HypersphereSampler(nn.Module):
    r"""Draws unit rows, each of another virtual identity: a bank for alignment where real strangers' faces are wanting.

    Unit rows of known identities are taken for class means, normal around m, and rows, normal around these::

        u = (m + b + w) / |m + b + w|,   b ~ N(0, B),   w ~ N(0, W)

    B is the covariance of the class means, W that of rows about theirs, both shrunk towards a multiple of the identity
    (oracle approximating shrinkage), so that few identities are enough to draw from. Make one by :meth:`fit`.

    Args:
        mean: (C,), m. between, within: (C, C) square roots R of B and W, R R^T.

    Source: ours, for the virtual candidates that Liu et al., arXiv 2103.01559, have a GAN make. The shrinkage: Chen,
    Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance estimation", IEEE TSP 2010.

    Example:
        >>> faces, people = torch.randn(300, 16), torch.arange(300) // 3
        >>> sampler = HypersphereSampler.fit(faces, people)
        >>> sampler(4000).shape
        torch.Size([4000, 16])
    """

    mean: Tensor
    between: Tensor
    within: Tensor

    def __init__(self, mean: Tensor, between: Tensor, within: Tensor) -> None:
        super().__init__()
        dim = mean.shape[-1]
        if mean.ndim != 1 or between.shape != (dim, dim) or within.shape != (dim, dim):
            got = ", ".join(str(tuple(t.shape)) for t in (mean, between, within))
            raise ValueError(f"expected mean (C,), between (C, C) and within (C, C), got {got}")
        self.register_buffer("mean", mean)
        self.register_buffer("between", between)
        self.register_buffer("within", within)

    @classmethod
    @torch.no_grad()
    def fit(cls, x: Tensor, ids: Tensor) -> HypersphereSampler:
        """From rows (N, C), floating point, and their identities (N,), integers; at least two of these.

        Rows that are not usable (:func:`fcn_kernels.context_statistics`) are left out.

        Raises:
            TypeError, ValueError: an argument is of the wrong type or shape, or there are fewer than two identities.
        """
        if not isinstance(x, Tensor) or x.ndim != 2:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"expected x to be a Tensor of shape (N, C), got {got}")
        checks.check_tensor("x", x, x, tuple(x.shape), checks.DTYPES)
        checks.check_tensor("ids", ids, x, (x.shape[0],), checks.INTEGERS)
        unit = unit_rows(x.double())
        there = unit.any(1)
        unit = unit[there]
        _, label, sizes = ids[there].unique(return_inverse=True, return_counts=True)
        if len(sizes) < 2:
            raise ValueError(f"expected usable rows of at least two identities, got {len(sizes)}")
        means = unit.new_zeros(len(sizes), unit.shape[1]).index_add_(0, label, unit) / sizes[:, None]
        about = unit - means[label]
        between = _shrunk(means - means.mean(0), len(means) - 1)
        within = _shrunk(about, len(about) - len(means))
        return cls(*(t.float() for t in (means.mean(0), _root(between), _root(within))))

    def forward(self, n: int, generator: Generator | None = None) -> Tensor:
        """(n, C) unit rows, from the generator, or torch's own."""
        n = checks.at_least_one("n", n)
        shape, like = (n, len(self.mean)), {"device": self.mean.device, "dtype": self.mean.dtype}
        person, picture = (torch.randn(shape, generator=generator, **like) for _ in range(2))  # type: ignore[call-overload]
        with without_autocast(self.mean.device.type):
            return unit_rows(self.mean + person @ self.between.T + picture @ self.within.T)


def _shrunk(rows: Tensor, freedom: int) -> Tensor:
    """The covariance of rows about 0, shrunk towards its mean variance; 0 where there is no freedom."""
    dim = rows.shape[1]
    if freedom < 1:
        return rows.new_zeros(dim, dim)
    covariance = rows.T @ rows / freedom
    trace, square = covariance.trace(), covariance.square().sum()
    apart = (freedom + 1 - 2 / dim) * (square - trace**2 / dim)
    share = 1.0 if apart <= 0 else min(1.0, float(((1 - 2 / dim) * square + trace**2) / apart))
    return (1 - share) * covariance + share * trace / dim * torch.eye(dim, dtype=rows.dtype, device=rows.device)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root
