"""What a call should give, and how far from it a backend may be.

The reference listing knows dense sets of rows that can all be picked. Here it runs on just those rows of each set, so
that what the options leave out is absent from the expected answer by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from problems import Case, positions
from torch import Tensor

from fcn_kernels import Coreset, coreset_select
from reference.listing import coreset_listing

Select = Callable[..., Coreset]
EPS = torch.finfo(torch.float32).eps


class Outcome(NamedTuple):
    """A call's results and the gradients that came of them."""

    coreset: Coreset
    features: Tensor
    gamma: Tensor
    quality: Tensor | None

    def gradients(self) -> dict[str, Tensor]:
        named = {"features": self.features, "gamma": self.gamma, "quality": self.quality}
        return {name: grad for name, grad in named.items() if grad is not None}

    def same_bits(self, other: Outcome) -> bool:
        pairs = zip(
            (*self.coreset, *self.gradients().values()), (*other.coreset, *other.gradients().values()), strict=True
        )
        return all(torch.equal(a, b) for a, b in pairs)


def select_on(backend: str | None) -> Select:
    """coreset_select on one backend; None: the one that the device gets."""

    def call(*args: Any, **options: Any) -> Coreset:
        return coreset_select(*args, backend=backend, **options)

    return call


def can_be_picked(case: Case, members: Tensor) -> Tensor:
    """Of rows ``members`` those that are finite, have a direction if that is needed, and a finite positive quality."""
    rows, quality = flat_rows(case)[members], quality_of(case, members)
    good = rows.isfinite().all(-1) & quality.isfinite() & (quality > 0)
    if not is_euclidean(case):
        good &= (rows != 0).any(-1)
    if (given := case.options.get("min_distances")) is not None:
        good &= given.reshape(-1)[members] > -torch.inf
    return members[good]


def is_euclidean(case: Case) -> bool:
    return bool(case.options.get("metric") == "sqeuclidean")


def flat_rows(case: Case) -> Tensor:
    return case.features.reshape(-1, case.features.shape[-1])


def quality_of(case: Case, members: Tensor) -> Tensor:
    """Of rows ``members``, given or not."""
    if case.quality is not None:
        return case.quality.reshape(-1)[members]
    rows = flat_rows(case)[members]
    return torch.ones_like(rows[:, 0]) if is_euclidean(case) else rows.norm(dim=-1)


def listing(
    features: Tensor, k: int, quality: Tensor | None = None, gamma: Tensor | float = 0.0, **options: Any
) -> Coreset:
    """The reference for every option: Listing 1 on the rows of each set that can be picked.

    Differentiable, in whatever dtype the arguments have. Noise has to be given.
    """
    case = Case(features, k, quality, torch.as_tensor(gamma), options)
    dim, device = features.shape[-1], features.device
    rows = flat_rows(case)
    noise, start, given = options.get("noise"), options.get("start"), options.get("min_distances")
    names = ("tau", "distance_scale", "normalized", "distinct", "metric")
    passed = {name: options[name] for name in names if name in options}

    results = []
    for b, (first, inside) in enumerate(positions(case)):
        members = can_be_picked(case, inside.to(device))
        begin = None
        if start is not None:
            begin = (members == first + int(start if isinstance(start, int) else start[b])).nonzero()[:, 0]
            members = members if len(begin) else members[:0]
        count = min(k, len(members))
        picked = rows[:0].sum(0).expand(k, dim)  # zeros that depend on the features
        distances = features.new_zeros(k)
        indices = torch.full((k,), -1, device=device)
        if count:
            found = coreset_listing(
                rows[members][None],
                quality_of(case, members)[None],
                count,
                gamma,
                noise=None if noise is None else noise.reshape(k, -1)[:count, None, members],
                start=begin,
                min_distances=None if given is None else given.reshape(-1)[None, members],
                **passed,
            )
            picked = torch.cat([found.features[0], picked[count:]])
            indices[:count] = members[found.indices[0]] - first
            distances[:count] = found.distances[0]
        results.append((picked, indices, torch.tensor(count, device=device), distances))
    return Coreset(*(torch.stack(parts) for parts in zip(*results, strict=True)))


def decided(case: Case, expected: Coreset) -> Tensor:
    """(B,) bool: sets in which no pick of a float64 outcome hangs on what float32 arithmetic rounds away.

    The best noisy logit has to lead the next by 2^-16 of its size, 128 roundings in float32: more than sums over the
    few dozen columns used here lose, and more than noise that is computed in float32 is off.
    """
    case = case.cast(torch.float64).to(torch.device("cpu"))
    normalized, scale = case.options.get("normalized", False), case.options.get("distance_scale", 1.0)
    rows = flat_rows(case)
    noise, given = case.options.get("noise"), case.options.get("min_distances")
    sure = []
    for b, (first, inside) in enumerate(positions(case)):
        members = can_be_picked(case, inside)
        unit = rows[members] if normalized else torch.nn.functional.normalize(rows[members], dim=-1)
        logits = quality_of(case, members)
        weight = scale * logits**case.gamma
        lead, nearest = torch.inf, torch.tensor(torch.inf)
        if given is not None:
            logits = nearest = given.reshape(-1)[members].double()
        taken = torch.zeros(len(members), dtype=torch.bool)
        for step in range(int(expected.counts[b])):
            noisy = logits if noise is None else logits + noise.reshape(case.k, -1)[step, members]
            at = int((members == first + int(expected.indices[b, step])).nonzero())
            if case.options.get("distinct"):
                noisy = noisy.masked_fill(taken, -torch.inf)
            best = noisy.topk(min(2, len(noisy))).values
            if len(best) == 2 and not (step == 0 and "start" in case.options):
                lead = min(lead, float((best[0] - best[1]) / (1 + best[0].abs())))
            taken[at] = True
            gap = (rows[members] - rows[members[at]]).square().sum(-1) if is_euclidean(case) else 1 - unit @ unit[at]
            logits = nearest = torch.minimum(weight * gap, nearest)
        sure.append(lead > 2.0**-16)
    return torch.tensor(sure)


def outcome(select: Select, case: Case, weights: Tensor, **extra: Any) -> Outcome:
    """Call, and take the gradients of sum(weights * picked rows)."""
    features, gamma = case.features.detach().requires_grad_(), case.gamma.detach().requires_grad_()
    quality = None if case.quality is None else case.quality.detach().requires_grad_()
    coreset = select(features, case.k, quality, gamma, **case.options, **extra)
    leaves = [features, gamma] if quality is None else [features, gamma, quality]
    loss = (coreset.features * weights.to(coreset.features)).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return Outcome(Coreset(*(t.detach() for t in coreset)), *grads, *([None] * (3 - len(grads))))


def weights_for(case: Case, seed: int = 1) -> Tensor:
    """Random gradients (B, K, C) for the picked rows, representable in the case's dtype."""
    shape = (len(list(positions(case))), case.k, case.features.shape[-1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(case.features)


def assert_equal_in_float64(case: Case) -> None:
    """The device's backend gives what the reference gives; gradients within 1e-10 of their size."""
    weights = weights_for(case)
    expected, got = outcome(listing, case, weights), outcome(coreset_select, case, weights)
    assert torch.equal(got.coreset.indices, expected.coreset.indices)
    assert torch.equal(got.coreset.counts, expected.coreset.counts)
    # The reference's one-hot products round, as hard - soft + soft is 1 only within a bit.
    torch.testing.assert_close(got.coreset.features, expected.coreset.features, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(got.coreset.distances, expected.coreset.distances, rtol=1e-12, atol=1e-12)
    theirs = expected.gradients()
    for name, grad in got.gradients().items():
        size, error = largest(theirs[name]), largest(grad - theirs[name])
        # A gradient that cancels keeps the rounding of its terms, which are about 1 / tau in size.
        assert error <= 1e-10 * max(size, 1e-2), f"gradient of {name}: off by {error:.1e}, size {size:.1e}"


def largest(values: Tensor) -> float:
    """max |value|, 0 for none."""
    return float(values.abs().max()) if values.numel() else 0.0


def assert_as_accurate_as_eager(case: Case, backend: str | None = None) -> int:
    """A backend picks what the float64 listing picks, and loses at most twice what the listing loses in its dtype.

    Beside that, it may lose the rounding of the result to its dtype, and four float32 roundings of the largest logit,
    which 1 / tau makes larger. Picks are compared where float32 can decide them, gradients where the listing in the
    case's own dtype also picks the same. Returns how many sets those were.
    """
    exact_case = case.cast(torch.float64)
    weights = weights_for(case)
    expected = listing_of(exact_case)
    sure = decided(case, expected).to(weights.device)
    with torch.no_grad():
        got = select_on(backend)(case.features, case.k, case.quality, case.gamma, **case.options)
    assert torch.equal(got.counts, expected.counts)
    assert torch.equal(got.indices[sure], expected.indices[sure])
    assert torch.equal(got.features[sure], expected.features[sure].to(case.features.dtype))
    # A distance is a cosine, 2 s q^gamma at most, summed over C columns in float32.
    quality = pickable_quality(exact_case)
    largest_quality = largest(quality)
    widest = 4 * largest(flat_rows(exact_case).nan_to_num(0, 0, 0).square().sum(-1)) if is_euclidean(case) else 2
    reach = widest * case.options.get("distance_scale", 1.0) * largest(quality**exact_case.gamma)
    torch.testing.assert_close(
        got.distances[sure].double(), expected.distances[sure], rtol=0, atol=16 * EPS * max(reach, 1.0)
    )

    same = sure & (listing_of(case).indices == expected.indices).all(-1)
    weights = weights * same[:, None, None]
    exact = outcome(listing, exact_case, weights).gradients()
    eager = outcome(listing, case, weights).gradients()
    size = max(float(grad.norm()) for grad in exact.values())
    rounding = 4 * EPS * max(reach, largest_quality, 1.0) / case.options.get("tau", 1.0)
    trained = outcome(select_on(backend), case, weights)
    assert all(torch.equal(a, b) for a, b in zip(trained.coreset, got, strict=True))
    for name, grad in trained.gradients().items():
        loss, eager_loss = (float((g.double() - exact[name]).norm()) for g in (grad, eager[name]))
        stored = torch.finfo(grad.dtype).eps * float(exact[name].norm())
        allowed = 2 * eager_loss + stored + rounding * size
        assert loss <= allowed, f"gradient of {name}: loses {loss:.2e}, eager {eager_loss:.2e}, allowed {allowed:.2e}"
    return int(same.sum())


def listing_of(case: Case) -> Coreset:
    with torch.no_grad():
        return listing(case.features, case.k, case.quality, case.gamma, **case.options)


def pickable_quality(case: Case) -> Tensor:
    """The qualities of the rows that can be picked."""
    return quality_of(case, can_be_picked(case, torch.arange(len(flat_rows(case)))))


# Options under which the picks' gradient is checked against finite differences.
SMOOTH: list[dict[str, Any]] = [
    {},
    {"noise": None},
    {"gamma": -0.7, "tau": 0.4, "distance_scale": 0.5},
    {"quality": "norms", "gamma": 1.6},
    {"unit": True},
    {"metric": "sqeuclidean"},
    {"metric": "sqeuclidean", "quality": "norms", "gamma": -0.7, "tau": 0.4},
]


def smooth_counterpart(case: Case) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A function of one set (N, C), (), (N,) -> (K, C) whose true gradient is the straight-through one, and leaves.

    At the leaves, the picks, the softmax weights y0 and the rows x0 are frozen. Around them,
    core_k = x[i_k] + (y_k - y0_k) @ x0: the picked row, which moves with that row and with the softmax.
    """
    frozen: list[tuple[int, Tensor, Tensor]] = []
    noise, tau = case.options.get("noise"), case.options.get("tau", 1.0)
    normalized, scale = case.options.get("normalized", False), case.options.get("distance_scale", 1.0)

    euclidean = is_euclidean(case)

    def core(features: Tensor, gamma: Tensor, quality: Tensor | None = None) -> Tensor:
        logits = quality if quality is not None else torch.ones(len(features)) if euclidean else features.norm(dim=-1)
        weight = scale * logits**gamma
        unit = features if normalized else features / features.norm(dim=-1, keepdim=True)
        rows: list[Tensor] = []
        nearest = torch.tensor(torch.inf)
        for step in range(case.k):
            noisy = logits if noise is None else logits + noise[step, 0]
            if case.options.get("distinct"):
                taken = torch.tensor([at for at, *_ in frozen[:step]], dtype=torch.long)
                noisy = noisy.index_fill(0, taken, -torch.inf)
            soft = torch.softmax(noisy / tau, dim=-1)
            if len(frozen) == step:
                frozen.append((int(noisy.argmax()), soft.detach(), features.detach().clone()))
            at, soft0, rows0 = frozen[step]
            rows.append(features[at] + (soft - soft0) @ rows0)
            direction = rows[-1] if normalized else rows[-1] / rows[-1].norm()
            gap = (features - rows[-1]).square().sum(-1) if euclidean else 1 - unit @ direction
            logits = nearest = torch.minimum(weight * gap, nearest)
        return torch.stack(rows)

    leaves = [case.features[0], case.gamma] + ([] if case.quality is None else [case.quality[0]])
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.no_grad():
        core(*leaves)
    return core, tuple(leaves)


class WithGradientOf(torch.autograd.Function):
    """The value of one function with the gradient of another, for gradcheck to compare the two."""

    @staticmethod
    def forward(ctx: Any, value: Any, gradient: Any, *args: Tensor) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(*args)
        return value(*args).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            args = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            out = ctx.gradient(*args)
        return None, None, *torch.autograd.grad(out, args, grad)
