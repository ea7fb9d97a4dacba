"""The selection as a module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fcn_kernels import checks, distributed
from fcn_kernels.backends import check_backend
from fcn_kernels.group import Group
from fcn_kernels.selection.select import Coreset, CoresetState, coreset_select


class CoresetSelect(nn.Module):
    """:func:`coreset_select` with a learned gamma: samples in ``train()``, argmax in ``eval()``.

    Args:
        k: picks a set.
        gamma: initial value of the learned exponent of the quality.
        tau, distance_scale, normalized, distinct, metric, backend: as in :func:`coreset_select`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or has no meaning; when the module is built.

    Example:
        >>> select = CoresetSelect(k=3)
        >>> select(torch.randn(2, 100, 512)).indices.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        k: int,
        gamma: float = 0.01,
        *,
        tau: float | Tensor = 1.0,
        distance_scale: float = 1.0,
        normalized: bool = False,
        distinct: bool = False,
        metric: str = "cosine",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_backend(backend)
        checks.check_flags(normalized=normalized, distinct=distinct)
        checks.check_metric(metric, normalized)
        checks.scale("distance_scale", distance_scale, torch.float32)
        checks.temperature(tau, torch.empty(0, device=tau.device if isinstance(tau, Tensor) else None))
        checks.exponent(gamma, torch.empty(0))
        self.k = checks.at_least_one("k", k)
        self.gamma = nn.Parameter(torch.tensor(float(gamma)))
        self.tau = tau
        self.distance_scale = distance_scale
        self.normalized = normalized
        self.distinct = distinct
        self.metric = metric
        self.backend = backend

    def forward(
        self,
        features: Tensor,
        quality: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        generator: Generator | None = None,
        start: int | Tensor | None = None,
        anchors: Tensor | None = None,
        min_distances: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        strict: bool = False,
        return_min_distances: bool = False,
        return_nearest: bool = False,
        group: Group = None,
    ) -> Coreset | CoresetState:
        """Select from ``features``; shapes, errors and result as in :func:`coreset_select`.

        With a ``group`` (``torch.distributed.group.WORLD`` is the default one) these are one rank's rows of the sets,
        as in :func:`fcn_kernels.distributed.coreset_select`. gamma's gradient is the whole one on every rank.
        """
        options: dict[str, Any] = {} if group is None else {"group": group}
        select: Callable[..., Coreset | CoresetState] = coreset_select if group is None else distributed.coreset_select
        return select(
            features,
            self.k,
            quality,
            self.gamma,
            tau=self.tau,
            sample=self.training,
            noise=noise,
            generator=generator,
            distance_scale=self.distance_scale,
            normalized=self.normalized,
            distinct=self.distinct,
            metric=self.metric,
            start=start,
            anchors=anchors,
            min_distances=min_distances,
            mask=mask,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            strict=strict,
            return_min_distances=return_min_distances,
            return_nearest=return_nearest,
            backend=self.backend,
            **options,
        )

    def extra_repr(self) -> str:
        options = f"tau={self.tau}, distance_scale={self.distance_scale}, normalized={self.normalized}"
        return f"k={self.k}, {options}, distinct={self.distinct}, metric={self.metric}, backend={self.backend}"
