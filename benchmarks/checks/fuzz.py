"""Random problems, hostile values among them, against an oracle in float64 that is written from the mathematics alone.

    python -m benchmarks.checks.fuzz --minutes 30 --seed 1 [--backends torch cpp triton]

A backend's own picks are followed: each has to be the best of the rows that may be picked, given those before it, up to
what rounding can do, and the lowest of equal ones. Distances, counts and gradients are held against the oracle, and
calls against their twins: packed against padded, one thread against two. Every finding is printed with the number that
repeats it (``--only N``); the exit status is 1 if there was one. The Triton kernels run in the interpreter where there
is no GPU.
"""

import argparse
import math
import os
import sys
import time
from collections import Counter
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch import Tensor

from fcn_kernels import Coreset, coreset_select

F64 = torch.float64
NAN, INF = math.nan, math.inf
GAP_ERROR = {torch.float32: 4e-6, torch.float64: 1e-12}
"""Of 1 - cosine, in the dtype in which rows are summed."""


class Problem(NamedTuple):
    """Padded sets and the options of a call."""

    features: Tensor  # (B, N, C), of the call's dtype
    quality: Tensor | None  # (B, N)
    gamma: float
    k: int
    tau: float
    scale: float
    normalized: bool
    distinct: bool
    start: Tensor | None  # (B,)
    keep: Tensor  # (B, N) bool: inside mask or lengths
    form: str  # "mask", "lengths" or "plain"
    noise: Tensor | None  # (K, B, N)
    plain: bool  # no values at the ends of their range: gradients are compared


class Draw:
    """Random choices of one problem."""

    def __init__(self, number: int) -> None:
        self.generator = torch.Generator().manual_seed(number)

    def integer(self, low: int, high: int) -> int:
        """From low to high."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def chance(self, percent: int) -> bool:
        """True in so many cases of a hundred."""
        return self.integer(1, 100) <= percent

    def one_of(self, *values: Any) -> Any:
        """One of them."""
        return values[self.integer(0, len(values) - 1)]

    def normal(self, *shape: int) -> Tensor:
        """float64."""
        return torch.randn(shape, generator=self.generator, dtype=F64)


def draw(number: int) -> Problem:
    """A problem that depends on its number alone."""
    d = Draw(number)
    dtype = d.one_of(torch.float32, torch.float32, torch.bfloat16, torch.float16, F64)
    sets, rows, dim = d.integer(1, 3), d.one_of(1, 2, 5, 17, 40, d.integer(1, 90)), d.one_of(1, 3, 8, 17, 33)
    hostile = d.chance(40)
    features = d.normal(sets, rows, dim)
    normalized = dim > 1 and d.chance(15)
    if d.chance(25):  # duplicates
        features = features[:, torch.randint(0, rows, (rows,), generator=d.generator)]
    if normalized:
        features = torch.nn.functional.normalize(features, dim=-1)
    elif hostile and dtype != torch.float16:
        ends = (1e-280, 1e280) if dtype == F64 else (1e-36, 1e-24, 1e20, 1e36)
        features = features * d.one_of(1.0, 1.0, *ends)
    features = features.to(dtype)
    if dtype == torch.bfloat16:  # Triton 3.7's interpreter reads denormal bfloat16 as other numbers
        features = torch.where(features.abs() < torch.finfo(dtype).tiny, 0, features)
    quality = None
    if normalized or d.chance(70):
        quality = (d.normal(sets, rows).abs() + 0.1) * (d.one_of(1.0, 1e-30, 1e30, 100.0) if hostile else 1.0)
        quality = quality.to(F64 if dtype == F64 else torch.float32)
    k = d.integer(1, 7)
    noise = None
    if d.chance(50):
        uniform = torch.rand((k, sets, rows), generator=d.generator, dtype=F64)
        noise = -(-uniform.clamp(1e-12, 1 - 1e-12).log()).log()
        noise = noise.to(quality.dtype if quality is not None else F64 if dtype == F64 else torch.float32)
        if hostile and d.chance(40):
            noise[torch.rand(noise.shape, generator=d.generator) < d.one_of(0.1, 1.0)] = -INF
    form = d.one_of("mask", "lengths", "plain")
    keep = torch.ones(sets, rows, dtype=torch.bool)
    if form == "mask":
        keep = torch.rand(sets, rows, generator=d.generator) < d.one_of(0.3, 0.8)
    elif form == "lengths":
        keep = torch.arange(rows) < torch.randint(0, rows + 1, (sets, 1), generator=d.generator)
    spoiled = torch.rand(sets, rows, generator=d.generator) < (0.2 if d.chance(40) else 0)
    places = spoiled.nonzero()
    if len(places):
        features = features.clone()
        for b, n in places.tolist():
            if quality is not None and d.chance(50):
                quality[b, n] = d.one_of(NAN, INF, 0.0, -1.0, -INF)
            else:
                features[b, n] = d.one_of(NAN, INF, -INF, 0.0)
    features[~keep] = d.one_of(0.0, NAN, INF)
    if quality is not None:
        quality[~keep] = d.one_of(1.0, NAN, INF, -1.0)
    start = torch.randint(0, rows, (sets,), generator=d.generator) if form != "lengths" and d.chance(15) else None
    gamma = d.one_of(0.0, 0.5, 1.0, -0.7, d.integer(-20, 20) / 10)
    if hostile:
        gamma = d.one_of(gamma, 20.0, -15.0, 60.0)
    tau, scale = d.one_of(1.0, 1.0, 0.5, 3.0), d.one_of(1.0, 0.5)
    if hostile:
        tau, scale = d.one_of(tau, 1e-6, 1e20), d.one_of(scale, 1e-30, 1e30)
    return Problem(
        features, quality, gamma, k, tau, scale, normalized, d.chance(30), start, keep, form, noise, not hostile
    )


def call(p: Problem, backend: str, packed: bool = False) -> tuple[Coreset, list[Tensor]]:
    """The selection, and the gradients to features, quality and gamma."""
    features, quality, noise = p.features, p.quality, p.noise
    options: dict[str, Any] = {}
    if packed:
        lengths = p.keep.sum(1) if p.form == "lengths" else torch.full((len(p.keep),), p.keep.shape[1])
        inside = torch.arange(p.keep.shape[1]) < lengths[:, None]
        options["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        features = features[inside]
        quality = None if quality is None else quality[inside]
        noise = None if noise is None else noise[:, inside]
    elif p.form == "mask":
        options["mask"] = p.keep
    elif p.form == "lengths":
        options["lengths"] = p.keep.sum(1)
    leaves = [features.clone().requires_grad_()]
    if quality is not None:
        leaves.append(quality.clone().requires_grad_())
    gamma = torch.tensor(p.gamma, dtype=F64 if p.features.dtype == F64 else torch.float32, requires_grad=True)
    coreset = coreset_select(
        leaves[0], p.k, *leaves[1:], gamma=gamma, tau=p.tau, distance_scale=p.scale, normalized=p.normalized,
        distinct=p.distinct, start=p.start, noise=noise, backend=backend, **options,
    )  # fmt: skip
    (coreset.features.to(F64) * arriving(coreset.features)).sum().backward()
    return coreset, [leaf.grad for leaf in (*leaves, gamma) if leaf.grad is not None]


def arriving(features: Tensor) -> Tensor:
    """A gradient for the picked rows."""
    return torch.linspace(-1, 1, features.numel(), dtype=F64).view(features.shape)


# --- the oracle ---------------------------------------------------------------------------------------------------


def usable(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that may be picked (B, N), their norms and their qualities, float64."""
    rows = p.features.to(F64)
    largest = rows.abs().amax(-1, keepdim=True)
    norms = (largest * (rows / largest).norm(dim=-1, keepdim=True))[..., 0]
    quality = norms if p.quality is None else p.quality.to(F64)
    limits = torch.finfo(F64 if p.features.dtype == F64 else torch.float32)
    allowed = p.keep & rows.isfinite().all(-1) & (norms >= limits.tiny) & (norms <= limits.max)
    return allowed & quality.isfinite() & (quality > 0), norms, quality


def check_set(p: Problem, b: int, found: Coreset, allowed: Tensor, norms: Tensor, quality: Tensor) -> str:
    """What is wrong with the picks of a set, or ""."""
    accumulate = F64 if p.features.dtype == F64 else torch.float32
    error, limits = GAP_ERROR[accumulate], torch.finfo(accumulate)
    least = 1e-290 if accumulate == F64 else limits.tiny  # a distance may end as 0 below that
    if p.start is not None and not allowed[p.start[b]]:
        allowed = torch.zeros_like(allowed)
    count = min(p.k, int(allowed.sum()))
    if int(found.counts[b]) != count:
        return f"counts {int(found.counts[b])}, expected {count}"
    picks = found.indices[b].tolist()
    if picks[count:] != [-1] * (p.k - count) or found.features[b, count:].any() or found.distances[b, count:].any():
        return f"picks {picks} do not end after {count}"
    rows = torch.where(allowed[:, None], p.features[b].to(F64), 0)
    unit = rows if p.normalized else rows / torch.where(allowed, norms, 1)[:, None]
    safe = torch.where(allowed, quality, 1)
    log_weight = math.log(p.scale) + p.gamma * safe.log()
    top = float(torch.where(allowed, log_weight, -INF).amax()) if count else 0.0
    weight = (log_weight - top).exp()  # relative to the set's largest
    relative = 1e-5 + 4e-7 * (abs(p.gamma) * safe.log2().abs() + 1) if accumulate == torch.float32 else 1e-9
    nearest, open_to = torch.full_like(weight, INF), allowed.clone()
    for step in range(count):
        pick = picks[step]
        if not 0 <= pick < len(allowed) or not open_to[pick]:
            return f"pick {step} is row {pick}, which may not be picked"
        noise = torch.zeros_like(weight) if p.noise is None else p.noise[step, b].to(F64)
        if step == 0:
            logits, slack = safe, 1e-6 * safe
        else:
            logits = nearest * weight
            slack = weight * error + relative * logits + limits.tiny * 1e12  # below that, weights count as 0
            if p.noise is not None and top < 0:  # in units of 1
                logits, slack = logits * math.exp(top), slack * math.exp(top) + limits.tiny
            elif top > 0:  # in units of the largest weight
                noise = torch.where(noise.isfinite(), noise * math.exp(-min(top, 700)), noise)
        if step or p.start is None:
            scores = torch.where(open_to, logits + noise, -INF)
            scores = torch.where(scores.isnan(), INF, scores)
            reach = scores + slack + 1e-6 * noise.abs().nan_to_num(0, 0, 0)
            lower = scores - slack - 1e-6 * noise.abs().nan_to_num(0, 0, 0)
            best = float(lower[open_to].amax())
            if best == -INF:
                if pick != int(open_to.nonzero()[0]):
                    return f"pick {step} is row {pick}, not the lowest where no score is finite"
            elif float(reach[pick]) < best:
                return f"pick {step} is row {pick} of score {float(scores[pick]):g}, the best is {best:g}"
            same = open_to & (p.features[b] == p.features[b, pick]).all(-1) & (safe == safe[pick])
            same &= noise == noise[pick]
            if int(same.nonzero()[0]) != pick:
                return f"pick {step} is row {pick}, but row {int(same.nonzero()[0])} is equal to it"
        elif pick != int(p.start[b]):
            return f"the first pick is row {pick}, the given one {int(p.start[b])}"
        reported = float(found.distances[b, step])
        if step == 0:
            if reported != INF:
                return f"the first distance is {reported}"
        else:
            units = 0.0 if p.noise is not None and top < 0 else top
            distance, room = (_times(float(values[pick]), units) for values in (logits, slack))
            if abs(reported - min(distance, limits.max)) > 2 * min(room, limits.max) + least:
                return f"distance {step} is {reported:g}, expected {distance:g}"
        if not torch.equal(found.features[b, step], p.features[b, pick]):
            return f"the features of pick {step} are not those of row {pick}"
        gap = (1 - unit @ unit[pick]).clamp(min=0)
        gap[(rows == rows[pick]).all(-1)] = 0
        nearest = torch.minimum(nearest, gap)
        if p.distinct:
            open_to[pick] = False
    return ""


def _times(value: float, exponent: float) -> float:
    """value e^exponent."""
    if value <= 0:
        return 0.0
    log = math.log(value) + exponent
    return math.exp(log) if log < 709 else INF


def gradients(p: Problem, found: Coreset, allowed: Tensor) -> list[Tensor]:
    """Straight-through gradients by autograd, along the picks that were found."""
    x = torch.where(allowed[..., None], p.features.to(F64), 1).requires_grad_()
    norms = x.norm(dim=-1)
    quality = norms if p.quality is None else torch.where(allowed, p.quality.to(F64), 1).requires_grad_()
    gamma = torch.tensor(p.gamma, dtype=F64, requires_grad=True)
    unit = x if p.normalized else x / norms[..., None]
    each = torch.arange(len(x))
    logits, nearest, open_to, core = quality, None, allowed.clone(), []
    for step in range(p.k):
        pick = found.indices[:, step].clamp(min=0)
        there = (step < found.counts)[:, None]
        scores = logits if p.noise is None else logits + p.noise[step].to(F64)
        soft = torch.where(open_to, scores / p.tau, -INF).nan_to_num(neginf=-1e300).softmax(-1)
        soft = torch.where(open_to, soft, 0)
        hard = torch.nn.functional.one_hot(pick, x.shape[1]).to(F64)
        chosen = hard if step == 0 and p.start is not None else hard - soft.detach() + soft
        row = (chosen[:, None] @ x)[:, 0]
        core.append(torch.where(there, row, 0))
        direction = row if p.normalized else row / row.norm(dim=-1, keepdim=True)
        distance = p.scale * quality**gamma * (1 - (unit @ direction[..., None])[..., 0])
        nearest = distance if nearest is None else torch.minimum(nearest, distance)
        logits = nearest
        if p.distinct:
            open_to = open_to.clone()
            open_to[each, pick] = False
    total = (torch.stack(core, 1) * arriving(found.features)).sum()
    leaves = [x, *([] if p.quality is None else [quality]), gamma]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]


def check(number: int, backend: str) -> str:
    """What is wrong with a backend's answer to a problem, or ""."""
    p = draw(number)
    if backend == "triton" and p.features.dtype == F64:
        return ""
    allowed, norms, quality = usable(p)
    found, grads = call(p, backend)
    for b in range(len(p.keep)):
        if wrong := check_set(p, b, found, allowed[b], norms[b], quality[b]):
            return f"set {b}: {wrong}"
    for grad in grads[:-1]:
        if not torch.where(allowed.view(*allowed.shape, *[1] * (grad.ndim - 2)), 0, grad).eq(0).all():
            return "a row that may not be picked has a gradient"
    if p.plain:
        if not all(grad.isfinite().all() for grad in grads):
            return "a gradient is not finite"
        if p.tau >= 0.5 and p.features.dtype in (torch.float32, F64) and not _has_equal_rows(p):
            tolerance = 2e-3 if p.features.dtype == torch.float32 else 1e-7
            for grad, right in zip(grads, gradients(p, found, allowed), strict=True):
                if grad.ndim:
                    right = torch.where(allowed.view(*allowed.shape, *[1] * (grad.ndim - 2)), right, 0)
                size = float(right.abs().max()) if right.numel() else 0.0
                if float((grad - right).abs().max()) > tolerance * (size + 1e-2):
                    return f"a gradient is off by {float((grad - right).abs().max()):g} of {size:g}"
    if p.form != "mask" and p.start is None:
        twin, _ = call(p, backend, packed=True)
        if not torch.equal(twin.indices, found.indices):
            return "packed sets give other picks than padded ones"
    if backend == "cpp":
        threads = torch.get_num_threads()
        torch.set_num_threads(3 - min(threads, 2))
        try:
            again, grads_again = call(p, backend)
        finally:
            torch.set_num_threads(threads)
        results = zip((*found, *grads), (*again, *grads_again), strict=True)
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in results):
            return "another number of threads gives other bits"
    return ""


def _has_equal_rows(p: Problem) -> bool:
    """Between equal rows the oracle's running minimum ties but for rounding, and so do the gradient's shares."""
    return any(len(rows.unique(dim=0)) < len(rows) for rows in p.features.nan_to_num())


def main(argv: list[str] | None = None) -> int:
    """Print the findings and how much was tried."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checks.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="where the numbers of the problems begin")
    parser.add_argument("--backends", nargs="+", default=["torch", "cpp", "triton"])
    parser.add_argument("--only", type=int, help="one problem, by its number")
    args = parser.parse_args(argv)
    tried: Counter[str] = Counter()
    findings = 0
    deadline = time.monotonic() + 60 * args.minutes
    number = args.seed * 1_000_000_000 if args.only is None else args.only
    while time.monotonic() < deadline or args.only is not None:
        for backend in args.backends:
            try:
                wrong = check(number, backend)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            tried[backend] += 1
            if wrong:
                findings += 1
                print(f"{backend}, problem {number}: {wrong}", flush=True)
        if args.only is not None:
            break
        number += 1
    print(f"{findings} findings in {', '.join(f'{n} problems on {backend}' for backend, n in tried.items())}")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
