"""Sets of rows: which rows belong to which set, which rows are usable, and the dtype in which rows are summed."""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fcn_kernels.backends import is_recorded, is_under_vmap

Quality = TypeVar("Quality", Tensor, Tensor | None)

# What has to stay in the last-level cache through several passes, beside what else is there: a quarter of the 32 MiB
# that the cores of a socket share on common servers.
GROUP_BYTES = 8 << 20


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of ``dtype`` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def usable(norms: Tensor, quality: Tensor) -> Tensor:
    """Whether rows of these norms and qualities may be picked and attended to, bool of their shape.

    The norm has to be a normal number of the dtype in which rows are summed (a row with an infinite or NaN element has
    none, nor has one of zeros), and the quality finite and above 0.
    """
    range_ = torch.finfo(norms.dtype)
    return (norms >= range_.tiny) & (norms <= range_.max) & (quality > 0) & (quality < torch.inf)  # NaN is neither


def row_norms(rows: Tensor) -> Tensor:
    """|x_n|, (..., C) -> (...), also where the squares leave the dtype's range, as hypot."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    low, high = (1e-15, 1e15) if rows.dtype == torch.float32 else (1e-140, 1e140)
    plain = (norms > low) & (norms < high)
    if rows.numel() and (is_recorded() or is_under_vmap() or not plain.all()):
        largest = rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        scaled = largest[..., 0] * torch.linalg.vector_norm(rows / largest, dim=-1)
        norms = torch.where(plain, norms, scaled)
    return norms


def finite_marks(rows: Tensor) -> Tensor:
    """1 for rows of finite numbers, NaN for others, (..., C) -> (...): what stands for norms where none are wanted."""
    return rows.mul(0).sum(-1).add(1)


def unpack_nested(
    features: Tensor, quality: Quality, mask: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Quality, Tensor | None]:
    """A jagged nested tensor as packed features, quality and cu_seqlens; anything else as it is.

    The quality may be nested as the features are, or packed.
    """
    # what is no tensor is refused later
    if not getattr(features, "is_nested", False) and not getattr(quality, "is_nested", False):
        return features, quality, cu_seqlens
    nested = [t for t in (features, quality) if isinstance(t, Tensor) and t.is_nested]
    for name, value in (("mask", mask), ("lengths", lengths), ("cu_seqlens", cu_seqlens)):
        if value is not None:
            raise ValueError(f"expected no {name} with nested features, which know their sets")
    if not all(t.layout == torch.jagged and t.ndim == n for t, n in zip(nested, (3, 2), strict=False)):
        raise ValueError("expected nested features (B, N of each set, C), and quality (B, N), of layout torch.jagged")
    if not features.is_nested or features.lengths() is not None:  # type: ignore[attr-defined]
        raise ValueError("expected nested quality with nested features, and neither with gaps between the sets")
    if quality is not None and quality.is_nested:
        if quality.values().shape != features.values().shape[:1]:
            raise ValueError("expected quality to be nested as the features are")
        quality = quality.values()
    return features.values(), quality, features.offsets()  # type: ignore[attr-defined]


class RowSets(NamedTuple):
    """Where sets lie among T rows: set b owns rows offsets[b] to offsets[b + 1]; its first lengths[b] take part."""

    offsets: Tensor  # (B + 1,) int64
    lengths: Tensor  # (B,) int64

    @classmethod
    def padded(cls, sets: int, rows: int, lengths: Tensor | None, device: torch.device) -> "RowSets":
        """Sets of (B, N, C), flattened; ``lengths`` (B,) or all N rows of each."""
        offsets = torch.arange(sets + 1, device=device) * rows
        return cls(offsets, offsets.diff() if lengths is None else lengths.to(device, torch.int64))

    @classmethod
    def packed(cls, cu_seqlens: Tensor, device: torch.device) -> "RowSets":
        """Sets that follow one another in (T, C)."""
        offsets = cu_seqlens.to(device, torch.int64)
        return cls(offsets, offsets.diff())

    def within(self, rows: int) -> "RowSets":
        """The same where offsets and lengths say what they may; else of T rows at most, whatever they say.

        Their values are looked at neither on a device nor by a compiled call.
        """
        offsets: Tensor = self.offsets.clamp(0, rows).cummax(0).values
        return RowSets(offsets, self.lengths.clamp(min=0).minimum(offsets.diff()))

    def take(self, values: Tensor, indices: Tensor) -> Tensor:
        """Values (T,) of rows numbered within their set, (B, K); 0 where the number is -1."""
        places = torch.where(indices < 0, values.shape[0], self.offsets[:-1, None] + indices)
        return torch.nn.functional.pad(values, (0, 1))[places]
