"""Scores of templates: cosines of pairs, and the descriptors that IJB's own protocol makes of images."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fcn_kernels.extras import require

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

PIECE = 1 << 14  # elements at a time, of which PyTorch makes no work for several threads; they wait for one another
IMAGES = 8192


def cosines(unit: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """u_first . u_second (P,) of unit rows (B, C); a pair's score depends on its two rows alone."""
    scores = torch.empty(len(first), dtype=unit.dtype)
    step = max(1, PIECE // unit.shape[1])

    def multiply(part: range) -> None:
        for at in part[::step]:
            pairs = slice(at, min(at + step, part.stop))
            scores[pairs] = unit.index_select(0, first[pairs]).mul_(unit.index_select(0, second[pairs])).sum(1)

    threads = torch.get_num_threads()
    share = max(1, -(-len(first) // threads))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(multiply, (range(len(first))[at : at + share] for at in range(0, len(first), share))))
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
