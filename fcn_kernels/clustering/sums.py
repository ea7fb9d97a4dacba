"""The public function: it checks a call, makes a :class:`Sums` of it, and hands that to the operator."""

from typing import NamedTuple

import torch
from torch import Tensor

from fcn_kernels import checks
from fcn_kernels.backends import resolve_backend
from fcn_kernels.clustering import op
from fcn_kernels.clustering.problem import Sums
from fcn_kernels.sets import RowSets, accumulator


class ClusterSums(NamedTuple):
    """What :func:`cluster_sums` returns. One set alone has no leading B."""

    sums: Tensor
    """(B, M, C), the values' sums, weighted by their shares."""
    key_sums: Tensor | None
    """(B, M, d), likewise of the keys; None if the values are the keys."""
    masses: Tensor
    """(B, M), sums of the shares."""


class Layout(NamedTuple):
    """Which of T flat rows belong to which set, from the arguments of a call."""

    sets: RowSets
    valid: Tensor | None  # (T,) bool
    shape: tuple[int, ...]  # (B, N), (N,) or (T,)
    single: bool  # one set without a leading B


def cluster_sums(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    keys: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    ghosts: int = 0,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> ClusterSums:
    r"""Share out each row of a set among M centers, and sum the rows by their shares.

    With values x_n, keys k_n (the values, if none are given) and scales s_n (1, if none are given)::

        a_mn     = softmax over m of weight_m . k_n + bias_m        each row's shares sum to 1
        masses_m = sum_n a_mn
        sums_m   = sum_n a_mn s_n x_n
        key_sums_m = sum_n a_mn k_n

    Nothing of size N x M x C is made. NetVLAD's residuals are ``sums - masses[..., None] * centers``; GhostVLAD's
    ghosts take shares and give no sums; a step of slot attention is ``sums / masses[..., None]``.

    Args:
        values: (B, N, C), (N, C) one set, or (T, C) packed sets with cu_seqlens. float32, bfloat16 or float16, summed
            in float32; float64.
        weight: (M + ghosts, d), floating point; d is C where no keys are given.
        bias: (M + ghosts,), or None for 0.
        keys: (B, N, d), (N, d) or (T, d), floating point.
        scale: (B, N), (N,) or (T,), floating point; it scales a row's value, not its mass.
        ghosts: how many of the last centers only take shares, from 0 up to fewer than all.
        mask, lengths, cu_seqlens: which rows take part, at most one of the three, as in
            :func:`fcn_kernels.coreset_select`.
        backend: "triton" or "torch"; None picks Triton on CUDA devices, unless values are float64, else torch.

    A row with a value, key or scale that is not finite takes no part, changes no bit of the other rows' sums and gets
    no gradient. A set without rows gives zeros.

    Returns:
        A :class:`ClusterSums` of sums (B, M, C), key_sums (B, M, d) and masses (B, M), float32 (float64 for float64
        values). A set gives the same bits alone or in a batch, padded or packed.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device.
        RuntimeError: a backend is asked for where it cannot run.
        NotImplementedError: a second or a forward-mode derivative is asked for. torch.func's grad, vjp and jacrev work,
            and under vmap one call after another is made: one call for all sets is faster.

    Source: the assignment of Kim et al., "Cluster and Aggregate: Face Recognition with Large Probe Set", NeurIPS 2022;
    Arandjelovic et al., "NetVLAD", CVPR 2016; Zhong et al., "GhostVLAD for set-based face recognition", ACCV 2018;
    Locatello et al., "Object-Centric Learning with Slot Attention", NeurIPS 2020.

    Example:
        >>> patches, centers = torch.randn(2, 100, 64), torch.randn(8, 64)
        >>> sums, _, masses = cluster_sums(patches, centers)
        >>> residuals = sums - masses[..., None] * centers  # NetVLAD
        >>> residuals.shape, masses.sum(-1).round().tolist()
        (torch.Size([2, 8, 64]), [100.0, 100.0])
    """
    layout = row_layout("values", values, mask, lengths, cu_seqlens)
    dtype = accumulator(values.dtype)
    dim = values.shape[-1]
    if keys is not None:
        if not isinstance(keys, Tensor) or keys.ndim < 1:
            raise TypeError(f"expected keys to be a Tensor of rows, got {type(keys).__name__}")
        dim = keys.shape[-1]
        if dim == 0:
            raise ValueError(f"expected keys with at least one column, got shape {tuple(keys.shape)}")
        checks.check_tensor("keys", keys, values, (*layout.shape, dim), checks.DTYPES)
        keys = keys.reshape(-1, dim).to(dtype)
    if scale is not None:
        checks.check_tensor("scale", scale, values, layout.shape, checks.DTYPES)
        scale = scale.reshape(-1).to(dtype)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"expected weight to be a Tensor of shape (M + ghosts, {dim}), got {got}")
    every = weight.shape[0]
    checks.check_tensor("weight", weight, values, (every, dim), checks.DTYPES)
    if isinstance(ghosts, bool) or not isinstance(ghosts, int):
        raise TypeError(f"expected ghosts to be an integer, got {ghosts!r} of type {type(ghosts).__name__}")
    if not 0 <= ghosts < every:
        raise ValueError(f"expected ghosts in [0, {every}), fewer than the {every} rows of weight, got {ghosts}")
    if bias is None:
        bias = weight.new_zeros(every)
    checks.check_tensor("bias", bias, values, (every,), checks.DTYPES)
    problem = Sums(
        values=values.reshape(-1, values.shape[-1]),
        keys=keys,
        scale=scale,
        weight=weight.to(dtype),
        bias=bias.to(dtype),
        offsets=layout.sets.offsets,
        lengths=layout.sets.lengths,
        valid=layout.valid,
        ghosts=ghosts,
    )
    sums, key_sums, masses = op.cluster_sums(problem, clustering_backend(backend, values))
    if layout.single:
        sums, key_sums, masses = sums[0], key_sums[0], masses[0]
    return ClusterSums(sums, None if keys is None else key_sums, masses)


def clustering_backend(backend: str | None, rows: Tensor) -> str:
    """What a call with these rows runs on: "triton" or "torch", which is what CPUs have."""
    return "triton" if resolve_backend(backend, rows, lambda _: "cluster_sums has no C++") == "triton" else "torch"


def row_layout(
    name: str, rows: Tensor, mask: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None
) -> Layout:
    """Check rows (B, N, C), (N, C) or packed (T, C), called ``name`` in errors, and what says which take part.

    Raises:
        TypeError, ValueError: saying what was expected.
    """
    if not isinstance(rows, Tensor):
        raise TypeError(f"expected {name} to be a Tensor, got {type(rows).__name__}")
    if rows.is_nested:
        raise TypeError(f"expected {name} that is not nested: give its values() with cu_seqlens = its offsets()")
    checks.check_features(rows, cu_seqlens)
    checks.at_most_one(mask=mask, lengths=lengths, cu_seqlens=cu_seqlens)
    look, shape, valid = checks.may_look(rows), tuple(rows.shape[:-1]), None
    single = rows.ndim == 2 and cu_seqlens is None
    if mask is not None:
        valid = checks.row_mask(mask, rows, shape, look)
    if cu_seqlens is not None:
        if look:
            checks.check_offsets(cu_seqlens, rows.shape[0])
        return Layout(RowSets.packed(cu_seqlens, rows.device), None, shape, False)
    sets, n = (1, rows.shape[0]) if single else (rows.shape[0], rows.shape[1])
    if lengths is not None:
        lengths = checks.set_lengths(lengths, rows[None] if single else rows, single, look)
    return Layout(RowSets.padded(sets, n, lengths, rows.device), valid, shape, single)


torch.serialization.add_safe_globals([ClusterSums])
