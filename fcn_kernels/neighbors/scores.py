"""Scores aligned by the contexts of both sides: every method is one affine map, made once for each row."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fcn_kernels import checks
from fcn_kernels.neighbors.context import Context
from fcn_kernels.sets import accumulator, row_norms, usable

METHODS = ("mean", "mean-std")
SIDES = ("both", "first", "second")


class Affine(NamedTuple):
    """A row's share in a_ij = (p_i + p_j) s_ij - (o_i + o_j)."""

    scale: Tensor  # p, of the context's shape
    offset: Tensor  # o


def align_scores(
    scores: Tensor,
    first: Context,
    second: Context,
    method: str = "mean",
    *,
    strength: float = 1.0,
    sides: str = "both",
    eps: float = 1e-6,
) -> Tensor:
    r"""Correct cosines by how each side stands to its nearest neighbors of other identities.

    With mu, sigma and n from :func:`context_statistics`, and sigma'_i = max(sigma_i, eps), or 1 where n_i < 2::

        a_ij = (p_i + p_j) s_ij - (o_i + o_j)
        "mean":      p_i = 1/2,               o_i = strength mu_i / 2
        "mean-std":  p_i = 1 / (2 sigma'_i),  o_i = mu_i / (2 sigma'_i)

    "mean" is half of CSLS, in the same order. "mean-std" is AS-norm; with k=None and min_cosine=-1 it is S-norm.
    ``sides="first"`` takes the first side's p and o twice and leaves out the second's (Z-norm in "mean-std"), and
    ``"second"`` the reverse (T-norm). A row without a context, n = 0, keeps its scores as far as "mean" goes by it.

    Args:
        scores: (P,) cosines of pairs, or (Q, G) of all pairs. Floating point.
        first, second: contexts of P rows each; or of Q and of G rows.
        method: "mean" or "mean-std".
        strength: how much of the context's mean is taken off, 0 (nothing) to 1; of "mean" alone.
        sides: "both", "first" or "second".
        eps: least sigma, above 0.

    Returns:
        Aligned scores of the shape of ``scores``, with gradients to scores and contexts. They are on another scale: a
        threshold has to be chosen anew.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or has the wrong shape or value.

    Source: our reading of Liu et al., "Inter-class Discrepancy Alignment for Face Recognition", arXiv 2103.01559, 2021,
    whose equations could not be had; CSLS: Conneau et al., ICLR 2018; AS-norm: Matejka et al., Interspeech 2017.

    Example:
        >>> from fcn_kernels import context_statistics
        >>> people = torch.randn(1000, 128)
        >>> probes, gallery = torch.randn(4, 128), torch.randn(6, 128)
        >>> contexts = context_statistics(probes, people), context_statistics(gallery, people)
        >>> cosines = torch.nn.functional.cosine_similarity(probes[:, None], gallery, dim=-1)
        >>> align_scores(cosines, *contexts).shape
        torch.Size([4, 6])
    """
    check_method(method, strength, sides, eps)
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"expected scores to be a floating-point Tensor, got {got}")
    if scores.ndim > 2:
        raise ValueError(f"expected scores of shape (P,) or (Q, G), got {tuple(scores.shape)}")
    wanted = (scores.shape[:1], scores.shape[1:]) if scores.ndim == 2 else (scores.shape, scores.shape)
    for name, context, shape in zip(("first", "second"), (first, second), wanted, strict=True):
        _check_context(name, context)
        if context.mean.shape != shape:
            raise ValueError(
                f"expected {name} to be a context of shape {tuple(shape)} for scores {tuple(scores.shape)}, "
                f"got {tuple(context.mean.shape)}"
            )
    one, other = (affine(context, method, strength, eps) for context in (first, second))
    if scores.ndim == 2:
        one = Affine(*(t[:, None] for t in one))
    if sides != "both":
        one = other = one if sides == "first" else other
    return (one.scale + other.scale) * scores - (one.offset + other.offset)


def search_rows(
    x: Tensor,
    context: Context,
    method: str = "mean",
    side: str = "query",
    *,
    strength: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    r"""Rows whose inner products rank by aligned scores: any index of inner products can search by them.

    With p, o and a_ij as in :func:`align_scores` (``sides="both"``), u_i of a query and v_j of the gallery::

        "mean":      [u_i, 1] . [v_j, -o_j]                   = a_ij + o_i
        "mean-std":  [p_i u_i, u_i, 1] . [v_j, p_j v_j, -o_j] = a_ij + o_i

    o_i is the same for all that a query finds: strength mean_i / 2, or mean_i / (2 std_i).

    Args:
        x: (N, C) rows, or (C,) one row, floating point. context: theirs.
        method, strength, eps: as in :func:`align_scores`; the same for both sides.
        side: "query" or "gallery".

    Returns:
        (N, C + 1) for "mean" or (N, 2 C + 1) for "mean-std", float32, or float64 for float64 rows. Rows that are not
        usable count as 0.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or has the wrong shape or value.

    Example:
        >>> from fcn_kernels import context_statistics
        >>> people, gallery = torch.randn(1000, 128), torch.randn(500, 128)
        >>> index = search_rows(gallery, context_statistics(gallery, people), side="gallery")
        >>> probe = torch.randn(128)
        >>> query = search_rows(probe, context_statistics(probe, people))
        >>> (index @ query).topk(10).indices.shape
        torch.Size([10])
    """
    check_method(method, strength, "both", eps)
    if side not in ("query", "gallery"):
        raise ValueError(f'expected side "query" or "gallery", got {side!r}')
    if not isinstance(x, Tensor):
        raise TypeError(f"expected x to be a Tensor, got {type(x).__name__}")
    checks.check_tensor("x", x, x, tuple(x.shape), checks.DTYPES)
    _check_context("context", context)
    if x.ndim not in (1, 2) or context.mean.shape != x.shape[:-1]:
        got = f"{tuple(x.shape)} and {tuple(context.mean.shape)}"
        raise ValueError(f"expected x of shape (N, C) or (C,) with the context of as many rows, got {got}")
    unit = unit_rows(x)
    scale, offset = (t[..., None].to(unit.dtype) for t in affine(context, method, strength, eps))
    last = torch.ones_like(offset) if side == "query" else -offset
    if method == "mean":
        return torch.cat([unit, last], -1)
    halves = (scale * unit, unit) if side == "query" else (unit, scale * unit)
    return torch.cat([*halves, last], -1)


def _check_context(name: str, context: Any) -> None:
    if not isinstance(context, Context):
        raise TypeError(f"expected {name} to be a Context, got {type(context).__name__}")


def affine(context: Context, method: str, strength: float = 1.0, eps: float = 1e-6) -> Affine:
    """p and o of :func:`align_scores`, of the context's shape."""
    if method == "mean":
        return Affine(torch.full_like(context.mean, 0.5), context.mean * (strength / 2))
    scale = 0.5 / context.std.clamp(min=eps).where(context.counts >= 2, 1)
    return Affine(scale, scale * context.mean)


def unit_rows(x: Tensor) -> Tensor:
    """x / |x| (..., C), float32 or float64; 0, and without a gradient, for a row that is not usable."""
    x = x.to(accumulator(x.dtype))
    norms = row_norms(x.detach())
    good = usable(norms, norms)[..., None]
    x = x.where(good, 1)
    return (x / row_norms(x)[..., None]).where(good, 0)


def check_method(method: Any, strength: Any, sides: Any, eps: Any) -> None:
    """Raise TypeError or ValueError for what :func:`align_scores` does not take."""
    if method not in METHODS:
        raise ValueError(f'expected method "mean" or "mean-std", got {method!r}')
    if sides not in SIDES:
        raise ValueError(f'expected sides "both", "first" or "second", got {sides!r}')
    for name, value in (("strength", strength), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, checks.REAL):
            raise TypeError(f"expected {name} to be a number, got {value!r} of type {type(value).__name__}")
    if not 0 <= strength <= 1:
        raise ValueError(f"expected strength in [0, 1], got {strength!r}")
    if strength != 1 and method != "mean":
        raise ValueError(f'expected strength with method "mean" alone, got {strength!r} with {method!r}')
    if not 0 < eps < math.inf:
        raise ValueError(f"expected eps to be finite and above 0, got {eps!r}")
