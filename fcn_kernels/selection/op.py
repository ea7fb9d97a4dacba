"""The registered operators ``fcn_kernels::select`` and ``fcn_kernels::select_backward``.

They carry what PyTorch wants to know of an operation: shapes for tracing, a gradient, a FLOP count, and what happens
under vmap and in a second derivative. What runs is the backend that the public function named.
"""

from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fcn_kernels.selection import torch_backend
from fcn_kernels.selection.cpp import launch as cpp
from fcn_kernels.selection.problem import Gradients, Problem, Saved, Selected

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
    "(Tensor features, Tensor distances, Tensor indices, Tensor counts, Tensor[] kept)"
)
_library.define(
    f"select_backward({_PROBLEM}, Tensor grad, Tensor indices, Tensor counts, Tensor softmax, Tensor gaps, "
    "Tensor norms, str backend) -> (Tensor features, Tensor quality, Tensor gamma)"
)
_run, _run_backward = torch.ops.fcn_kernels.select.default, torch.ops.fcn_kernels.select_backward.default
_below_autograd = torch._C._AutoDispatchBelowAutograd


def select(problem: Problem, keep: bool, backend: str) -> Selected:
    """Run the forward operator; ``keep`` keeps what the gradient needs."""
    # Without the dispatcher, which would call the same hook, where nothing else waits for the call there: a sixth of
    # the time of one on a tiny set.
    recorded = torch.compiler.is_compiling() or torch._C._is_tracing()
    heard = recorded or torch._C._are_functorch_transforms_active()
    return Selected(*(_run if heard else _select_autograd)(*problem, keep, backend))


def runs_on(backend: str, dtype: torch.dtype) -> str:
    """What a backend is for rows of this dtype: "cpu" is "cpp" where that can be compiled, else "torch"."""
    if backend != "cpu":
        return backend
    return "torch" if cpp.unavailable(dtype) else "cpp"


def _backend(name: str, features: Tensor) -> ModuleType:
    if name == "triton":
        from fcn_kernels.selection.kernels import launch  # triton is imported only where it is used

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
    def forward(ctx: Any, features: Tensor, quality: Tensor | None, gamma: Tensor, rest: Any) -> tuple[Tensor, ...]:
        with _below_autograd():
            out = Selected(*_run(features, quality, gamma, *rest))
        ctx.save_for_backward(features, quality, gamma, *rest[: _TENSORS - 3], *out.saved)
        ctx.constants = rest[_TENSORS - 3 :]
        ctx.mark_non_differentiable(*out[1:4])
        ctx.set_materialize_grads(False)
        return out[:4]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        tensors = ctx.saved_tensors
        *constants, _keep, backend = ctx.constants
        # with create_graph, the hook that refuses a second derivative has its say
        with nullcontext() if torch.is_grad_enabled() else _below_autograd():
            dx, dq, dgamma = _run_backward(*tensors[:_TENSORS], *constants, grad, *tensors[_TENSORS:], backend)
        _, quality, gamma = tensors[:3]
        wanted = ctx.needs_input_grad
        return (
            dx if wanted[0] else None,
            dq.to(quality.dtype) if wanted[1] else None,
            dgamma.to(gamma) if wanted[2] else None,
            None,
        )


def _select_autograd(*args: Any) -> tuple[Tensor | list[Tensor], ...]:
    features, quality, gamma, *rest = args
    wanted = features.requires_grad or gamma.requires_grad or (quality is not None and quality.requires_grad)
    if wanted and torch.is_grad_enabled():
        return *_Select.apply(features, quality, gamma, rest), []
    with _below_autograd():
        return _run(*args)  # type: ignore[no-any-return]


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
