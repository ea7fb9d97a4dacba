"""Scores of templates: cosines of pairs, and the descriptors that IJB's own protocol makes of images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fcn_kernels.extras import require

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

PAIRS = 4096  # at a time: 16 MB of 512 columns; 16,384 took five times as long
IMAGES = 8192


def cosines(unit: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """u_first . u_second (P,) of unit rows (B, C); a pair's score depends on its two rows alone."""
    scores = torch.empty(len(first), dtype=unit.dtype)
    for at in range(0, len(first), PAIRS):
        part = slice(at, at + PAIRS)
        scores[part] = unit.index_select(0, first[part]).mul_(unit.index_select(0, second[part])).sum(1)
    return scores


def mean_of_media(features: Tensor, templates: Array, media: Array) -> tuple[Array, Tensor]:
    """The usual baseline of IJB: a template's sum, over its media, of the mean of a medium's images as they are.

    Args:
        features: (T, C) of the images. templates, media: (T,) their templates and media.

    Returns:
        The templates (B,), sorted, and their sums (B, C), float32.
    """
    np = require("numpy", "tool")
    names, template = np.unique(templates, return_inverse=True)
    _, medium = np.unique(media, return_inverse=True)
    order = np.lexsort((medium, template))
    new = np.append(True, (np.diff(template[order]) != 0) | (np.diff(medium[order]) != 0))
    group = np.cumsum(new) - 1
    size = np.bincount(group)
    sums = torch.zeros(len(names), features.shape[1])
    for first in range(0, len(order), IMAGES):
        rows = order[first : first + IMAGES]
        share = torch.from_numpy(1 / size[group[first : first + IMAGES]]).float()
        images = features[torch.from_numpy(rows)].float() * share[:, None]
        sums.index_add_(0, torch.from_numpy(template[rows]), images)
    return names, sums
