"""Cross-attention from a few queries to whole sets, without projecting the sets: the function and its op.

A set's row n has unit features f_n and norm q_n. Its value is x_n = q_n f_n, its key x_n + enc(q_n), where
enc is the sinusoid of the norm after a LayerNorm. Each query t_h comes with the key projection folded in, so
that

    score_h(n) = t_h . (x_n + enc(q_n)),  p_h = softmax of score_h over the set,
    out_h = sum_n p'_h(n) x_n,            weight_sum_h = sum_n p'_h(n),

p' being p after dropout. The LayerNorm's bias adds the same to every row's score and drops out. Nothing of
the size of the set's features is made or kept: forward keeps the log-sum-exp of each query's scores for backward.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fcn_kernels.attention import torch_backend
from fcn_kernels.attention.inputs import Arriving, Gradients, Inputs, Outputs
from fcn_kernels.attention.sharded import ShardedAttention
from fcn_kernels.backends import has_tangent, resolve_backend, without_autocast
from fcn_kernels.group import Group
from fcn_kernels.noise import draw_seed
from fcn_kernels.sets import RowSets, accumulator
from fcn_kernels.transforms import is_transformed


def set_attention(
    queries: Tensor,
    features: Tensor,
    quality: Tensor,
    encoding_weight: Tensor,
    sets: RowSets,
    *,
    encoding_eps: float = 1e-5,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    group: Group = None,
) -> tuple[Tensor, Tensor]:
    """Attend from H queries of each set to the set's rows.

    Args:
        queries: (B, H, C), projected into the space of the rows, and scaled.
        features: (T, C) unit rows, C even; float32, bfloat16 or float16, summed in float32, or float64.
        quality: (T,), the rows' norms. A row of quality 0 is masked.
        encoding_weight: (C,), the weight of the LayerNorm over the norms' sinusoids.
        sets: which rows belong to which set. No rows and no sets at all are fine.
        encoding_eps: epsilon of that LayerNorm.
        dropout: probability in [0, 1) with which each p_h(n) is dropped; those kept are divided by 1 - dropout.
        seed: 0-d int64; which weights are dropped depends on it and on set, query and row within the set alone.
            Drawn from torch's default generator if None.
        group: a torch.distributed group over whose ranks the rows of each set are spread, as :class:`ShardedAttention`
            has it; None: all rows are here. The seed is to be the same on all ranks.

    Returns:
        out (B, H, C) and weight_sum (B, H), float32 (float64 for float64 rows). Without dropout the weight_sum of a
        set is 1, and 0 if it has no usable row. Rows that are not usable (:func:`fcn_kernels.sets.usable`) are
        left out, whatever they hold, as the selection leaves them out, and their gradient is 0. Gradients reach
        queries, features, quality and encoding_weight.

    Raises:
        ValueError: dropout is out of range, or C is odd.
        NotImplementedError: a second or a forward-mode derivative is asked for.

    Source: Shapira and Keller, "FaceCoresetNet", AAAI 2024, section 3 (the attention); folding the projections is ours.

    Example:
        >>> features, quality = torch.nn.functional.normalize(torch.randn(2 * 10, 64), dim=-1), torch.rand(2 * 10) + 5
        >>> sets = RowSets.padded(2, 10, None, features.device)
        >>> out, weight_sum = set_attention(torch.randn(2, 3, 64), features, quality, torch.ones(64), sets)
        >>> out.shape, weight_sum.shape
        (torch.Size([2, 3, 64]), torch.Size([2, 3]))
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"expected dropout in [0, 1), got {dropout}")
    if features.shape[1] % 2:
        raise ValueError(f"expected an even number of columns, got features of shape {tuple(features.shape)}")
    if not torch.compiler.is_compiling() and has_tangent(queries, features, quality, encoding_weight):
        raise NotImplementedError("set_attention has no forward-mode derivative. Use backward() or torch.func.vjp.")
    dtype = accumulator(features.dtype)
    if dropout == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(features, None)
    inputs = Inputs(
        queries.to(dtype), features, quality.to(dtype), encoding_weight.to(dtype), *sets, seed, dropout, encoding_eps
    )
    if group is not None:
        return ShardedAttention.apply(group, *inputs)  # type: ignore[no-any-return]
    out, weight_sum, _ = (_Transformed.apply if is_transformed() else _run)(*inputs)
    return out, weight_sum


_FIELDS = len(Inputs._fields)
_INPUTS = (
    "Tensor queries, Tensor features, Tensor quality, Tensor encoding_weight, Tensor offsets, "
    "Tensor lengths, Tensor? seed, float dropout, float encoding_eps"
)
_library = torch.library.Library("fcn_kernels", "FRAGMENT")
_library.define(f"set_attention({_INPUTS}) -> (Tensor out, Tensor weight_sum, Tensor lse)")
_library.define(
    f"set_attention_backward({_INPUTS}, Tensor lse, Tensor grad_out, Tensor grad_weight_sum, Tensor delta) -> "
    "(Tensor queries, Tensor features, Tensor quality, Tensor encoding_weight)"
)
_run, _run_backward = (
    torch.ops.fcn_kernels.set_attention.default,
    torch.ops.fcn_kernels.set_attention_backward.default,
)


def _backend(features: Tensor) -> ModuleType:
    if resolve_backend(None, features, lambda _: "attention has no C++") == "triton":
        from fcn_kernels.attention.kernels import launch  # triton is imported only where it is used

        return launch
    return torch_backend


def _forward(*args: Any) -> Outputs:
    p = Inputs(*args)
    with without_autocast(p.features.device.type):
        return _backend(p.features).forward(p)  # type: ignore[no-any-return]


def _backward(*args: Any) -> Gradients:
    p, arriving = Inputs(*args[:_FIELDS]), Arriving(*args[_FIELDS:])
    with without_autocast(p.features.device.type):
        return _backend(p.features).backward(p, arriving)  # type: ignore[no-any-return]


for name, implementation in (("set_attention", _forward), ("set_attention_backward", _backward)):
    _library.impl(name, implementation, "CompositeExplicitAutograd")


@torch.library.register_fake("fcn_kernels::set_attention", lib=_library)
def _forward_fake(*args: Any) -> Outputs:
    new, shape = args[0].new_empty, args[0].shape
    return Outputs(new(shape), new(shape[:2]), new(shape[:2]))


@torch.library.register_fake("fcn_kernels::set_attention_backward", lib=_library)
def _backward_fake(*args: Any) -> Gradients:
    return Gradients(*(tensor.new_empty(tensor.shape) for tensor in args[:4]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    *tensors, dropout, encoding_eps = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.constants = dropout, encoding_eps
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx: Any, grad_out: Tensor, grad_weight_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, weight_sum, lse = ctx.saved_tensors
    delta = (grad_out * out).sum(-1) + grad_weight_sum * weight_sum
    arriving = Arriving(lse, grad_out, grad_weight_sum, delta)
    run = _TransformedBackward.apply if is_transformed() else _run_backward
    grads = run(*tensors, *ctx.constants, *arriving)
    return *grads, *(None,) * (_FIELDS - len(grads))


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError("set_attention has no second derivative. Call backward() without create_graph=True.")


torch.library.register_autograd("fcn_kernels::set_attention", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("fcn_kernels::set_attention_backward", _no_second_derivative, lib=_library)


class _Transformed(torch.autograd.Function):
    """The operator under torch.func's transforms, which do not take what torch.library registers."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(_run(*args))

    setup_context = staticmethod(_save)
    backward = staticmethod(_differentiate)


class _TransformedBackward(torch.autograd.Function):
    """Likewise, of its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(_run_backward(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = staticmethod(_no_second_derivative)


@register_flop_formula(torch.ops.fcn_kernels.set_attention)
def forward_flops(queries: Any, features: Any, *_: Any, **__: Any) -> int:
    """2 T C H for the scores and for the weighted sum."""
    return 2 * 2 * torch.Size(features).numel() * queries[1]  # type: ignore[no-any-return]


@register_flop_formula(torch.ops.fcn_kernels.set_attention_backward)
def backward_flops(queries: Any, features: Any, *_: Any, **__: Any) -> int:
    """2 T C H for the scores again, and for the gradients of weights, keys, values and queries."""
    return 5 * 2 * torch.Size(features).numel() * queries[1]  # type: ignore[no-any-return]
