"""The public function: what it takes, what it checks, and which backend a call goes to."""

import importlib.util
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from fcn_kernels.selection import op
from fcn_kernels.selection.cpp import launch as cpp
from fcn_kernels.selection.problem import Problem
from fcn_kernels.selection.torch_backend import unpickable_row
from fcn_kernels.sets import accumulator

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
INTEGER, REAL = (int, torch.SymInt), (int, float, torch.SymInt, torch.SymFloat)
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


class Coreset(NamedTuple):
    """The picked rows of each set, in the order in which they were picked. One set alone has no leading B."""

    features: Tensor
    """(B, k, C), the rows as given; zero where a set has fewer than k rows to pick."""
    indices: Tensor
    """(B, k) int64, row numbers within the set; -1 where there is no pick."""
    counts: Tensor
    """(B,) int64, picks made: min(k, number of rows that can be picked)."""
    distances: Tensor
    """(B, k) float32, quality-weighted cosine distance of the pick to the picks before it; inf for the first, 0 where
    there is no pick. Not differentiable."""


def coreset_select(
    features: Tensor,
    k: int,
    quality: Tensor | None = None,
    gamma: float | Tensor = 0.0,
    *,
    tau: float = 1.0,
    sample: bool = False,
    noise: Tensor | None = None,
    generator: Generator | None = None,
    distance_scale: float = 1.0,
    normalized: bool = False,
    distinct: bool = False,
    start: int | Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    strict: bool = False,
    backend: str | None = None,
) -> Coreset:
    r"""Pick ``k`` rows of each set that are both good and different, differentiably.

    The first pick has the best quality. Each later one is the row whose quality-weighted cosine distance to the
    nearest earlier pick is largest::

        l_0(n) = q_n
        d_k(n) = distance_scale * q_n^gamma * (1 - cos(x_n, x_{i_k}))
        l_{k+1}(n) = min(l_k(n), d_k(n))          (l_0 takes no part in the minimum)
        i_k = argmax_n l_k(n) + g_k(n)            (lowest index on ties; g_k: Gumbel noise if sampling, else 0)

    Gradients are straight-through: the picked rows are returned as they are, and the gradient flows as if row k were
    the softmax((l_k + g_k) / tau)-weighted mean of the set, to features, quality and gamma.

    Args:
        features: ``(B, N, C)`` sets of rows, ``(N, C)`` one set, or ``(T, C)`` packed sets with ``cu_seqlens``.
            float32, bfloat16 or float16, summed in float32; float64, but not on the Triton backend.
        k: picks a set, at least 1. A set with fewer rows to pick gives those, and ``counts`` says so.
        quality: ``(B, N)``, ``(N,)`` or ``(T,)``, above 0. None: the rows' own norms, with their gradient.
        gamma: exponent of the quality in the distance, a number or a 0-d tensor (which may be learned). 0 makes it
            plain farthest-point selection after the first pick.
        tau: temperature of the softmax in the gradient. It does not change what is picked.
        sample: add Gumbel noise, so that pick k is a sample from softmax(l_k). The seed is drawn from torch's default
            CPU generator, so the same ``torch.manual_seed`` picks the same rows on every device; inside
            ``torch.compile``, and while a CUDA graph is captured, from the device's generator, so that each replay
            draws anew.
        noise: ``(k, B, N)``, ``(k, N)`` or ``(k, T)`` Gumbel samples to use instead.
        generator: draw the seed from this generator instead; it may live on the CPU or on the features' device.
        distance_scale: 1 in the paper's listing, 1/2 in its authors' code.
        normalized: rows are unit length already; no norms are computed and the gradient is not projected.
        distinct: never pick a row twice (possible only under noise or among coinciding rows).
        start: fixes the first pick, an int or ``(B,)`` integers. A set in which that row cannot be picked gives none.
        mask: ``(B, N)`` or ``(N,)`` bool, True for the rows that take part.
        lengths: ``(B,)`` int32 or int64, the number of leading rows of each padded set that take part.
        cu_seqlens: ``(B + 1,)`` int32 or int64, offsets of packed sets, from 0 to T. At most one of mask, lengths and
            cu_seqlens is given. On a CUDA device the values of these, and of ``start``, are read by the kernels
            alone, which stay inside the tensors whatever they say; ``strict=True`` checks them first.
        strict: raise if a row that takes part cannot be picked, naming set and row. Waits for the device.
        backend: "triton" (CUDA devices), "cpp" (CPUs; compiled on a machine's first call), "torch" (PyTorch's
            operations, any device), or None: Triton on CUDA devices, C++ on CPUs where there is a compiler, else torch.

    Rows whose features are not finite or all zero, or whose quality is not finite or not above 0, are never picked,
    take no gradient and change nothing for the other rows.

    Returns:
        A :class:`Coreset` of ``features``, ``indices``, ``counts``, ``distances``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device; with ``strict``, a row cannot be picked.
        RuntimeError: the Triton or the C++ backend is asked for where it cannot run.

    Source: Shapira and Keller, "FaceCoresetNet: Differentiable Coresets for Face Set Recognition", AAAI 2024,
    section 3 and Listing 1.

    Example:
        >>> photos = torch.nn.functional.normalize(torch.randn(2, 100, 512), dim=-1)
        >>> sharpness = torch.rand(2, 100) + 0.5
        >>> coreset = coreset_select(photos, 3, sharpness, gamma=0.5)
        >>> coreset.features.shape, coreset.indices.shape
        (torch.Size([2, 3, 512]), torch.Size([2, 3]))
    """
    _check_features(features, cu_seqlens)
    single = features.ndim == 2 and cu_seqlens is None
    rows_shape = tuple(features.shape[:-1])
    _check_number("k", k, INTEGER, 0, "an integer of at least 1")
    _check_number("tau", tau, REAL, 0, "finite and above 0")
    _check_number("distance_scale", distance_scale, REAL, 0, "finite and above 0")
    gamma = _check_gamma(gamma, features)
    if quality is not None:
        _check_tensor("quality", quality, features, rows_shape, DTYPES)
    if noise is not None:
        _check_tensor("noise", noise, features, (k, *rows_shape), DTYPES)
        if generator is not None:
            raise ValueError("expected noise or generator, got both")
    if (mask is not None) + (lengths is not None) + (cu_seqlens is not None) > 1:
        given = [n for n, v in (("mask", mask), ("lengths", lengths), ("cu_seqlens", cu_seqlens)) if v is not None]
        raise ValueError(f"expected at most one of mask, lengths and cu_seqlens, got {' and '.join(given)}")
    look = strict or (features.device.type == "cpu" and not torch.compiler.is_compiling())
    if mask is not None:
        _check_tensor("mask", mask, features, rows_shape, (torch.bool,))
    if single:
        features = features[None]
    if lengths is not None:
        if single and lengths.ndim == 0:
            lengths = lengths[None]
        _check_tensor("lengths", lengths, features, (features.shape[0],), INTEGERS)
        if look:
            _check_range("lengths", lengths, 0, features.shape[1])
    if cu_seqlens is not None and look:
        _check_offsets(cu_seqlens, features.shape[0])
    sets = features.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if start is not None:
        start = _check_start(start, features, sets, lengths, cu_seqlens, single, look)

    accumulate = accumulator(features.dtype)
    problem = Problem(
        features=features if features.stride(-1) == 1 or features.shape[-1] == 1 else features.contiguous(),
        quality=None if quality is None else quality.reshape(-1).to(accumulate),
        gamma=gamma,
        noise=None if noise is None else noise.detach().to(accumulate).reshape(k, -1),
        seed=draw_seed(features, generator) if sample and noise is None else None,
        start=start,
        mask=None if mask is None else mask.reshape(-1),
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        k=k,
        tau=float(tau),
        distance_scale=float(distance_scale),
        normalized=normalized,
        distinct=distinct,
    )
    if strict:
        _check_rows(problem)
    needs_grad = torch.is_grad_enabled() and (
        features.requires_grad or gamma.requires_grad or (quality is not None and quality.requires_grad)
    )
    out = op.select(problem, needs_grad, resolve_backend(backend, features))
    picked = Coreset(out.features, out.indices, out.counts, out.distances)
    return Coreset(*(t[0] for t in picked)) if single else picked


def resolve_backend(backend: str | None, features: Tensor) -> str:
    """The backend that a call with these features goes to: "triton", "cpp", "torch" or "cpu".

    "cpu" is "cpp" where that can be compiled, else "torch". It is decided when the call runs, so that one that was
    traced or exported asks the machine that it runs on.
    """
    if backend not in (None, "triton", "cpp", "torch"):
        raise ValueError(f'expected backend "triton", "cpp", "torch" or None, got {backend!r}')
    device = features.device.type
    if backend is None:
        if device == "cpu":
            return "cpu"
        return "triton" if device == "cuda" and HAS_TRITON and features.dtype != torch.float64 else "torch"
    if backend == "triton":
        if not HAS_TRITON:
            raise RuntimeError('expected triton to be installed for backend="triton", and it is not')
        if not (device == "cuda" or INTERPRETED):
            raise RuntimeError(
                f'expected features on a CUDA device for backend="triton" (or TRITON_INTERPRET=1 set before '
                f"fcn_kernels is imported), got {features.device}"
            )
        if features.dtype == torch.float64:
            raise TypeError('expected float32, bfloat16 or float16 features for backend="triton", got float64')
    if backend == "cpp":
        if device != "cpu":
            raise RuntimeError(f'expected features on the CPU for backend="cpp", got {features.device}')
        if not torch.compiler.is_compiling() and (reason := cpp.unavailable(features.dtype)):
            raise RuntimeError(f'expected backend="cpp" to be possible here: {reason}')
    return backend


def draw_seed(features: Tensor, generator: Generator | None) -> Tensor:
    """A 0-d int64 seed; from the default CPU generator unless it has to be drawn within a recorded computation."""
    recorded = torch.compiler.is_compiling() or (features.is_cuda and torch.cuda.is_current_stream_capturing())
    device = features.device if recorded else torch.device("cpu")
    if generator is not None:
        device = generator.device
    return torch.randint(2**63 - 1, (), device=device, generator=generator)


def _check_features(features: Tensor, cu_seqlens: Tensor | None) -> None:
    if not isinstance(features, Tensor):
        raise TypeError(f"expected features to be a Tensor, got {type(features).__name__}")
    if features.dtype not in DTYPES:
        raise TypeError(f"expected features of dtype float32, bfloat16, float16 or float64, got {features.dtype}")
    if cu_seqlens is not None:
        if features.ndim != 2:
            raise ValueError(f"expected packed features (T, C) with cu_seqlens, got shape {tuple(features.shape)}")
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            got = tuple(cu_seqlens.shape) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
            raise ValueError(f"expected cu_seqlens to be a Tensor of shape (B + 1,), got {got}")
        _check_tensor("cu_seqlens", cu_seqlens, features, tuple(cu_seqlens.shape), INTEGERS)
    elif features.ndim not in (2, 3):
        raise ValueError(f"expected features of shape (B, N, C) or (N, C), got {tuple(features.shape)}")
    if features.shape[-1] == 0:
        raise ValueError(f"expected features with at least one column, got shape {tuple(features.shape)}")


def _check_tensor(
    name: str, value: Tensor, features: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"expected {name} of dtype {names}, got {value.dtype}")
    if tuple(value.shape) != shape:  # torch.Size of symbols would fix them
        raise ValueError(
            f"expected {name} of shape {tuple(shape)} for features {tuple(features.shape)}, got {tuple(value.shape)}"
        )
    if value.device != features.device:
        raise ValueError(f"expected {name} on the features' device {features.device}, got {value.device}")


def _check_number(name: str, value: Any, kinds: Any, above: float, wanted: str) -> None:
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise TypeError(f"expected {name} to be {wanted}, got {value!r} of type {type(value).__name__}")
    if not above < value < math.inf:
        raise ValueError(f"expected {name} to be {wanted}, got {value!r}")


def _check_gamma(gamma: float | Tensor, features: Tensor) -> Tensor:
    if not isinstance(gamma, Tensor):
        _check_number("gamma", gamma, REAL, -math.inf, "a finite number or a 0-d tensor")
        return torch.tensor(float(gamma), dtype=accumulator(features.dtype))
    if gamma.ndim != 0:
        raise ValueError(f"expected gamma to be a number or a 0-d tensor, got shape {tuple(gamma.shape)}")
    if not gamma.is_floating_point():
        raise TypeError(f"expected gamma to be a floating-point tensor, got {gamma.dtype}")
    if gamma.device.type != "cpu" and gamma.device != features.device:
        raise ValueError(f"expected gamma on {features.device} or the CPU, got {gamma.device}")
    return gamma


def _check_start(
    start: int | Tensor,
    features: Tensor,
    sets: int,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    single: bool,
    look: bool,
) -> Tensor:
    if isinstance(start, bool) or not isinstance(start, (int, Tensor)):
        raise TypeError(f"expected start to be an int or a Tensor of integers, got {type(start).__name__}")
    if isinstance(start, int):
        if start < 0 or (cu_seqlens is None and start >= features.shape[1]):
            raise ValueError(f"expected start in [0, {features.shape[-2]}), got {start}")
        start = torch.full((sets,), start, device=features.device)
    elif single and start.ndim == 0:
        start = start[None]
    _check_tensor("start", start, features, (sets,), INTEGERS)
    if look and sets:
        if lengths is None:
            lengths = torch.full_like(start, features.shape[1]) if cu_seqlens is None else cu_seqlens.diff()
        outside = ((start < 0) | (start >= lengths)).nonzero()
        if len(outside):
            b = int(outside[0])
            raise ValueError(f"expected start of set {b} in [0, {int(lengths[b])}), got {int(start[b])}")
    return start


def _check_range(name: str, values: Tensor, low: int, high: int) -> None:
    outside = ((values < low) | (values > high)).nonzero()
    if len(outside):
        b = int(outside[0])
        raise ValueError(f"expected {name} in [{low}, {high}], got {int(values[b])} for set {b}")


def _check_offsets(cu_seqlens: Tensor, rows: int) -> None:
    ends = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if ends != (0, rows):
        raise ValueError(f"expected cu_seqlens to run from 0 to T = {rows}, got {ends[0]} to {ends[1]}")
    falls = (cu_seqlens.diff() < 0).nonzero()
    if len(falls):
        b = int(falls[0])
        raise ValueError(
            f"expected cu_seqlens not to decrease, got {int(cu_seqlens[b])} then {int(cu_seqlens[b + 1])} at set {b}"
        )


def _check_rows(p: Problem) -> None:
    bad = unpickable_row(p)
    if bad is not None:
        raise ValueError(f"row {bad[1]} of set {bad[0]} cannot be picked: {bad[2]}")
