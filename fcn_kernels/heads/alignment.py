"""Score alignment as modules: a bank of other people, or a small network in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from fcn_kernels import checks
from fcn_kernels.backends import check_backend, without_autocast
from fcn_kernels.neighbors.context import Context, context_statistics
from fcn_kernels.neighbors.scores import align_scores, check_method, unit_rows

LEAST_STD = 1e-6  # of a context that a network learns: its logarithm is what is learned


class ContextNet(nn.Module):
    r"""A small network that estimates a row's context from the row alone, so that no bank is kept or searched.

    With u = x / |x|::

        (mu, log sigma) = t + d (A_2 dropout(silu(A_1 u + a_1)) + a_2)

    t and d are the mean and deviation of the targets that :meth:`fit` was given; before that, 0 and 1. It takes
    2 (C + 2) hidden operations a row, where a bank takes 2 M C.

    Args:
        dim: C. hidden: width of the layer between. dropout: its share, 0 to 1.

    Example:
        >>> faces, people = torch.randn(64, 32), torch.randn(1000, 32)
        >>> net = ContextNet(32)
        >>> loss = net.fit(faces, context_statistics(faces, people), steps=50)
        >>> net(faces).mean.shape
        torch.Size([64])
    """

    center: Tensor
    """(2,), t."""
    spread: Tensor
    """(2,), d."""
    neighbors: Tensor
    """0-d int64, the most neighbors of the contexts that it was fitted to; the counts that it gives."""

    def __init__(self, dim: int, hidden: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        dim, hidden = checks.at_least_one("dim", dim), checks.at_least_one("hidden", hidden)
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Dropout(dropout), nn.Linear(hidden, 2))
        self.register_buffer("center", torch.zeros(2))
        self.register_buffer("spread", torch.ones(2))
        self.register_buffer("neighbors", torch.tensor(2))

    @property
    def dim(self) -> int:
        """C."""
        return int(self.layers[0].in_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Context:
        """The estimated context of rows (N, C) or (C,), with gradients; of no neighbors where a row is not usable.

        Raises:
            ValueError: rows have another number of columns.
        """
        if x.ndim not in (1, 2) or x.shape[-1] != self.dim:
            raise ValueError(f"expected rows of shape (N, {self.dim}) or ({self.dim},), got {tuple(x.shape)}")
        unit = unit_rows(x)
        there = (unit != 0).any(-1)
        mean, log_std = (self.center + self.spread * self.layers(unit.to(self.center))).unbind(-1)
        return Context(mean.where(there, 0), log_std.exp().where(there, 0), there * self.neighbors, None)

    @torch.inference_mode(False)  # in which nothing is learned
    def fit(
        self,
        x: Tensor,
        context: Context,
        *,
        steps: int = 1000,
        batch: int = 256,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        generator: Generator | None = None,
    ) -> float:
        """Learn the context of rows, which should be of people other than those to be compared; leaves ``eval()``.

        Smooth L1 between standardized targets and what the layers give, by AdamW.

        Args:
            x: (N, C) rows. context: theirs, own identity left out. Rows of fewer than 2 neighbors are not learned.
            steps, batch, lr, weight_decay: of the training.
            generator: on the CPU, chooses the batches. None: torch's own.

        Returns:
            The loss over all rows at the end.

        Raises:
            ValueError: fewer than 2 rows can be learned, or the shapes do not fit.
        """
        if x.ndim != 2 or x.shape[1] != self.dim or context.mean.shape != x.shape[:1]:
            got = f"{tuple(x.shape)} and {tuple(context.mean.shape)}"
            raise ValueError(f"expected x of shape (N, {self.dim}) with a context of N rows, got {got}")
        steps, batch = checks.at_least_one("steps", steps), checks.at_least_one("batch", batch)
        learned = context.counts >= 2
        if int(learned.sum()) < 2:
            raise ValueError(f"expected at least 2 rows with 2 neighbors or more, got {int(learned.sum())}")
        unit = unit_rows(x.detach())[learned].to(self.center)
        both = torch.stack([context.mean, context.std.clamp(min=LEAST_STD).log()], -1)
        target = both.detach()[learned].to(self.center)
        self.center.copy_(target.mean(0))
        self.spread.copy_(target.std(0).clamp(min=LEAST_STD))
        self.neighbors.copy_(context.counts.max())
        target = (target - self.center) / self.spread
        optimizer = torch.optim.AdamW(self.layers.parameters(), lr=lr, weight_decay=weight_decay)
        self.train()
        with torch.enable_grad(), torch.device("cpu"):  # where the optimizer counts, whatever the default device
            for _ in range(steps):
                rows = torch.randint(len(unit), (min(batch, len(unit)),), generator=generator).to(unit.device)
                loss = F.smooth_l1_loss(self.layers(unit[rows]), target[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        self.eval()
        with torch.no_grad():
            return float(F.smooth_l1_loss(self.layers(unit), target))


class DiscrepancyAlignment(nn.Module):
    r"""Cosines of rows, corrected by how each row stands to a bank of other people.

    ``align(a, b)`` is :func:`align_scores` of cos(a_i, b_i) and the contexts of both sides, which are
    :func:`context_statistics` against the bank, or what ``estimator`` gives.

    Args:
        bank: (M, C) rows of other people, a buffer in the state dict; None with an estimator.
        bank_ids: (M,) int32 or int64, a buffer too: lets calls that name their rows' ``ids`` leave out their own.
        k, min_cosine, backend: as in :func:`context_statistics`.
        method, strength, sides, eps: as in :func:`align_scores`; "mean-std" wants k of 2 or more.
        estimator: gives a :class:`Context` for rows, as :class:`ContextNet` does; it takes the place of a bank.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or has no meaning; when the module is built.

    Whether it helps depends on rows and bank, and it can do harm: measure it on your own pairs, and choose thresholds
    anew. A bank of fewer than 100 identities, or k below 50, mostly does harm.

    Source: our reading of Liu et al., "Inter-class Discrepancy Alignment for Face Recognition", arXiv 2103.01559, 2021,
    whose equations could not be had.

    Example:
        >>> align = DiscrepancyAlignment(torch.randn(2000, 64), k=50)
        >>> probes, gallery = torch.randn(5, 64), torch.randn(7, 64)
        >>> align(probes, gallery[:5]).shape, align.matrix(probes, gallery).shape
        (torch.Size([5]), torch.Size([5, 7]))
    """

    bank: Tensor | None
    bank_ids: Tensor | None

    def __init__(
        self,
        bank: Tensor | None = None,
        bank_ids: Tensor | None = None,
        k: int | None = 50,
        method: str = "mean",
        *,
        min_cosine: float | None = None,
        strength: float = 1.0,
        sides: str = "both",
        eps: float = 1e-6,
        estimator: nn.Module | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_backend(backend)
        check_method(method, strength, sides, eps)
        if (bank is None) == (estimator is None):
            raise ValueError(f"expected a bank or an estimator, got {'neither' if bank is None else 'both'}")
        if bank is None and bank_ids is not None:
            raise ValueError("expected bank_ids with a bank alone, got them with an estimator")
        if k is not None and checks.at_least_one("k", k) < 2 and method == "mean-std":
            raise ValueError(f'expected k of at least 2 for method "mean-std", got {k}')
        if bank is not None:
            bank = bank.detach()
            # what is wrong with bank, ids, k or min_cosine is said now, and not at the first call
            none = bank[:0] if bank.ndim == 2 else bank
            ids = None if bank_ids is None else bank_ids[:0]
            context_statistics(none, bank, k, min_cosine=min_cosine, ids=ids, bank_ids=bank_ids, backend=backend)
        self.register_buffer("bank", bank)
        self.register_buffer("bank_ids", bank_ids)
        self.estimator = estimator
        self.k, self.min_cosine, self.backend = k, min_cosine, backend
        self.method: dict[str, Any] = {"method": method, "strength": strength, "sides": sides, "eps": eps}

    @classmethod
    def from_prototypes(cls, weight: Tensor, **options: Any) -> DiscrepancyAlignment:
        """With class centers (classes, C) as the bank, such as :class:`fcn_kernels.heads.adaface.AdaFace`'s weight.

        A center's id is its class, so ``ids`` of calls are labels. ``options`` are the constructor's.
        """
        return cls(weight.detach().clone(), torch.arange(len(weight), device=weight.device), **options)

    @classmethod
    def from_generator(cls, sample: Callable[[int], Tensor], n: int = 4000, **options: Any) -> DiscrepancyAlignment:
        """With ``sample(n)`` (n, C) as the bank, rows of people who do not exist: a :class:`HypersphereSampler`, or a
        GAN with a backbone behind it. ``options`` are the constructor's.

        Raises:
            ValueError: it gives another number of rows.
        """
        with torch.no_grad():
            bank = sample(checks.at_least_one("n", n))
        if not isinstance(bank, Tensor) or bank.ndim != 2 or len(bank) != n:
            got = tuple(bank.shape) if isinstance(bank, Tensor) else type(bank).__name__
            raise ValueError(f"expected sample({n}) to be a Tensor of shape ({n}, C), got {got}")
        return cls(bank, **options)

    def context(self, x: Tensor, ids: Tensor | None = None) -> Context:
        """Contexts of rows (N, C) or (C,); with ``ids`` (N,), bank rows of the same id are left out.

        Raises:
            TypeError, ValueError: as :func:`context_statistics`; ids with an estimator, or with a bank without ids.
        """
        if self.estimator is not None:
            if ids is not None:
                raise ValueError("expected no ids with an estimator, which knows no identities")
            return self.estimator(x)  # type: ignore[no-any-return]
        assert self.bank is not None
        return context_statistics(
            x,
            self.bank,
            self.k,
            min_cosine=self.min_cosine,
            ids=ids,
            bank_ids=None if ids is None else self.bank_ids,
            backend=self.backend,
        )

    def forward(self, a: Tensor, b: Tensor, a_ids: Tensor | None = None, b_ids: Tensor | None = None) -> Tensor:
        """Aligned scores (P,) of pairs of rows (P, C) and (P, C), with gradients.

        Raises:
            ValueError: the shapes differ.
        """
        if a.shape != b.shape:
            raise ValueError(f"expected as many rows on both sides, got {tuple(a.shape)} and {tuple(b.shape)}")
        cosines = (unit_rows(a) * unit_rows(b)).sum(-1)
        return align_scores(cosines, self.context(a, a_ids), self.context(b, b_ids), **self.method)

    def matrix(self, q: Tensor, g: Tensor, q_ids: Tensor | None = None, g_ids: Tensor | None = None) -> Tensor:
        """Aligned scores (Q, G) of rows (Q, C) against rows (G, C), with gradients.

        Raises:
            ValueError: the rows have other shapes.
        """
        if q.ndim != 2 or g.ndim != 2 or q.shape[1] != g.shape[1]:
            raise ValueError(f"expected rows (Q, C) and (G, C), got {tuple(q.shape)} and {tuple(g.shape)}")
        one, other = unit_rows(q), unit_rows(g)
        dtype = torch.promote_types(one.dtype, other.dtype)
        with without_autocast(q.device.type):
            cosines = one.to(dtype) @ other.to(dtype).T
        return align_scores(cosines, self.context(q, q_ids), self.context(g, g_ids), **self.method)

    @torch.inference_mode(False)
    def distil(self, x: Tensor, ids: Tensor | None = None, *, hidden: int = 128, **fit: Any) -> DiscrepancyAlignment:
        """The same with a :class:`ContextNet` in the bank's place, fitted to the contexts of rows (N, C).

        Args:
            x: rows of people other than those to be compared. ids: (N,) theirs, to leave out their own in the bank.
            hidden: width of the network. fit: options of :meth:`ContextNet.fit`.

        Raises:
            TypeError, ValueError: as :meth:`context` and :meth:`ContextNet.fit`.
        """
        if x.ndim != 2:
            raise ValueError(f"expected rows (N, C), got {tuple(x.shape)}")
        with torch.no_grad():
            context = self.context(x, ids)
        with torch.device("cpu"):  # whatever the default device
            net = ContextNet(x.shape[1], hidden).to(x.device)
        net.fit(x, context, **fit)
        return DiscrepancyAlignment(k=self.k, min_cosine=self.min_cosine, estimator=net, **self.method)

    def extra_repr(self) -> str:
        rows = "" if self.bank is None else f"bank={tuple(self.bank.shape)}, k={self.k}, min_cosine={self.min_cosine}, "
        return rows + ", ".join(f"{name}={value!r}" for name, value in self.method.items())
