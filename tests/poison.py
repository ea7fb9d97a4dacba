"""Memory as bad as it can be, for results that hang on what was there before."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

GUARD = 64  # elements before and after what is allocated


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that a backend takes comes full of NaN, and what lies around it must stay as it was."""
    taken: list[Tensor] = []

    def garbage(shape: tuple[int, ...], like: Tensor, **options: Any) -> Tensor:
        dtype = options.get("dtype") or like.dtype
        value = math.nan if dtype.is_floating_point else dtype == torch.bool or torch.iinfo(dtype).min // 3
        size = math.prod(shape)
        whole = torch.full((size + 2 * GUARD,), value, dtype=dtype, device=like.device)
        taken.append(whole)
        return whole[GUARD : GUARD + size].view(shape)

    plain_new_empty = torch.Tensor.new_empty

    def new_empty(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        shape = tuple(shape[0]) if shape and not isinstance(shape[0], int) else shape
        if math.prod(shape) == 0:  # Triton's interpreter takes these for its own ends
            return plain_new_empty(self, shape, **options)
        return garbage(shape, self, **options)

    def empty_like(like: Tensor, **options: Any) -> Tensor:
        return garbage(like.shape, like, dtype=options.get("dtype"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        patch.setattr(torch, "empty_like", empty_like)
        yield
    for whole in taken:
        around = torch.cat([whole[:GUARD], whole[-GUARD:]])
        assert around.isnan().all() if whole.is_floating_point() else (around == around[0]).all()
