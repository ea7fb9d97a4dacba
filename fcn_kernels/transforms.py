"""Operators under torch.func's transforms, which do not take what torch.library registers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_transformed() -> bool:
    """Whether a transform follows the call."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def one_by_one(function: Callable[..., Any], count: int, dims: Any, args: Any) -> Any:
    """Under vmap: outputs of a function for each of ``count`` calls, stacked, and where."""
    each = [
        function(*(a if d is None else a.select(d, i).contiguous() for a, d in zip(args, dims, strict=True)))
        for i in range(count)
    ]
    return tuple(torch.stack(found) for found in zip(*each, strict=True)), (0,) * len(each[0])


def transformable(
    run: Callable[..., Any], save: Callable[..., None], differentiate: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """An operator as a function that transforms take: of what it gets, under vmap one call after another is made.

    Args:
        run: the operator.
        save, differentiate: as torch.library.register_autograd takes them.
    """

    class Transformable(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return tuple(run(*args))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            return one_by_one(Transformable.apply, info.batch_size, in_dims, args)

        setup_context = staticmethod(save)
        backward = staticmethod(differentiate)

    return Transformable
