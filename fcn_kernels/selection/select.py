"""The public function: it checks a call, makes a :class:`Problem` of it, and hands that to the operator."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fcn_kernels import checks
from fcn_kernels.backends import resolve_backend
from fcn_kernels.noise import draw_seed
from fcn_kernels.selection import op
from fcn_kernels.selection.cpp import launch as cpp
from fcn_kernels.selection.problem import Problem
from fcn_kernels.selection.torch_backend import unpickable_row
from fcn_kernels.sets import accumulator, unpack_nested


class Coreset(NamedTuple):
    """The picked rows of each set, in the order in which they were picked. One set alone has no leading B."""

    features: Tensor
    """(B, k, C), the rows as given; zero where a set has fewer than k rows to pick."""
    indices: Tensor
    """(B, k) int64, row numbers within the set; -1 where there is no pick."""
    counts: Tensor
    """(B,) int64, picks made: min(k, number of rows that can be picked)."""
    distances: Tensor
    """(B, k) float32, quality-weighted distance of the pick to the picks before it; inf for the first where nothing was
    picked before, 0 where there is no pick. Not differentiable."""


class CoresetState(NamedTuple):
    """A :class:`Coreset` and what another selection may go on from. One set alone has no leading B."""

    features: Tensor
    """As in :class:`Coreset`, as are the next three."""
    indices: Tensor
    counts: Tensor
    distances: Tensor
    min_distances: Tensor
    """(B, N), (N,) or (T,) float32, quality-weighted distance of each row to the nearest of all picks and anchors; -inf
    for rows picked with ``distinct``, 0 for those that cannot be picked. Not differentiable."""
    nearest: Tensor
    """As min_distances, int64: the number of the pick that is nearest (the first of equals); -1 for rows that an anchor
    is as near to, and for those that cannot be picked."""


def coreset_select(
    features: Tensor,
    k: int | Sequence[int] | Tensor,
    quality: Tensor | None = None,
    gamma: float | Tensor = 0.0,
    *,
    tau: float | Tensor = 1.0,
    sample: bool = False,
    noise: Tensor | None = None,
    generator: Generator | None = None,
    distance_scale: float = 1.0,
    normalized: bool = False,
    distinct: bool = False,
    metric: str = "cosine",
    start: int | Tensor | None = None,
    anchors: Tensor | None = None,
    min_distances: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    strict: bool = False,
    return_min_distances: bool = False,
    return_nearest: bool = False,
    backend: str | None = None,
) -> Coreset | CoresetState:
    r"""Pick ``k`` rows of each set that are both good and different, differentiably.

    It takes the row of highest quality, then repeatedly the row farthest from everything picked so far (cosine or
    squared Euclidean distance, weighted by quality)::

        l_0(n) = q_n
        d_k(n) = distance_scale * q_n^gamma * (1 - cos(x_n, x_{i_k}))     (metric="sqeuclidean": |x_n - x_{i_k}|^2)
        l_{k+1}(n) = min(l_k(n), d_k(n))          (l_0 takes no part in the minimum)
        i_k = argmax_n l_k(n) + g_k(n)            (lowest index on ties; g_k: Gumbel noise if sampling, else 0)

    Gradients are straight-through: the picked rows are returned as they are, and the gradient flows as if row k were
    the softmax((l_k + g_k) / tau)-weighted mean of the set, to features, quality and gamma.

    Args:
        features: ``(B, N, C)`` sets of rows, ``(N, C)`` one set, or ``(T, C)`` packed sets with ``cu_seqlens``.
            float32, bfloat16 or float16, summed in float32; float64, but not on the Triton backend. A nested tensor of
            layout torch.jagged is packed sets.
        k: rows to pick per set, at least 1. A set with fewer rows to pick gives those, and ``counts`` says so. A list
            or an integer tensor ``(B,)`` has a number of at least 0 for each set; results are padded to the largest.
        quality: ``(B, N)``, ``(N,)`` or ``(T,)``, above 0. None: the rows' own norms, with their gradient; with
            ``metric="sqeuclidean"`` 1, so that the first row that can be picked comes first.
        gamma: exponent of the quality in the distance, a number or a 0-d tensor (which may be learned). 0 makes it
            plain farthest-point selection after the first pick. Only the ratios of q^gamma within a set matter for the
            picks; those below 2^-126 of a set's largest count as 0. Distances end at the dtype's largest number.
        tau: temperature of the softmax in the gradient, a number or a 0-d tensor. It does not change what is picked.
        sample: add Gumbel noise, so that pick k is a sample from softmax(l_k). The seed is drawn from torch's default
            CPU generator, so the same ``torch.manual_seed`` picks the same rows on every device; inside
            ``torch.compile``, and while a CUDA graph is captured, from the device's generator, so that each replay
            draws anew.
        noise: ``(k, B, N)``, ``(k, N)`` or ``(k, T)`` Gumbel samples to use instead. -inf takes a row out of a step;
            NaN and +inf are refused, or count as -inf where values cannot be looked at (devices, ``torch.compile``).
        generator: draw the seed from this generator instead; it may live on the CPU or on the features' device.
        distance_scale: 1 in the paper's listing, 1/2 in its authors' code. A constant to compilers.
        normalized: rows are unit length already; no norms are computed and the gradient is not projected.
        distinct: never pick a row twice (possible only under noise or among coinciding rows).
        metric: "cosine", or "sqeuclidean": squared Euclidean distances, made of differences, so that duplicates are 0
            apart and rows far from the origin lose nothing. Rows of zeros can be picked then.
        start: fixes the first pick, an int or ``(B,)`` integers. A set in which that row cannot be picked gives none;
            for a set without rows any value will do.
        anchors: ``(A, C)`` or ``(B, A, C)``, rows that were picked before, of these sets or from elsewhere (labelled
            ones); a jagged nested tensor where sets have different numbers. The first pick is then the row farthest
            from them. Those that are not finite are passed by (as are zeros, for cosines); a set whose anchors are all
            passed by starts at its first row. Without any (A = 0) all is as if none were given. Distances to them are
            in units of 1: where q^gamma leaves the dtype's range, they are its largest number, or 0.
        min_distances: shaped as quality, distances to what was picked before, at least 0 (they include q^gamma); -inf
            takes a row out. What ``return_min_distances`` gave goes on where that call stopped. No gradient goes
            through these or through distances to anchors.
        mask: ``(B, N)`` or ``(N,)``, True (or the integer 1) for the rows that take part.
        lengths: ``(B,)`` int32 or int64, the number of leading rows of each padded set that take part.
        cu_seqlens: ``(B + 1,)`` int32 or int64, offsets of packed sets, from 0 to T. At most one of mask, lengths and
            cu_seqlens is given. On a CUDA device the values of these, and of ``start``, are read by the kernels
            alone, which stay inside the tensors whatever they say; ``strict=True`` checks them first.
        return_min_distances, return_nearest: either asks for a :class:`CoresetState`, at the price of one more pass.
        strict: raise if a row that takes part cannot be picked, naming set and row. Waits for the device.
        backend: "triton" (CUDA devices), "cpp" (CPUs; compiled on first use and cached), "torch" (PyTorch's operations,
            any device), or None: Triton on CUDA devices, C++ on CPUs where there is a compiler, else torch.

    Rows with NaN, Inf or non-positive quality, and rows with NaN or Inf or of zeros, are ignored: they are never
    picked, take no gradient and change nothing for the other rows. (A norm has to be a normal number of the dtype in
    which rows are summed: 1.2e-38 to 3.4e38 for all but float64.)

    Returns:
        A :class:`Coreset` of ``features``, ``indices``, ``counts``, ``distances``, or a :class:`CoresetState`, which
        has ``min_distances`` and ``nearest`` too.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device; with ``strict``, a row cannot be picked.
        RuntimeError: the Triton or the C++ backend is asked for where it cannot run.
        MemoryError: memory ran out.
        NotImplementedError: in forward-mode AD, or for a second derivative.

    Source: Shapira and Keller, "FaceCoresetNet: Differentiable Coresets for Face Set Recognition", AAAI 2024,
    section 3 and Listing 1.

    Example:
        >>> photos = torch.nn.functional.normalize(torch.randn(2, 100, 512), dim=-1)
        >>> sharpness = torch.rand(2, 100) + 0.5
        >>> coreset = coreset_select(photos, 3, sharpness, gamma=0.5)
        >>> coreset.features.shape, coreset.indices.shape
        (torch.Size([2, 3, 512]), torch.Size([2, 3]))
        >>> points = torch.rand(1000, 3)  # farthest-point sampling, and more of it later
        >>> sample = coreset_select(points, 100, metric="sqeuclidean", return_min_distances=True)
        >>> more = coreset_select(points, 50, metric="sqeuclidean", min_distances=sample.min_distances)
        >>> whole = coreset_select(points, 150, metric="sqeuclidean")
        >>> torch.equal(torch.cat([sample.indices, more.indices]), whole.indices)
        True
    """
    call = read_call(
        features, k, quality, gamma, tau=tau, sample=sample, noise=noise, generator=generator,
        distance_scale=distance_scale, normalized=normalized, distinct=distinct, metric=metric, start=start,
        anchors=anchors, min_distances=min_distances, mask=mask, lengths=lengths, cu_seqlens=cu_seqlens, strict=strict,
        return_min_distances=return_min_distances, return_nearest=return_nearest,
    )  # fmt: skip
    backend = resolve_backend(backend, call.problem.features, cpp.unavailable)
    rows, distances, indices, counts, *_ = out = op.select(call.with_anchors(), backend)
    return call.result(rows, indices, counts, distances, op.state_of(out))


class Call(NamedTuple):
    """The arguments of a call, checked."""

    problem: Problem
    anchors: Tensor | None
    offsets: Tensor | None
    """(B + 1,), of anchors of which sets have different numbers."""
    shape: tuple[int, ...]
    """Of the features, without C."""
    single: bool
    """One set, whose results have no leading B."""
    no_picks: bool
    """No set is to have any. Backends make one then, of which the sets' limits leave nothing."""

    def with_anchors(self) -> Problem:
        """The problem with distances to the anchors among those to what was picked before."""
        if self.anchors is None or not self.anchors.shape[-2]:
            return self.problem
        near, known = op.least_distances(self.problem, self.anchors, self.offsets), self.problem.min_distances
        return self.problem._replace(min_distances=near if known is None else torch.minimum(near, known))

    def result(
        self, rows: Tensor, indices: Tensor, counts: Tensor, distances: Tensor, state: Sequence[Tensor]
    ) -> Coreset | CoresetState:
        """What the public function returns."""
        coreset = Coreset(rows, indices, counts, distances)
        if self.no_picks:
            coreset = Coreset(rows[:, :0], indices[:, :0], counts, distances[:, :0])
        if self.single:
            coreset = Coreset(*(t[0] for t in coreset))
        return CoresetState(*coreset, *(t.view(self.shape) for t in state)) if self.problem.return_state else coreset


def read_call(
    features: Tensor,
    k: int | Sequence[int] | Tensor,
    quality: Tensor | None,
    gamma: float | Tensor,
    *,
    tau: float | Tensor,
    sample: bool,
    noise: Tensor | None,
    generator: Generator | None,
    distance_scale: float,
    normalized: bool,
    distinct: bool,
    metric: str,
    start: int | Tensor | None,
    anchors: Tensor | None,
    min_distances: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    strict: bool,
    return_min_distances: bool,
    return_nearest: bool,
) -> Call:
    """Check the arguments of :func:`coreset_select` and bring them into the form that the backends take."""
    features, quality, cu_seqlens = unpack_nested(features, quality, mask, lengths, cu_seqlens)
    checks.check_features(features, cu_seqlens)
    checks.check_flags(
        sample=sample, normalized=normalized, distinct=distinct, strict=strict,
        return_min_distances=return_min_distances, return_nearest=return_nearest,
    )  # fmt: skip
    if metric != "cosine":
        checks.check_metric(metric, normalized)
    if generator is not None:
        checks.check_generator(generator)
    single = features.ndim == 2 and cu_seqlens is None
    shape = tuple(features.shape[:-1])
    look = checks.may_look(features, strict)
    sets = 1 if single else features.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    most, limits = checks.picks_per_set(k, sets, features.device)
    no_picks = limits is not None and most == 0
    if mask is not None or lengths is not None or cu_seqlens is not None:
        checks.at_most_one(mask=mask, lengths=lengths, cu_seqlens=cu_seqlens)
    if noise is not None:
        if generator is not None:
            raise ValueError("expected noise or generator, got both")
        noise = checks.given_noise(noise, features, (most, *shape), look)
    quality = checks.row_quality(quality, features, shape, metric)
    if min_distances is not None:
        min_distances = checks.known_distances(min_distances, features, shape, look)
    anchors, offsets = (None, None) if anchors is None else checks.anchor_rows(anchors, features, sets)
    mask = None if mask is None else checks.row_mask(mask, features, shape, look)
    if single:
        features = features[None]
    if lengths is not None:
        lengths = checks.set_lengths(lengths, features, single, look)
    if cu_seqlens is not None and look:
        checks.check_offsets(cu_seqlens, features.shape[0])
    if start is not None:
        start = checks.first_picks(start, features, sets, lengths, cu_seqlens, single, look)
    problem = Problem(
        features=features if features.stride(-1) == 1 or features.shape[-1] == 1 else features.contiguous(),
        quality=quality,
        gamma=checks.exponent(gamma, features),
        tau=checks.temperature(tau, features),
        noise=None if no_picks else noise,
        seed=draw_seed(features, generator) if sample and noise is None else None,
        start=start,
        mask=mask,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        limits=limits,
        min_distances=min_distances,
        k=1 if no_picks else most,
        distance_scale=float(checks.scale("distance_scale", distance_scale, accumulator(features.dtype))),
        normalized=normalized,
        distinct=distinct,
        metric=metric,
        return_state=return_min_distances or return_nearest,
    )
    if strict:
        _check_rows(problem)
    return Call(problem, anchors, offsets, shape, single, no_picks)


def _check_rows(p: Problem) -> None:
    """Every row that takes part can be picked."""
    bad = unpickable_row(p)
    if bad is not None:
        raise ValueError(f"row {bad[1]} of set {bad[0]} cannot be picked: {bad[2]}")


torch.serialization.add_safe_globals([Coreset, CoresetState])  # a saved one loads with weights_only
