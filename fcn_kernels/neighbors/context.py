"""The public function: it checks a call, makes a :class:`Problem` of it, and hands that to the operator."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fcn_kernels import checks
from fcn_kernels.backends import resolve_backend
from fcn_kernels.neighbors import op
from fcn_kernels.neighbors.cpp import launch as cpp
from fcn_kernels.neighbors.problem import NO_CAP, Problem
from fcn_kernels.sets import row_norms, usable


class Context(NamedTuple):
    """How rows stand to their nearest bank rows of other identities. One row alone has no leading N."""

    mean: Tensor
    """(N,) float32, or float64 for float64 rows: the mean of their cosines; 0 for none."""
    std: Tensor
    """(N,), their population standard deviation (``np.std``); 0 for none."""
    counts: Tensor
    """(N,) int64, how many there are: k, or fewer."""
    indices: Tensor | None
    """(N, k) int64, bank rows, best first, -1 from ``counts`` on; None for k=None."""


def context_statistics(
    x: Tensor,
    bank: Tensor,
    k: int | None = 50,
    *,
    min_cosine: float | None = None,
    ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
    normalized: bool = False,
    strict: bool = False,
    backend: str | None = None,
) -> Context:
    r"""Mean and deviation of each row's cosines to its nearest rows of a bank, exactly, in bounded memory.

    With u_i = x_i / |x_i|, v_j = b_j / |b_j| and identities y_i, z_j::

        A_i     = { j : b_j is usable, z_j != y_i }                  without ids, all usable j
        s_ij    = u_i . v_j
        S_i     = the k largest s_ij of A_i with s_ij >= min_cosine  lowest j first on ties
        n_i     = |S_i|
        mu_i    = 1/n_i sum over S_i of s_ij
        sigma_i = sqrt(1/n_i sum over S_i of (s_ij - mu_i)^2)

    Nothing of size N x M is made. The gradient of mu and sigma reaches x and bank, with the sets S_i held, as autograd
    has it through ``topk``; where sigma is 0 its gradient is 0.

    Args:
        x: (N, C) rows, or (C,) one row. float32, bfloat16 or float16, summed in float32; float64.
        bank: (M, C), of any of these dtypes, on the device of x.
        k: how many of the nearest bank rows make a row's context. None: all of them that ``min_cosine`` admits.
        min_cosine: least cosine that counts, in [-1, 1], rounded to the dtype of the sums. None or -1: no limit.
        ids, bank_ids: (N,) and (M,) int32 or int64, both or neither: bank rows of a row's own identity are left out.
        normalized: rows are unit length already, and are taken as they are; the gradient is not projected.
        strict: raise if a row of x or bank is not usable, naming it. Waits for the device.
        backend: "triton" (CUDA devices, not for float64), "cpp" (CPUs; compiled on first use and cached), "torch" (any
            device), or None: Triton on CUDA devices, C++ on CPUs where there is a compiler, else torch.

    A row is usable if it is finite and not 0 (its norm a normal number of the dtype of the sums). A row of x that is
    not has n = 0, and a bank row that is not is in no S_i; neither changes anything else or has a gradient.

    Returns:
        A :class:`Context` of mean, std, counts and indices. Fewer than k bank rows are no error: counts says so. What
        a row gets depends on itself and the bank alone, to the bit on a CPU and on Triton; on the torch backend for
        k=None, and on other devices, up to rounding.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device; with ``strict``, a row is not usable.
        RuntimeError: a backend is asked for where it cannot run.
        NotImplementedError: a second or a forward-mode derivative is asked for. torch.func's grad, vjp and jacrev work,
            and under vmap one call after another is made: one call for all rows is faster.

    Source: after Liu et al., "Inter-class Discrepancy Alignment for Face Recognition", arXiv 2103.01559, 2021, whose
    equations could not be had. mu is the term of CSLS (Conneau et al., "Word translation without parallel data", ICLR
    2018); mu and sigma over a cohort are those of AS-norm (Matejka et al., "Analysis of score normalization in
    multilingual speaker recognition", Interspeech 2017).

    Example:
        >>> faces, people = torch.randn(4, 128), torch.randn(1000, 128)
        >>> context = context_statistics(faces, people, k=50)
        >>> context.mean.shape, context.indices.shape, context.counts.tolist()
        (torch.Size([4]), torch.Size([4, 50]), [50, 50, 50, 50])
    """
    _check_rows(x, bank)
    checks.check_flags(normalized=normalized, strict=strict)
    single = x.ndim == 1
    x = x[None] if single else x
    if (ids is None) != (bank_ids is None):
        given, lacking = ("ids", "bank_ids") if bank_ids is None else ("bank_ids", "ids")
        raise ValueError(f"expected ids and bank_ids, or neither, got {given} without {lacking}")
    if ids is not None and bank_ids is not None:
        ids = ids[None] if single and isinstance(ids, Tensor) and ids.ndim == 0 else ids
        checks.check_tensor("ids", ids, x, (x.shape[0],), checks.INTEGERS)
        checks.check_tensor("bank_ids", bank_ids, bank, (bank.shape[0],), checks.INTEGERS)
        ids, bank_ids = ids.to(torch.int64), bank_ids.to(torch.int64)
    problem = Problem(
        rows=x,
        bank=bank,
        ids=ids,
        bank_ids=bank_ids,
        k=0 if k is None else checks.at_least_one("k", k),
        min_cosine=_least_cosine(min_cosine),
        normalized=normalized,
    )
    if k is None and min_cosine is None:
        raise ValueError("expected k, min_cosine or both, got None for both (min_cosine=-1 takes the whole bank)")
    if strict:
        check_usable("x", x)
        check_usable("bank", bank)
    found = op.context_statistics(problem, neighbors_backend(backend, problem))
    context = Context(found.mean, found.std, found.counts, None if k is None else found.indices)
    return Context(*(t if t is None else t[0] for t in context)) if single else context  # type: ignore[arg-type]


def neighbors_backend(backend: str | None, problem: Problem) -> str:
    """What a call runs on."""
    dtype = op.cpp_dtype(problem)
    kind = problem.bank if problem.bank.dtype == dtype else problem.bank[:0].to(dtype)
    return resolve_backend(backend, kind, cpp.unavailable)


def check_usable(name: str, rows: Tensor) -> None:
    """Raise ValueError for a row that is not usable, naming it."""
    norms = row_norms(rows if rows.dtype == torch.float64 else rows.float())
    bad = (~usable(norms, norms)).nonzero()
    if len(bad):
        at = int(bad[0])
        raise ValueError(f"expected {name} of finite rows that are not 0, got row {at} of norm {float(norms[at]):g}")


def _check_rows(x: Any, bank: Any) -> None:
    for name, rows, shapes in (("x", x, "(N, C) or (C,)"), ("bank", bank, "(M, C)")):
        if not isinstance(rows, Tensor):
            raise TypeError(f"expected {name} to be a Tensor, got {type(rows).__name__}")
        if rows.dtype not in checks.DTYPES:
            raise TypeError(f"expected {name} of dtype float32, bfloat16, float16 or float64, got {rows.dtype}")
        if rows.ndim != 2 and not (name == "x" and rows.ndim == 1):
            raise ValueError(f"expected {name} of shape {shapes}, got {tuple(rows.shape)}")
        if rows.shape[-1] == 0:
            raise ValueError(f"expected {name} with at least one column, got shape {tuple(rows.shape)}")
    if bank.shape[1] != x.shape[-1]:
        raise ValueError(f"expected bank of as many columns as x has, {x.shape[-1]}, got {bank.shape[1]}")
    if bank.device != x.device:
        raise ValueError(f"expected bank on the device of x, {x.device}, got {bank.device}")


def _least_cosine(value: Any) -> float:
    if value is None:
        return NO_CAP
    wanted = "expected min_cosine to be a number in [-1, 1] or None"
    if isinstance(value, bool) or not isinstance(value, checks.REAL):
        raise TypeError(f"{wanted}, got {value!r} of type {type(value).__name__}")
    least = float(value)
    if not -1 <= least <= 1:
        raise ValueError(f"{wanted}, got {value!r}")
    return NO_CAP if least == -1 else least


torch.serialization.add_safe_globals([Context])  # a saved one loads with weights_only
