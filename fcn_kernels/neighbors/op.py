"""The registered operators ``fcn_kernels::context_statistics`` and ``fcn_kernels::context_statistics_backward``.

Shapes for tracing, the gradient and FLOP counts; the schemas are made from the fields of the NamedTuples. What runs is
the backend that the public function named.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fcn_kernels.backends import has_tangent, runs_on, without_autocast
from fcn_kernels.neighbors import torch_backend
from fcn_kernels.neighbors.cpp import launch as cpp
from fcn_kernels.neighbors.problem import Arriving, Gradients, Problem, Statistics
from fcn_kernels.schema import schema, tensors
from fcn_kernels.transforms import is_transformed, transformable

_library = torch.library.Library("fcn_kernels", "FRAGMENT")
_library.define(f"context_statistics({schema(Problem)}, str backend) -> ({schema(Statistics)})")
_library.define(
    f"context_statistics_backward({schema(Problem)}, {schema(Arriving, 'grad_')}, {schema(Statistics)}, "
    f"bool rows_wanted, bool bank_wanted, str backend) -> ({schema(Gradients)})"
)
_FIELDS, _ARRIVING = len(Problem._fields), len(Arriving._fields)
_TENSORS = tensors(Problem)
_run = torch.ops.fcn_kernels.context_statistics.default
_run_backward = torch.ops.fcn_kernels.context_statistics_backward.default


def context_statistics(problem: Problem, backend: str) -> Statistics:
    """Run the operator."""
    if not torch.compiler.is_compiling() and has_tangent(problem.rows, problem.bank):
        raise NotImplementedError(
            "context_statistics has no forward-mode derivative (torch.func.jvp, jacfwd). Use torch.func.vjp, jacrev or "
            "grad."
        )
    return Statistics(*(_Transformed.apply if is_transformed() else _run)(*problem, backend))


def _backend(name: str, p: Problem) -> ModuleType:
    if name == "triton":
        from fcn_kernels.neighbors.kernels import launch  # triton is imported only where it is used

        return launch
    return cpp if runs_on(name, cpp_dtype(p), cpp.unavailable) == "cpp" else torch_backend


def cpp_dtype(p: Problem) -> torch.dtype:
    """Of the bank as C++ takes it."""
    return p.dtype if p.dtype == torch.float64 else p.bank.dtype


def _statistics(*args: Any) -> Statistics:
    p = Problem(*args[:-1])
    with without_autocast(p.rows.device.type):
        return _backend(args[-1], p).forward(p)  # type: ignore[no-any-return]


def _statistics_backward(*args: Any) -> Gradients:
    p, (*rest, rows_wanted, bank_wanted, backend) = Problem(*args[:_FIELDS]), args[_FIELDS:]
    grad, found = Arriving(*rest[:_ARRIVING]), Statistics(*rest[_ARRIVING:])
    with without_autocast(p.rows.device.type):
        run = _backend(backend, p).backward
        return run(p, grad, found, (rows_wanted, bank_wanted))  # type: ignore[no-any-return]


def _statistics_fake(*args: Any) -> Statistics:
    return Statistics.empty(Problem(*args[:-1]))


def _statistics_backward_fake(*args: Any) -> Gradients:
    p, (*_, rows_wanted, bank_wanted, _) = Problem(*args[:_FIELDS]), args[_FIELDS:]
    return Gradients(
        p.rows.new_empty(p.rows.shape if rows_wanted else 0), p.bank.new_empty(p.bank.shape if bank_wanted else 0)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Statistics) -> None:
    *fields, backend = inputs
    ctx.save_for_backward(*fields[:_TENSORS], *output)
    ctx.constants = fields[_TENSORS:], backend
    ctx.mark_non_differentiable(*output[_ARRIVING:])


def _differentiate(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
    constants, backend = ctx.constants
    tensors = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    run = _TransformedBackward.apply if is_transformed() else _run_backward
    rows, bank = run(*tensors[:_TENSORS], *constants, *grad[:_ARRIVING], *tensors[_TENSORS:], *wanted, backend)
    return rows if wanted[0] else None, bank if wanted[1] else None, *[None] * (_FIELDS - 1)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError("context_statistics has no second derivative. Call backward() without create_graph=True.")


for name, implementation, fake, differentiate, save in (
    ("context_statistics", _statistics, _statistics_fake, _differentiate, _save),
    ("context_statistics_backward", _statistics_backward, _statistics_backward_fake, _no_second_derivative, None),
):
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    qualified = f"fcn_kernels::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_autograd(qualified, differentiate, setup_context=save, lib=_library)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


_Transformed = transformable(_run, _save, _differentiate)
_TransformedBackward = transformable(_run_backward, _save_nothing, _no_second_derivative)


@register_flop_formula(torch.ops.fcn_kernels.context_statistics)
def statistics_flops(*args: Any, out_shape: Any = None, **_: Any) -> int:
    """2 N M C: every row against every bank row."""
    (n, dim), (m, _) = args[0], args[1]  # shapes
    return 2 * n * m * dim  # type: ignore[no-any-return]


@register_flop_formula(torch.ops.fcn_kernels.context_statistics_backward)
def statistics_backward_flops(*args: Any, out_shape: Any = None, **_: Any) -> int:
    """2 N k C for scores and for each gradient that is wanted; M in place of k where that is not limited."""
    p = Problem(*args[:_FIELDS])
    (n, dim), (m, _) = p.rows, p.bank  # of shapes
    return 2 * n * (p.k or m) * dim * (1 + args[-3] + args[-2])  # type: ignore[no-any-return]
