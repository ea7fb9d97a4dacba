"""Operators under torch.func's transforms, which do not take what torch.library registers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_transformed() -> bool:
    """Whether a transform follows the call."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


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
            each = [
                Transformable.apply(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
                for i in range(info.batch_size)
            ]
            return tuple(torch.stack(found) for found in zip(*each, strict=True)), (0,) * len(each[0])

        setup_context = staticmethod(save)
        backward = staticmethod(differentiate)

    return Transformable
