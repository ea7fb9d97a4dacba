"""Sets of digits for the selection demo, ways of picking from them, and what the picks are worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_kernels import coreset_select
from fcn_kernels.demos import digits

# A set shows 19 handwritten digits of one class: one in a clip of 6 frames, the others in single images.
FRAMES = torch.tensor([6] + [1] * 18)
CONDITIONS = torch.tensor([digits.CLEAR] * 7 + [digits.BLURRED] * 6 + [digits.NOISY] * 6)
SIZE = int(FRAMES.sum())


class Sets(NamedTuple):
    """S sets of N images of one class: images (S, N, 8, 8), and in every set conditions (N,) and media (N,).

    `media` numbers the handwritten digit behind an image: the frames of a clip share one.
    """

    images: Tensor
    conditions: Tensor
    media: Tensor


class Score(NamedTuple):
    """What one way of picking is worth, on average over the sets."""

    quality: float
    """mean norm of the picks over mean norm of their set"""
    diversity: float
    """mean cosine distance between two picks"""
    clear: float
    """picks that are neither blurred nor noisy"""
    different: float
    """handwritten digits among the picks"""
    clear_different: float
    """handwritten digits among the clear picks"""


def make_sets(data: digits.Digits, count: int) -> Sets:
    """Photograph `count` sets of `data`, all classes in turn; the order within the sets is drawn once."""
    labels = torch.randperm(digits.CLASSES).repeat(-(-count // digits.CLASSES))[:count]
    same_class = (data.labels == labels[:, None]).float()
    media = torch.arange(len(FRAMES)).repeat_interleave(FRAMES)[torch.randperm(SIZE)]
    rows = torch.multinomial(same_class, len(FRAMES))[:, media].flatten()
    conditions = CONDITIONS[media]
    severity = torch.empty(len(rows)).uniform_(0.5, 1)
    images = digits.photographed(data.images[rows], conditions.repeat(count), severity)
    return Sets(images.view(count, SIZE, digits.SIDE, digits.SIDE), conditions, media)


def pick_all(features: Tensor, k: int, gammas: Sequence[float]) -> dict[str, Tensor]:
    """The rows (S, k) that each way of picking takes from features (S, N, C), by the way's name."""
    norms = features.norm(dim=-1)
    flat = torch.ones_like(norms)
    start = torch.randint(norms.shape[1], norms.shape[:1]).to(norms.device)
    picks = {
        "random": torch.rand(norms.shape).argsort(dim=1)[:, :k],
        "best quality only": norms.topk(k).indices,
        "plain farthest point": coreset_select(features, k, flat, start=start).indices,
    }
    for gamma in gammas:
        picks[f"coreset, gamma = {gamma:g}"] = coreset_select(features, k, norms, gamma).indices
    return {way: rows.cpu() for way, rows in picks.items()}


def outranked(norms: Tensor, sets: Sets, condition: int) -> float:
    """Share of the pairs (clear image, image in `condition`) of a set in which the clear one is longer."""
    clear, other = norms[:, sets.conditions == digits.CLEAR], norms[:, sets.conditions == condition]
    return _mean(clear[:, :, None] > other[:, None, :])


def score(features: Tensor, sets: Sets, rows: Tensor) -> Score:
    """Judge picks (S, k), k at least 2, by their embeddings (S, N, C) and by how their images were made."""
    norms = features.norm(dim=-1)
    units = F.normalize(features, dim=-1).take_along_dim(rows[:, :, None], dim=1)
    pairs = torch.ones(rows.shape[1], rows.shape[1]).triu(1).bool()
    clear = sets.conditions[rows] == digits.CLEAR
    shown = F.one_hot(sets.media[rows], len(FRAMES))  # [S, k, media]
    return Score(
        quality=_mean(norms.take_along_dim(rows, dim=1).mean(1) / norms.mean(1)),
        diversity=_mean((1 - units @ units.mT)[:, pairs]),
        clear=_mean(clear.sum(1)),
        different=_mean(shown.amax(1).sum(1)),
        clear_different=_mean((shown * clear[:, :, None]).amax(1).sum(1)),
    )


def _mean(values: Tensor) -> float:
    return values.float().mean().item()
