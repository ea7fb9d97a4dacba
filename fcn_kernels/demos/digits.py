"""Real handwritten digits, what can go wrong with a photograph of one, and a small network that embeds them.

The digits are the 1,797 of 8 x 8 pixels that scikit-learn carries (Alpaydin & Kaynak, "Optical Recognition of
Handwritten Digits", UCI Machine Learning Repository, 1998).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fcn_kernels.extras import require

SIDE = 8
CLASSES = 10
CONDITIONS = CLEAR, BLURRED, NOISY = 0, 1, 2


class Digits(NamedTuple):
    """Images (N, 8, 8) float32, ink from 0 to 1, and the digits they show (N,) int64."""

    images: Tensor
    labels: Tensor


def load_digits(train: int) -> tuple[Digits, Digits]:
    """All digits, in an order drawn from torch's generator: `train` of them to learn from, and the rest."""
    bunch = require("sklearn.datasets", "demo").load_digits()
    order = torch.randperm(len(bunch.target))
    images = torch.as_tensor(bunch.images, dtype=torch.float32)[order] / 16
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)[order]
    return Digits(images[:train], labels[:train]), Digits(images[train:], labels[train:])


def photographed(images: Tensor, conditions: Tensor, severity: Tensor) -> Tensor:
    """Images (B, 8, 8) as a camera would give them: each turned and shifted a little, in its condition (B,).

    Two photographs of one digit are near-duplicates, as two frames of a clip are. `severity` (B,), 0 to 1,
    says how blurred or noisy an image comes out; a clear one ignores it.
    """
    moved = _moved(images, degrees=4.0, pixels=0.25)
    blurred = _blurred(moved, sigma=1.8 * severity * (conditions == BLURRED))
    return _noisy(blurred, std=0.7 * severity * (conditions == NOISY))


def _moved(images: Tensor, degrees: float, pixels: float) -> Tensor:
    angle = torch.empty(len(images)).uniform_(-degrees, degrees).deg2rad()
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    shift = torch.empty(len(images), 2, 1).uniform_(-pixels, pixels) * 2 / SIDE
    grid = F.affine_grid(torch.cat([turn, shift], dim=2), [len(images), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def _blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of sigma (B,) pixels: G X G^T, where the rows of G sum to 1."""
    pixel = torch.arange(SIDE)
    squares = (pixel[:, None] - pixel) ** 2
    # below 0.05 pixels a neighbour weighs exp(-200), nothing in float32, and 0 would divide by 0
    weights = torch.softmax(-squares / (2 * sigma.clamp(min=0.05)[:, None, None] ** 2), dim=-1)
    return weights @ images @ weights.mT


def _noisy(images: Tensor, std: Tensor) -> Tensor:
    return (images + std[:, None, None] * torch.randn_like(images)).clamp(0, 1)


class DigitNet(nn.Module):
    """Images (..., 8, 8) to raw embeddings (..., dim): the direction is the content, the norm the quality."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * (SIDE // 2) ** 2, dim, bias=False),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Embed images of any leading shape."""
        embeddings: Tensor = self.layers(images.reshape(-1, 1, SIDE, SIDE))
        return embeddings.view(*images.shape[:-2], self.dim)
