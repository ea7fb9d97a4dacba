"""What is measured: sets of rows, the implementations that select from them, and the bytes that each must move."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import CACHE_BYTES, Contender
from fcn_kernels import coreset_select
from fcn_kernels.backends import runs_on
from fcn_kernels.selection.cpp import launch as cpp
from fcn_kernels.selection.problem import Problem
from fcn_kernels.sets import GROUP_BYTES, accumulator
from reference.listing import coreset_listing

FORWARD, BOTH = "forward", "forward + backward"
"""Inference, argmax; and a training step, with noise drawn for each call and gradients to features, quality, gamma."""

FUSED, EAGER, COMPILED, LOOP = "fused", "eager listing", "compiled listing", "eager listing, set by set"

IJBC_SETS, IJBC_ROWS = 23_124, 469_375
LOOPED_SETS = 256  # of packed ones, drawn at random, are what the listing is timed on, and its time scaled to all


class Case(NamedTuple):
    """Sets of one shape. ``rows`` is of each set; None: ``total`` rows in packed sets of unequal lengths."""

    sets: int
    rows: int | None
    dim: int
    k: int
    dtype: torch.dtype
    total: int = 0

    @property
    def all_rows(self) -> int:
        """R, the rows of all sets."""
        return self.total if self.rows is None else self.sets * self.rows

    @property
    def row_bytes(self) -> int:
        """Bytes of all the feature rows."""
        return self.all_rows * self.dim * self.dtype.itemsize

    @property
    def facts(self) -> dict[str, Any]:
        """The case as a result row says it."""
        name = str(self.dtype).removeprefix("torch.")
        return {"sets": self.sets, "rows": self.rows or "packed", "all_rows": self.all_rows, "dim": self.dim,
                "k": self.k, "dtype": name}  # fmt: skip

    def __str__(self) -> str:
        rows = f"packed {self.total}" if self.rows is None else self.rows
        return f"B={self.sets} N={rows} C={self.dim} K={self.k} {self.facts['dtype']}"


class Inputs(NamedTuple):
    """What a call takes, and the gradient that comes back to it."""

    features: Tensor  # (B, N, C) or (T, C)
    quality: Tensor  # (R,) or (B, N), float32
    gamma: Tensor  # 0-d
    grad: Tensor  # (B, K, C)
    cu_seqlens: Tensor | None
    lengths: tuple[int, ...]  # of packed sets

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """What gradients go to."""
        return self.features, self.quality, self.gamma


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Random rows and qualities, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    packed = case.rows is None
    shape = (case.total,) if packed else (case.sets, case.rows)

    def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    features = random(*shape, case.dim, dtype=case.dtype)
    lengths = template_lengths(case.sets, case.total, seed) if packed else ()
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32) if packed else None
    return Inputs(
        features=features.requires_grad_(),
        quality=random(*shape).abs().add_(0.5).requires_grad_(),
        gamma=torch.tensor(0.5, device=device, requires_grad=True),
        grad=random(case.sets, case.k, case.dim, dtype=case.dtype),
        cu_seqlens=offsets,
        lengths=lengths,
    )


def template_lengths(sets: int, total: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths of face templates: most of a few images, some of hundreds; every set has one row at least."""
    weights = torch.randn(sets, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(1.2).exp()
    lengths = 1 + (weights / weights.sum() * (total - sets)).long()
    lengths[: total - int(lengths.sum())] += 1
    return tuple(lengths.tolist())


def rotated(case: Case, device: torch.device) -> list[Inputs]:
    """As many inputs as it takes to be twice the size of the last-level cache."""
    copies = 1 + 2 * CACHE_BYTES // max(1, case.row_bytes)
    if case.row_bytes > CACHE_BYTES:
        copies = 1
    return [make_inputs(case, device, seed) for seed in range(min(copies, 64))]


def cut(pool: Inputs, case: Case) -> list[Inputs]:
    """Sets of a length, cut from those of a greater one."""
    features, quality = pool.features.detach().flatten(0, 1), pool.quality.detach().flatten()
    pieces = zip(features.split(case.all_rows), quality.split(case.all_rows), strict=True)
    return [
        pool._replace(
            features=rows.unflatten(0, (case.sets, -1)).requires_grad_(),
            quality=of_rows.unflatten(0, (case.sets, -1)).requires_grad_(),
        )
        for rows, of_rows in pieces
        if len(rows) == case.all_rows
    ]


Select = Callable[[Inputs, bool], Tensor]
"""Rows (B, K, C) picked from the inputs, with noise or without."""


def fused(k: int) -> Select:
    """This package, on the backend that the device gets by default."""

    def select(i: Inputs, sample: bool) -> Tensor:
        return coreset_select(i.features, k, i.quality, i.gamma, sample=sample, cu_seqlens=i.cu_seqlens).features

    return select


def listing(k: int, function: Callable[..., Any] = coreset_listing) -> Select:
    """The paper's listing. Its products want the quality in the rows' dtype."""

    def select(i: Inputs, sample: bool) -> Tensor:
        noise = gumbel(k, i.features) if sample else None
        picked: Tensor = function(i.features, i.quality.to(i.features.dtype), k, i.gamma, noise=noise).features
        return picked

    return select


def compiled(k: int) -> Select:
    """The listing under torch.compile, for one shape. Without the reset, PyTorch stops compiling at the ninth."""
    torch.compiler.reset()
    return listing(k, torch.compile(coreset_listing, fullgraph=True, dynamic=False))


def gumbel(k: int, features: Tensor) -> Tensor:
    """(K, B, N) noise, drawn as a user of the listing would."""
    uniform = torch.rand(k, *features.shape[:-1], device=features.device)
    return uniform.clamp_(min=1e-20).log().neg_().log().neg_().to(features.dtype)


def contender(select: Select, inputs: list[Inputs], work: str) -> Contender:
    """One call of ``select``, in inference or in a training step."""

    def forward(turn: int) -> object:
        with torch.no_grad():
            return select(inputs[turn % len(inputs)], False)

    def both(turn: int) -> object:
        i = inputs[turn % len(inputs)]
        picked = select(i, True)
        return torch.autograd.grad(picked, i.leaves, i.grad[:, : picked.shape[1]], allow_unused=True)

    return forward if work == FORWARD else both


def looped(k: int, i: Inputs, work: str) -> Contender:
    """The listing has no packed form: a sample of the sets, cut out beforehand, one after another."""
    order = torch.randperm(len(i.lengths), generator=torch.Generator().manual_seed(0)).tolist()
    ends = torch.tensor([0, *i.lengths]).cumsum(0).tolist()
    calls = []
    for number in order[:LOOPED_SETS]:
        cut = slice(ends[number], ends[number + 1])
        one = i._replace(
            features=i.features.detach()[None, cut].clone().requires_grad_(),
            quality=i.quality.detach()[None, cut].clone().requires_grad_(),
            grad=i.grad[number, None],
            cu_seqlens=None,
        )
        calls.append(contender(listing(min(k, i.lengths[number])), [one], work))
    return lambda turn: [call(turn) for call in calls]


def implementations(
    names: tuple[str, ...], case: Case, work: str, device: torch.device, inputs: list[Inputs] | None = None
) -> tuple[dict[str, Contender], list[Inputs]]:
    """The named implementations over the same inputs."""
    inputs = inputs or rotated(case, device)
    make = {
        FUSED: lambda: contender(fused(case.k), inputs, work),
        EAGER: lambda: contender(listing(case.k), inputs, work),
        COMPILED: lambda: contender(compiled(case.k), inputs, work),
        LOOP: lambda: looped(case.k, inputs[0], work),
    }
    return {name: make[name]() for name in names}, inputs


def problem(case: Case, i: Inputs) -> Problem:
    """The call as the launcher sees it."""
    return Problem(i.features, i.quality, i.gamma, cu_seqlens=i.cu_seqlens, k=case.k)


def least_bytes(case: Case, work: str) -> int:
    """Bytes that no implementation goes below: the rows read once a pass, and their gradient written once."""
    return case.row_bytes * (1 if work == FORWARD else 3)


def tiers(case: Case, i: Inputs) -> tuple[str, str]:
    """The tiers of the forward and the backward pass."""
    if i.features.device.type == "cpu":
        name = runs_on("cpu", case.dtype, cpp.unavailable)
        return name, name
    from fcn_kernels.selection.kernels import launch

    forward, backward = (plans[0] for plans in launch.plans(problem(case, i)))
    return forward.name, backward.name


def moved_bytes(case: Case, i: Inputs, work: str) -> int:
    """Bytes of feature rows that the fused path asks for by its plan, and of their gradient.

    Per row there are a few numbers more (quality, norm, gaps), one or two percent at C = 512. Rows that a pass asks
    for again may come from L2.
    """
    if i.features.device.type == "cpu":
        group = GROUP_BYTES // accumulator(case.dtype).itemsize * case.dtype.itemsize
        longest = max(i.lengths) if i.lengths else case.all_rows // max(1, case.sets)
        held = longest * case.dim * case.dtype.itemsize <= group
        if tiers(case, i)[0] == "cpp":  # in inference few rows meet a later pick than the first
            reads = (1, 1) if held or work == FORWARD else (max(1, case.k - 1), case.k)
        else:  # norms and K - 1 products; a product and a sum each step
            reads = (1, 1) if held else (case.k, 2 * case.k)
        return case.row_bytes * (reads[0] if work == FORWARD else sum(reads) + 1)
    # the first pick is made from the given qualities, before rows are seen; benchmarks.checks.reads counts the same
    reads = max(1, case.k - 1) + (0 if work == FORWARD else case.k + 1)
    return case.row_bytes * reads


class CountedBytes(TorchDispatchMode):
    """Bytes that PyTorch's operations read and write, one after another, views aside: what eager mode moves."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            read = () if func.__name__.partition(".")[0].endswith("_like") else (args, kwargs)
            self.bytes += sum(_bytes(t) for t in tree_leaves((read, out)) if isinstance(t, Tensor))
        return out


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())  # one may be expanded


def counted_bytes(function: Callable[[], object]) -> int:
    """Run once, and count."""
    count = CountedBytes()
    with count:
        function()
    return count.bytes
