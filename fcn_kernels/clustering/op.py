"""The registered operators ``cluster_sums`` and ``cluster_chunks``, and their backward operators.

Shapes for tracing, gradients and FLOP counts; the schemas are made from the fields of the NamedTuples. What runs is the
backend that the caller named.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fcn_kernels.backends import has_tangent, runs_on, without_autocast
from fcn_kernels.clustering import torch_backend
from fcn_kernels.clustering.cpp import launch as cpp
from fcn_kernels.clustering.problem import Chunks, ChunksGradients, Clustered, Summed, Sums, SumsGradients
from fcn_kernels.schema import schema
from fcn_kernels.transforms import is_transformed, transformable

_library = torch.library.Library("fcn_kernels", "FRAGMENT")
_library.define(f"cluster_sums({schema(Sums)}, str backend) -> ({schema(Summed)})")
_library.define(
    f"cluster_sums_backward({schema(Sums)}, {schema(Summed, 'grad_')}, bool wanted, str backend) -> "
    f"({schema(SumsGradients)})"
)
_library.define(f"cluster_chunks({schema(Chunks)}, bool keep, str backend) -> ({schema(Clustered)})")
_library.define(
    f"cluster_chunks_backward({schema(Chunks)}, {schema(Summed, 'grad_')}, "
    f"{schema(Clustered, 'out_')}, bool wanted, str backend) -> ({schema(ChunksGradients)})"
)
_SUMS, _CHUNKS, _ARRIVING = len(Sums._fields), len(Chunks._fields), len(Summed._fields)
_ops = torch.ops.fcn_kernels


def cluster_sums(problem: Sums, backend: str) -> Summed:
    """Run the operator."""
    _check_tangents(problem, "cluster_sums")
    run = _TransformedSums.apply if is_transformed() else _ops.cluster_sums.default
    return Summed(*run(*problem, backend))


def cluster_chunks(problem: Chunks, backend: str) -> Clustered:
    """Run the operator; what backward needs is kept if a gradient is asked for."""
    _check_tangents(problem, "Cluster and Aggregate")
    if is_transformed():
        return Clustered(*_TransformedChunks.apply(*problem, True, backend))
    keep = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in problem)
    return Clustered(*_ops.cluster_chunks.default(*problem, keep, backend))


def _check_tangents(problem: Sums | Chunks, name: str) -> None:
    tensors = [t for t in problem if isinstance(t, Tensor)]
    if not torch.compiler.is_compiling() and has_tangent(*tensors):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd). Use torch.func.vjp, jacrev or grad."
        )


def _sums_backend(name: str) -> ModuleType:
    return _kernels("launch_sums") if name == "triton" else torch_backend


def _chunks_backend(name: str, p: Chunks) -> ModuleType:
    if name == "triton":
        return _kernels("launch_chunks")
    return cpp if runs_on(name, p.features.dtype, cpp.unavailable) == "cpp" else torch_backend


def _kernels(launches: str) -> ModuleType:
    """Launches on the device, from a module of this name."""
    return import_module(f"fcn_kernels.clustering.kernels.{launches}")  # triton is imported only where it is used


def _sums(*args: Any) -> Summed:
    p = Sums(*args[:_SUMS])
    with without_autocast(p.values.device.type):
        return _sums_backend(args[-1]).sums_forward(p)  # type: ignore[no-any-return]


def _sums_backward(*args: Any) -> SumsGradients:
    p, grad, wanted = Sums(*args[:_SUMS]), Summed(*args[_SUMS:-2]), args[-2]
    with without_autocast(p.values.device.type):
        return _sums_backend(args[-1]).sums_backward(p, grad, wanted)  # type: ignore[no-any-return]


def _chunks(*args: Any) -> Clustered:
    p, keep = Chunks(*args[:_CHUNKS]), args[-2]
    with without_autocast(p.features.device.type):
        return _chunks_backend(args[-1], p).chunks_forward(p, keep)  # type: ignore[no-any-return]


def _chunks_backward(*args: Any) -> ChunksGradients:
    p, (*rest, wanted) = Chunks(*args[:_CHUNKS]), args[_CHUNKS:-1]
    grad, out = Summed(*rest[:_ARRIVING]), Clustered(*rest[_ARRIVING:])
    with without_autocast(p.features.device.type):
        return _chunks_backend(args[-1], p).chunks_backward(p, grad, out, wanted)  # type: ignore[no-any-return]


def _sums_fake(*args: Any) -> Summed:
    p = Sums(*args[:_SUMS])
    new, sets = p.weight.new_empty, p.lengths.shape[0]
    width = 0 if p.keys is None else p.keys.shape[1]
    return Summed(new(sets, p.centers, p.values.shape[1]), new(sets, p.centers, width), new(sets, p.centers))


def _like(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Room for the gradient of an input; none for one that a call lacks."""
    return other.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)


def _sums_backward_fake(*args: Any) -> SumsGradients:
    p, wanted = Sums(*args[:_SUMS]), args[-2]
    values = p.values.new_empty(p.values.shape if wanted else 0)
    return SumsGradients(values, *(_like(t, p.weight) for t in (p.keys, p.scale, p.weight, p.bias)))


def _chunks_fake(*args: Any) -> Clustered:
    return Clustered.empty(Chunks(*args[:_CHUNKS]), args[-2])


def _chunks_backward_fake(*args: Any) -> ChunksGradients:
    p, wanted = Chunks(*args[:_CHUNKS]), args[-2]
    features = p.features.new_empty(p.features.shape if wanted else 0)
    return ChunksGradients(features, *(_like(getattr(p, name), p.tokens) for name in ChunksGradients._fields[1:]))


for name, implementation, fake in (
    ("cluster_sums", _sums, _sums_fake),
    ("cluster_sums_backward", _sums_backward, _sums_backward_fake),
    ("cluster_chunks", _chunks, _chunks_fake),
    ("cluster_chunks_backward", _chunks_backward, _chunks_backward_fake),
):
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fcn_kernels::{name}", fake, lib=_library)


def _save_sums(ctx: Any, inputs: tuple[Any, ...], output: Summed) -> None:
    p, backend = Sums(*inputs[:_SUMS]), inputs[-1]
    ctx.save_for_backward(*p[:-1])
    ctx.constants = p.ghosts, backend


def _differentiate_sums(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
    ghosts, backend = ctx.constants
    p, needed = Sums._make((*ctx.saved_tensors, ghosts)), Sums(*ctx.needs_input_grad[:_SUMS])
    run = _TransformedSumsBackward.apply if is_transformed() else _ops.cluster_sums_backward.default
    found = SumsGradients(*run(*p, *grad, needed.values, backend))
    return *_placed(p, needed, found), None


def _save_chunks(ctx: Any, inputs: tuple[Any, ...], output: Clustered) -> None:
    p = Chunks(*inputs[:_CHUNKS])
    ctx.save_for_backward(*p[:-2], *output)
    ctx.constants = (p.heads, p.longest), inputs[-1]
    ctx.mark_non_differentiable(*output[_ARRIVING:])


def _differentiate_chunks(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
    constants, backend = ctx.constants
    p = Chunks._make((*ctx.saved_tensors[: _CHUNKS - 2], *constants))
    out, needed = ctx.saved_tensors[_CHUNKS - 2 :], Chunks(*ctx.needs_input_grad[:_CHUNKS])
    run = _TransformedChunksBackward.apply if is_transformed() else _ops.cluster_chunks_backward.default
    found = run(*p, *grad[:_ARRIVING], *out, needed.features, backend)
    return *_placed(p, needed, ChunksGradients(*found)), None, None


def _placed(p: Any, needed: Any, found: Any) -> tuple[Tensor | None, ...]:
    """Gradients where the inputs stand that want one."""
    grads = found._asdict()
    return tuple(grads[name] if name in grads and getattr(needed, name) else None for name in p._fields)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError("clustering has no second derivative. Call backward() without create_graph=True.")


for name, differentiate, save in (
    ("cluster_sums", _differentiate_sums, _save_sums),
    ("cluster_chunks", _differentiate_chunks, _save_chunks),
):
    torch.library.register_autograd(f"fcn_kernels::{name}", differentiate, setup_context=save, lib=_library)
    torch.library.register_autograd(f"fcn_kernels::{name}_backward", _no_second_derivative, lib=_library)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


_TransformedSums = transformable(_ops.cluster_sums.default, _save_sums, _differentiate_sums)
_TransformedChunks = transformable(_ops.cluster_chunks.default, _save_chunks, _differentiate_chunks)
_TransformedSumsBackward = transformable(_ops.cluster_sums_backward.default, _save_nothing, _no_second_derivative)
_TransformedChunksBackward = transformable(_ops.cluster_chunks_backward.default, _save_nothing, _no_second_derivative)


def _sums_products(args: Any) -> tuple[int, int]:
    """Multiply-adds of the logits, and of the sums."""
    p = Sums._make(args[:_SUMS])  # of shapes
    (rows, width), (every, dim) = p.values, p.weight
    return rows * every * dim, rows * (every - p.ghosts) * (width + (0 if p.keys is None else dim))


@register_flop_formula(torch.ops.fcn_kernels.cluster_sums)
def sums_flops(*args: Any, out_shape: Any = None, **_: Any) -> int:
    """2 T ((M + ghosts) d + M (C + d)), without the last d where values are the keys."""
    return 2 * sum(_sums_products(args))


@register_flop_formula(torch.ops.fcn_kernels.cluster_sums_backward)
def sums_backward_flops(*args: Any, out_shape: Any = None, **_: Any) -> int:
    """The logits three times (again, and for keys and weight), and the sums twice (for shares, and rows)."""
    logits, sums = _sums_products(args)
    return 2 * (3 * logits + 2 * sums)


def _chunks_products(args: Any) -> tuple[int, int]:
    """Multiply-adds of the blocks (as if all chunks had the mean length: the fewest possible), and of shares and sums.

    L (12 d^2 + 2 (n + M) d) for each of a chunk's n + M tokens; M (2 d + C) for each row.
    """
    p = Chunks._make(args[:_CHUNKS])  # of shapes
    (rows, width), (centers, dim), chunks = p.features, p.tokens, max(1, p.lengths[0])
    tokens = rows + chunks * centers
    return p.qkv_weight[0] * (12 * dim**2 * tokens + 2 * dim * tokens**2 // chunks), rows * centers * (2 * dim + width)


@register_flop_formula(torch.ops.fcn_kernels.cluster_chunks)
def chunks_flops(*args: Any, out_shape: Any = None, **_: Any) -> int:
    """Twice the multiply-adds."""
    return 2 * sum(_chunks_products(args))


@register_flop_formula(torch.ops.fcn_kernels.cluster_chunks_backward)
def chunks_backward_flops(*args: Any, out_shape: Any = None, **_: Any) -> int:
    """The blocks three times (again, and for tokens and weights), and twice the sums."""
    blocks, sums = _chunks_products(args)
    return 2 * (3 * blocks + 2 * sums)
