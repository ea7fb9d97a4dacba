"""Templates of digits, built as IJB's are: single images and clips, 1 to 20 images of one identity in all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fcn_kernels.demos import digits

LONGEST = 20
NEW_MEDIUM = 0.4  # chance that an image is not the next frame of a clip: 40% of the media are single images


class Templates(NamedTuple):
    """B templates of T images in all, packed: images (T, 8, 8), cu_seqlens (B + 1,) int32, labels (B,)."""

    images: Tensor
    cu_seqlens: Tensor
    labels: Tensor

    def to(self, device: str) -> Templates:
        """The same templates on `device`."""
        return Templates(*(part.to(device) for part in self))


def make_templates(data: digits.Digits, labels: Tensor, corrupted: Tensor) -> Templates:
    """A template of 1 to 20 images for each of labels (B,).

    A medium, a single image or a clip, shows one handwritten digit of its template's class in one condition: it is
    blurred or noisy with the probability corrupted (B,) that its template has. Frames of a clip are near-duplicates.
    """
    lengths = torch.randint(1, LONGEST + 1, labels.shape)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    starts = torch.rand(int(cu_seqlens[-1])) < NEW_MEDIUM
    starts[cu_seqlens[:-1]] = True
    medium = starts.cumsum(0) - 1
    template = torch.arange(len(labels)).repeat_interleave(lengths)[starts]
    rows = torch.multinomial((data.labels == labels[template][:, None]).float(), 1)[:, 0]
    bad = torch.rand(rows.shape) < corrupted[template]
    conditions = torch.where(bad, torch.randint(1, len(digits.CONDITIONS), rows.shape), digits.CLEAR)
    severity = torch.empty(rows.shape).uniform_(0.5, 1)
    images = digits.photographed(data.images[rows[medium]], conditions[medium], severity[medium])
    return Templates(images, cu_seqlens.int(), labels)
