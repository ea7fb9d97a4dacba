"""The AdaFace head: a margin softmax whose margin follows the quality that a descriptor's norm tells."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fcn_kernels.sets import accumulator

EPS = 1e-3  # keeps angles off 0 and pi, where the gradient of acos is infinite, and a spread of norms off 0


class AdaFace(nn.Module):
    r"""Logits over identities with a quality-adaptive margin on the true one; for :func:`F.cross_entropy`.

    With theta_j the angle between a descriptor and the weight of identity j, y the true identity, |z| the norm that
    the descriptor had and mu, sigma the running mean and standard deviation of the norms::

        z_hat   = clip((|z| - mu) / (sigma / h), -1, 1)
        g_angle = -m z_hat,  g_add = m z_hat + m
        logit_y = s (cos(theta_y + g_angle) - g_add)
        logit_j = s cos(theta_j)                                        j != y

    A long descriptor (z_hat = 1) is pushed hardest where it is still far from its identity, a short one (z_hat = -1)
    where it is near already, so that images which show nothing are not learned by heart. No gradient flows through
    z_hat: the norm sets the margin, the margin does not set the norm. The angle theta_y + g_angle is kept within
    (0, pi); where that clips it, the gradient to theta_y is zero.

    Angles and statistics are float32 (or float64) also where descriptors and weights have half precision.

    Args:
        dim: C, size of a descriptor.
        classes: number of identities.
        m: margin, at least 0. h: concentration of z_hat, above 0; 0.333 puts 99.7% of normally distributed norms
            inside the clip. s: scale of the logits, above 0. The defaults of m, h and s are FaceCoresetNet's.
        t_alpha: share of a batch in the running statistics, above 0 and at most 1. The first batch starts them.

    Raises:
        ValueError: a number is out of range.

    Source: Kim, Jain and Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022, section 3.3; the
    values of s, m and h from Shapira and Keller, "FaceCoresetNet", AAAI 2024, supplement.

    Example:
        >>> head = AdaFace(dim=512, classes=1000)
        >>> raw, labels = torch.randn(4, 512), torch.tensor([1, 5, 5, 999])
        >>> norms = raw.norm(dim=1)
        >>> loss = F.cross_entropy(head(raw / norms[:, None], norms, labels), labels)
    """

    norm_statistics: Tensor
    """(2,) float32, running mean and standard deviation of the norms; NaN before the first batch of finite norms."""

    def __init__(
        self,
        dim: int,
        classes: int,
        m: float = 0.8,
        h: float = 0.333,
        s: float = 48.0,
        t_alpha: float = 0.01,
    ) -> None:
        super().__init__()
        if not (0 <= m < math.inf and 0 < h < math.inf and 0 < s < math.inf and 0 < t_alpha <= 1):
            raise ValueError(
                f"expected finite m >= 0, h > 0, s > 0 and 0 < t_alpha <= 1, got m={m}, h={h}, s={s}, t_alpha={t_alpha}"
            )
        self.m, self.h, self.s, self.t_alpha = m, h, s, t_alpha
        self.weight = nn.Parameter(torch.randn(classes, dim))
        self.register_buffer("norm_statistics", torch.full((2,), math.nan, dtype=accumulator(self.weight.dtype)))

    def forward(self, descriptor: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, classes) of unit descriptors (B, C) with the norms (B,) they had and their labels (B,) int64.

        In ``train()`` the batch's norms enter the running statistics first; an empty batch leaves these as they are.

        Raises:
            ValueError: a shape does not fit.
        """
        if descriptor.ndim != 2 or descriptor.shape[1] != self.weight.shape[1]:
            expected = f"(B, {self.weight.shape[1]})"
            raise ValueError(f"expected descriptor of shape {expected}, got {tuple(descriptor.shape)}")
        batch = (descriptor.shape[0],)
        if norm.shape != batch or labels.shape != batch:
            got = f"{tuple(norm.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"expected norm and labels of shape {batch}, got {got}")
        margin = self.m * self._standardized(norm.detach().to(self.norm_statistics.dtype))[:, None]
        cosine = F.linear(descriptor, F.normalize(self.weight))
        # half precision has no number between 1 - EPS and 1, where the angle has no gradient
        own = cosine.gather(1, labels[:, None]).to(torch.promote_types(cosine.dtype, torch.float32))
        angle = own.clamp(-1 + EPS, 1 - EPS).acos() - margin
        own = angle.clamp(EPS, math.pi - EPS).cos() - (margin + self.m)
        logits: Tensor = self.s * cosine.scatter(1, labels[:, None], own.to(cosine.dtype))
        return logits

    def _standardized(self, norm: Tensor) -> Tensor:
        if norm.shape[0] == 0:
            return norm
        # of one norm alone, the deviation is 0 and not the NaN of an unbiased estimate
        batch = torch.stack([norm.mean(), norm.std(correction=min(1, norm.shape[0] - 1))])
        running = torch.where(self.norm_statistics.isfinite(), self.norm_statistics, batch)
        if self.training:
            running = torch.where(batch.isfinite(), torch.lerp(running, batch, self.t_alpha), running)
            # a batch whose norms are not finite must not spoil all later ones, nor be the one that starts them
            self.norm_statistics.copy_(torch.where(running.isfinite(), running, self.norm_statistics))
        mean, deviation = running.unbind()
        return ((norm - mean) / (deviation + EPS) * self.h).clamp(-1, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaFace:
        """Leave the statistics in float32 when the head is cast to half precision, which would lose small changes."""
        statistics = self.norm_statistics
        super()._apply(fn, recurse)
        if self.norm_statistics.dtype in (torch.float16, torch.bfloat16):
            self.norm_statistics = statistics.to(self.norm_statistics.device)
        return self

    def extra_repr(self) -> str:
        classes, dim = self.weight.shape
        return f"dim={dim}, classes={classes}, m={self.m}, h={self.h}, s={self.s}, t_alpha={self.t_alpha}"
