"""The registered operators ``fcn_kernels::select`` and ``fcn_kernels::select_backward``.

They carry what PyTorch wants to know of an operation: shapes for tracing, a gradient, a FLOP count, and what happens
under vmap and in a second derivative. What runs is the backend that the public function named.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fcn_kernels import torch_backend
from fcn_kernels.cpp import launch as cpp
from fcn_kernels.problem import Gradients, Problem, Saved, Selected

_PROBLEM = (
    "Tensor features, Tensor? quality, Tensor gamma, Tensor? noise, Tensor? seed, Tensor? start, Tensor? mask, "
    "Tensor? lengths, Tensor? cu_seqlens, int k, float tau, float distance_scale, bool normalized, bool distinct"
)
_FIELDS = len(Problem._fields)
_TENSORS = Problem._fields.index("k")  # what comes before it

# A Library, not custom_op: the latter's wrappers cost more on the host than a call on small sets takes.
_library = torch.library.Library("fcn_kernels", "DEF")
_library.define(
    f"select({_PROBLEM}, bool keep, str backend) -> "
    "(Tensor features, Tensor distances, Tensor indices, Tensor counts, Tensor softmax, Tensor gaps, "
    "Tensor norms)"
)
_library.define(
    f"select_backward({_PROBLEM}, Tensor grad, Tensor indices, Tensor counts, Tensor softmax, Tensor gaps, "
    "Tensor norms, str backend) -> (Tensor features, Tensor quality, Tensor gamma)"
)


def select(problem: Problem, keep: bool, backend: str) -> Selected:
    """Run the forward operator; ``keep`` saves what the gradient needs."""
    run = torch.ops.fcn_kernels.select.default
    if keep or torch.compiler.is_compiling():
        return Selected(*run(*problem, keep, backend))
    return Selected(*_without_gradient(run, *problem, keep, backend))


def _without_gradient(run: Any, *args: Any) -> Any:
    """Past the operator's hook for gradients, which is in Python: a sixth of a call on a tiny set."""
    with torch._C._AutoDispatchBelowAutograd():
        return run(*args)


def runs_on(backend: str, dtype: torch.dtype) -> str:
    """What a backend is for rows of this dtype: "cpu" is "cpp" where that can be compiled, else "torch"."""
    if backend != "cpu":
        return backend
    return "torch" if cpp.unavailable(dtype) else "cpp"


def _backend(name: str, features: Tensor) -> ModuleType:
    if name == "triton":
        from fcn_kernels.kernels import launch  # triton is imported only where it is used

        return launch
    return cpp if runs_on(name, features.dtype) == "cpp" else torch_backend


def _select(*args: Any) -> Selected:
    *fields, keep, backend = args
    p = Problem(*fields)
    return _backend(backend, p.features).forward(p, keep)  # type: ignore[no-any-return]


def _select_backward(*args: Any) -> Gradients:
    p = Problem(*args[:_FIELDS])
    grad, *saved, backend = args[_FIELDS:]
    return _backend(backend, p.features).backward(p, grad, Saved(*saved))  # type: ignore[no-any-return]


_library.impl("select", _select, "CompositeExplicitAutograd")
_library.impl("select_backward", _select_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fcn_kernels::select", lib=_library)
def _select_fake(*args: Any) -> Selected:
    *fields, keep, backend = args
    return Selected.empty(Problem(*fields), keep, normalizers=backend == "triton")


@torch.library.register_fake("fcn_kernels::select_backward", lib=_library)
def _select_backward_fake(*args: Any) -> Gradients:
    p = Problem(*args[:_FIELDS])
    norms = args[-2]
    return Gradients(p.features.new_empty(p.features.shape), norms.new_empty(p.rows), norms.new_empty(()))


class _Select(torch.autograd.Function):
    """The operator with its gradient. torch.library.register_autograd does the same and looks the schema's arguments
    up one by one, which costs each call more than a hundred microseconds."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Selected:
        output = _without_gradient(torch.ops.fcn_kernels.select.default, *args)
        ctx.save_for_backward(*args[:_TENSORS], *output[2:])
        ctx.constants, ctx.backend = args[_TENSORS:_FIELDS], args[-1]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (_FIELDS + 2)
        if grad is None:
            return nothing
        tensors = ctx.saved_tensors
        fields, kept = tensors[:_TENSORS], tensors[_TENSORS:]
        run, args = torch.ops.fcn_kernels.select_backward.default, (*fields, *ctx.constants, grad, *kept, ctx.backend)
        dx, dq, dgamma = run(*args) if torch.is_grad_enabled() else _without_gradient(run, *args)
        wanted = ctx.needs_input_grad
        gamma = fields[2]
        return (
            dx if wanted[0] else None,
            dq.to(fields[1].dtype) if wanted[1] else None,
            dgamma.to(gamma) if wanted[2] else None,
            *nothing[3:],
        )


def _select_autograd(*args: Any) -> Selected:
    features, quality, gamma = args[:3]
    wanted = features.requires_grad or gamma.requires_grad or (quality is not None and quality.requires_grad)
    if wanted and torch.is_grad_enabled():
        return _Select.apply(*args)  # type: ignore[no-any-return]
    return _without_gradient(torch.ops.fcn_kernels.select.default, *args)  # type: ignore[no-any-return]


_library.impl("select", _select_autograd, "Autograd")


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "coreset_select has no second derivative: its gradient is a straight-through estimate. "
        "Call backward() without create_graph=True."
    )


torch.library.register_autograd("fcn_kernels::select_backward", _no_second_derivative, lib=_library)


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    raise NotImplementedError(
        "coreset_select does not run under torch.func.vmap: it is batched already. "
        "Pass features of shape (B, N, C), or packed sets with cu_seqlens."
    )


torch.library.register_vmap("fcn_kernels::select", _no_vmap, lib=_library)
torch.library.register_vmap("fcn_kernels::select_backward", _no_vmap, lib=_library)


@register_flop_formula(torch.ops.fcn_kernels.select)
def select_flops(features: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """2 R C for each of the K - 1 distance passes, and for the norms: the most that a backend does."""
    k, normalized = args[8], args[11]
    return 2 * int(torch.Size(features).numel()) * (int(k) - 1 + (not normalized))


@register_flop_formula(torch.ops.fcn_kernels.select_backward)
def select_backward_flops(features: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """2 R C for each of K products with the arriving gradients, K - 1 row sums, and K - 1 terms of dx."""
    k = args[8]
    return 2 * int(torch.Size(features).numel()) * (3 * int(k) - 2)
