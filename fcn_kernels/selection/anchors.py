"""Distances to anchors: rows that were picked before, inside the sets or elsewhere. No gradient goes through them."""

import math

import torch
from torch import Tensor

from fcn_kernels.backends import without_autocast
from fcn_kernels.selection.problem import Problem
from fcn_kernels.selection.torch_backend import pair_products, power
from fcn_kernels.sets import GROUP_BYTES, accumulator, row_norms, usable


def anchor_distances(p: Problem, anchors: Tensor, offsets: Tensor | None) -> Tensor:
    """min_a s q_n^gamma (1 - cos(x_n, a)) of each row (R,), or with |x_n - a|^2, up to the dtype's largest number; inf
    where a set has no anchor.

    ``anchors`` are (A, C), of all sets, (B, A, C), or (T, C) with ``offsets`` (B + 1,). Anchors that are not finite, or
    without a direction where cosines are asked for, are passed by.
    """
    p, dtype = p.flat, accumulator(p.features.dtype)
    largest = torch.finfo(dtype).max
    rows = p.features.reshape(-1, p.dim)
    out = torch.full((p.rows,), math.inf, dtype=dtype, device=rows.device)
    gamma = p.gamma.to(rows.device, dtype)
    with without_autocast(rows.device.type), torch.no_grad():
        for first, last, low, high in _pairs(p, anchors, offsets):
            chosen = anchors.reshape(-1, p.dim)[low:high].to(dtype)
            norms = row_norms(chosen)
            good = chosen.isfinite().all(-1) if p.euclidean else usable(norms, norms)
            chosen, norms = chosen[good], norms[good]
            step = max(1, GROUP_BYTES // (dtype.itemsize * max(p.dim, len(chosen))))
            for begin in range(first, last if len(chosen) else first, step):
                at = slice(begin, min(begin + step, last))
                x = rows[at].to(dtype)
                quality = row_norms(x) if p.quality is None else p.quality[at]
                gaps = squared_distances(x, chosen) if p.euclidean else cosine_gaps(x, chosen, norms, p.normalized)
                distances = p.distance_scale * power(quality, gamma) * gaps.clamp_(max=largest)
                out[at] = torch.where(gaps == 0, 0, distances.clamp_(max=largest))
    # rows that are not finite, or of a quality below 0, cannot be picked; -inf would say that they were
    return out.nan_to_num_(math.inf, math.inf).clamp_(min=0)


def _pairs(p: Problem, anchors: Tensor, offsets: Tensor | None) -> list[tuple[int, int, int, int]]:
    """Rows [first, last) and the anchors [low, high) that are theirs, both flat."""
    if offsets is None and anchors.ndim == 2:
        return [(0, p.rows, 0, len(anchors))]
    if p.cu_seqlens is None:
        bounds = [i * p.features.shape[1] for i in range(p.sets + 1)]
    else:
        bounds = p.cu_seqlens.clamp(0, p.rows).tolist()
    theirs = [i * anchors.shape[1] for i in range(p.sets + 1)] if offsets is None else offsets.tolist()
    return list(zip(bounds[:-1], bounds[1:], theirs[:-1], theirs[1:], strict=True))


def cosine_gaps(x: Tensor, anchors: Tensor, norms: Tensor, normalized: bool = False) -> Tensor:
    """1 - max_a cos(x_n, a): a matrix product finds the nearest, and a product of the two alone says how near it is, so
    that a copy of an anchor is exactly 0 away."""
    units = anchors if normalized else anchors / norms[:, None]
    nearest = (x @ units.T).argmax(-1)
    each = torch.arange(len(anchors), device=x.device)
    own = pair_products(anchors, units, each, each)
    along = pair_products(x, units, torch.arange(len(x), device=x.device), nearest)
    if not normalized:
        own, along = own / norms, along / row_norms(x)
    return torch.where(along == own[nearest], 0, 1 - along).clamp_(min=0)


def squared_distances(x: Tensor, anchors: Tensor) -> Tensor:
    """min_a |x_n - a|^2, of differences: norms and products would lose what is small beside the norms."""
    if x.is_cpu and x.dtype == torch.float32 and x.shape[1] > FEW_COLUMNS:
        nearest = _nearest(x.double(), anchors.double())
    else:
        nearest = distances_by_differences(x, anchors).argmin(-1)
    return (x - anchors[nearest]).square_().sum(-1)


def distances_by_differences(x: Tensor, others: Tensor) -> Tensor:
    """|x_n - other| of all pairs, each made of differences."""
    return torch.cdist(x, others, compute_mode="donot_use_mm_for_euclid_dist")


def _nearest(x: Tensor, anchors: Tensor) -> Tensor:
    """The anchor nearest to each row, from a matrix product in float64, which is many times faster than differences.
    Where its error could hide another one, differences decide."""
    center = anchors.mean(0)
    x, around = x - center, anchors - center
    squares = around.square().sum(-1)
    scores = torch.addmm(squares / 2, x, around.T, alpha=-1)  # (|x - a|^2 - |x|^2) / 2
    largest = squares.max()
    error = (x.shape[1] + 8) * torch.finfo(x.dtype).eps * (x.norm(dim=-1) * largest.sqrt() + largest)
    best, nearest = scores.min(-1)
    unsure = ((scores <= (best + 2 * error)[:, None]).sum(-1) > 1).nonzero()[:, 0]
    if len(unsure):
        nearest[unsure] = distances_by_differences(x[unsure], around).argmin(-1)
    return nearest


FEW_COLUMNS = 64
"""Up to which differences cost no more than products."""
