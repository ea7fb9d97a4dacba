"""The registered operators ``fcn_kernels::select`` and ``fcn_kernels::select_backward``.

They carry what PyTorch wants to know of an operation: shapes for tracing, a gradient, a FLOP count, and what happens
under vmap, in forward mode and in a second derivative. What runs is the backend that the public function named. The
schemas are made from the fields of :class:`Problem`, :class:`Saved` and :class:`Gradients`.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fcn_kernels.backends import are_plain, has_tangent, is_plain_call, runs_on
from fcn_kernels.schema import schema, tensors
from fcn_kernels.selection import torch_backend
from fcn_kernels.selection.anchors import anchor_distances
from fcn_kernels.selection.cpp import launch as cpp
from fcn_kernels.selection.problem import Gradients, Problem, Saved, Selected
from fcn_kernels.sets import accumulator
from fcn_kernels.transforms import one_by_one

_FIELDS = len(Problem._fields)
_TENSORS = tensors(Problem)

# A Library, not custom_op: the latter's wrappers cost more on the host than a call on small sets takes.
_library = torch.library.Library("fcn_kernels", "DEF")
_library.define(
    f"select({schema(Problem)}, bool keep, str backend) -> "
    "(Tensor features, Tensor distances, Tensor indices, Tensor counts, Tensor[] state, Tensor[] kept)"
)
_library.define(
    f"select_backward({schema(Problem)}, Tensor grad, {schema(Saved)}, str backend) -> "
    "(Tensor features, Tensor quality, Tensor gamma)"
)
_library.define(f"anchor_distances({schema(Problem)}, Tensor anchors, Tensor? offsets) -> Tensor")
_run, _run_backward = torch.ops.fcn_kernels.select.default, torch.ops.fcn_kernels.select_backward.default
_run_anchors = torch.ops.fcn_kernels.anchor_distances.default
_below_autograd = torch._C._AutoDispatchBelowAutograd


def select(problem: Problem, backend: str) -> tuple[Any, ...]:
    """Run the forward operator: features, distances, indices and counts, and what else it gives."""
    leaves = problem[:3]
    graded = asks_for_gradient(*leaves)
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return _run(*problem, graded, backend)  # type: ignore[no-any-return]
    if torch._C._are_functorch_transforms_active() or has_tangent(*leaves):
        return _Select.apply(backend, *problem)  # type: ignore[no-any-return]
    # Skip the dispatcher's autograd layer where nothing needs to intercept the call; it costs 1/6 of a tiny call.
    if graded:
        return _apply(backend, *problem)  # type: ignore[no-any-return]
    return _forward(problem, False, backend)


def state_of(out: tuple[Any, ...]) -> Sequence[Tensor]:
    """Least distances and nearest picks among what :func:`select` gave, if the problem asked for them."""
    return out[4:6] if isinstance(out[4], Tensor) else out[4]


def _forward(p: Problem, keep: bool, backend: str) -> tuple[Any, ...]:
    """The forward operator below autograd. Where nobody listens it is spared the dispatcher, a quarter of a tiny
    call."""
    if is_plain_call() and are_plain(p[:_TENSORS]):  # type: ignore[arg-type]
        return _backend(backend, p).forward(p, keep)  # type: ignore[no-any-return]
    with _below_autograd():
        return _run(*p, keep, backend)  # type: ignore[no-any-return]


def _backward(p: Problem, grad: Tensor, saved: Saved, backend: str) -> tuple[Tensor, ...]:
    """As :func:`_forward`. What was saved is plain where the inputs are."""
    if is_plain_call() and are_plain((*p[:_TENSORS], grad)):  # type: ignore[arg-type]
        return _backend(backend, p).backward(p, grad, saved)  # type: ignore[no-any-return]
    with _below_autograd():
        return _run_backward(*p, grad, *saved, backend)  # type: ignore[no-any-return]


def asks_for_gradient(features: Tensor, quality: Tensor | None, gamma: Tensor) -> bool:
    """Whether a call's backward pass may be wanted."""
    return torch.is_grad_enabled() and (
        features.requires_grad or gamma.requires_grad or (quality is not None and quality.requires_grad)
    )


def _backend(name: str, p: Problem) -> ModuleType:
    if name == "triton":
        from fcn_kernels.selection.kernels import launch  # triton is imported only where it is used

        return launch
    return cpp if runs_on(name, p.features.dtype, cpp.unavailable) == "cpp" else torch_backend


def _select(*args: Any) -> Selected:
    *fields, keep, backend = args
    p = Problem(*fields)
    return _backend(backend, p).forward(p, keep)  # type: ignore[no-any-return]


def _select_backward(*args: Any) -> Gradients:
    p, grad, saved, backend = _backward_call(args)
    return _backend(backend, p).backward(p, grad, saved)  # type: ignore[no-any-return]


def _backward_call(args: tuple[Any, ...]) -> tuple[Problem, Tensor, Saved, str]:
    """Of an operator's arguments."""
    grad, *saved, backend = args[_FIELDS:]
    return Problem(*args[:_FIELDS]), grad, Saved(*saved), backend


_library.impl("select", _select, "CompositeExplicitAutograd")
_library.impl("select_backward", _select_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fcn_kernels::select", lib=_library)
def _select_fake(*args: Any) -> Selected:
    *fields, keep, backend = args
    return Selected.empty(Problem(*fields), keep, normalizers=backend == "triton")


@torch.library.register_fake("fcn_kernels::select_backward", lib=_library)
def _select_backward_fake(*args: Any) -> Gradients:
    p, _, saved, _ = _backward_call(args)
    new = saved.norms.new_empty
    return Gradients(p.features.new_empty(p.features.shape), new(p.quality_shape), new(()))


@torch.library.register_fake("fcn_kernels::anchor_distances", lib=_library)
def _anchor_distances_fake(*args: Any) -> Tensor:
    p = Problem(*args[:_FIELDS])
    return p.features.new_empty(p.rows, dtype=accumulator(p.features.dtype))


def _anchor_distances(*args: Any) -> Tensor:
    *fields, anchors, offsets = args
    return anchor_distances(Problem(*fields), anchors, offsets)


def _anchor_distances_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    (distances,), (dim,) = one_by_one(lambda *each: (_run_anchors(*each),), info.batch_size, in_dims, args)
    return distances, dim


_library.impl("anchor_distances", _anchor_distances, "CompositeExplicitAutograd")
_library.impl("anchor_distances", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_vmap("fcn_kernels::anchor_distances", _anchor_distances_vmap, lib=_library)


def least_distances(problem: Problem, anchors: Tensor, offsets: Tensor | None) -> Tensor:
    """Run the operator that makes distances to anchors, (R,)."""
    return _run_anchors(*problem, anchors, offsets)  # type: ignore[no-any-return]


class _Select(torch.autograd.Function):
    """The operator with its gradient. torch.library.register_autograd does the same and looks the schema's arguments
    up one by one, which costs each call more than a hundred microseconds."""

    @staticmethod
    def forward(backend: str, *fields: Any) -> tuple[Tensor, ...]:
        *found, state, kept = _forward(Problem(*fields), True, backend)
        return (*found, *state, *kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        backend, *fields = inputs
        saved = output[2:4] + output[-3:]  # with what was kept
        ctx.save_for_backward(*fields[:_TENSORS], *saved)
        ctx.constants = fields[_TENSORS:], backend
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (1 + _FIELDS)
        if grad is None:
            return nothing
        constants, backend = ctx.constants
        tensors = ctx.saved_tensors
        p, saved = Problem(*tensors[:_TENSORS], *constants), Saved(*tensors[_TENSORS:])
        if torch.is_grad_enabled():  # create_graph: the function that refuses a second derivative has its say
            dx, dquality, dgamma = _SelectBackward.apply(*p, grad, *saved, backend)
        else:
            dx, dquality, dgamma = _backward(p, grad, saved, backend)
        _, *wanted = ctx.needs_input_grad
        dquality = dquality.to(p.quality) if wanted[1] and p.quality is not None else None
        grads = (dx if wanted[0] else None, dquality, dgamma.to(p.gamma) if wanted[2] else None)
        return (None, *grads, *nothing[1 + len(grads) :])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "coreset_select has no forward-mode derivative (torch.func.jvp, jacfwd): its gradient is a "
            "straight-through estimate, defined for reverse mode. Use torch.func.vjp, jacrev or grad."
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """A dimension more is sets more: one call takes them all, where they share gamma, tau and seed."""
        folded = _folded(info.batch_size, Problem(*in_dims[1:]), Problem(*args[1:]))
        if folded is None:
            return one_by_one(_Select.apply, info.batch_size, in_dims, args)
        out = _Select.apply(args[0], *folded)
        # (R,); (K, R); or sets first
        along = [0] * 4 + [1 if found.ndim == 2 else 0 for found in out[4:]]
        return tuple(t.unflatten(dim, (info.batch_size, -1)) for t, dim in zip(out, along, strict=True)), tuple(along)


def _folded(count: int, dims: Problem, p: Problem) -> Problem | None:
    """The sets of all ``count`` calls as those of one; None if they have not all the same constants, or are packed.

    A seed gives sets of different numbers different noise, where each call has its own set 0.
    """
    if p.cu_seqlens is not None or p.seed is not None or dims.gamma is not None or dims.tau is not None:
        return None

    def fold(name: str, at: int = 0) -> Tensor | None:
        values, dim = getattr(p, name), getattr(dims, name)
        if values is None:
            return None
        every = values.unsqueeze(at).expand(*values.shape[:at], count, *values.shape[at:])
        return (every if dim is None else values.movedim(dim, at)).flatten(at, at + 1)

    features = fold("features")
    assert features is not None
    return p._replace(
        features=features,
        quality=fold("quality"),
        noise=fold("noise", 1),
        start=fold("start"),
        mask=fold("mask"),
        lengths=fold("lengths"),
        limits=fold("limits"),
        min_distances=fold("min_distances"),
    )


# Function.apply without its look at the signature of `forward`, which takes 70 us a call.
_apply = super(torch.autograd.Function, _Select).apply


class _SelectBackward(torch.autograd.Function):
    """The backward operator, which has no derivative."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _backward(*_backward_call(args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(
            "coreset_select has no second derivative: its gradient is a straight-through estimate. "
            "Call backward() without create_graph=True."
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """jacrev asks for the gradients of many outputs of one call."""
        return one_by_one(_SelectBackward.apply, info.batch_size, in_dims, args)


def _select_autograd(*args: Any) -> tuple[Tensor | list[Tensor], ...]:
    *fields, keep, backend = args
    p = Problem(*fields)
    if asks_for_gradient(*p[:3]):
        out = _Select.apply(backend, *p)
        return *out[:4], list(out[4 : 4 + 2 * p.return_state]), []
    return _forward(p, keep, backend)


_library.impl("select", _select_autograd, "Autograd")
_library.impl("select_backward", _SelectBackward.apply, "Autograd")


torch.library.register_vmap("fcn_kernels::select_backward", _SelectBackward.vmap, lib=_library)


@register_flop_formula(torch.ops.fcn_kernels.select)
def select_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """2 R C for each of the K - 1 distance passes, and for the norms: the most that a backend does."""
    p = dict(zip(Problem._fields, args, strict=False))
    return 2 * int(torch.Size(p["features"]).numel()) * (int(p["k"]) - 1 + (not p["normalized"]))


@register_flop_formula(torch.ops.fcn_kernels.select_backward)
def select_backward_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """2 R C for each of K products with the arriving gradients, K - 1 row sums, and K - 1 terms of dx."""
    p = dict(zip(Problem._fields, args, strict=False))
    return 2 * int(torch.Size(p["features"]).numel()) * (3 * int(p["k"]) - 2)
