"""Fixtures that run a test on every backend and, of the Triton kernels, on whole sets and on sets in parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from oracle import Select, select_on
from poison import poisoned

from fcn_kernels.backends import HAS_TRITON
from fcn_kernels.selection.cpp import launch as cpp

if HAS_TRITON:
    from tiers import TIERS, forced
else:
    TIERS = ()

# Launches of two lengths are those of whole sets, twice: `test_kernels.py` has them.
WHERE = ("torch", "cpp", *(f"triton, {tier}" for tier in TIERS if tier != "two lengths"))


@pytest.fixture(params=WHERE)
def where(request: pytest.FixtureRequest, device: torch.device) -> str:
    name: str = request.param
    if name == "cpp" and (reason := cpp.unavailable(torch.float32)):
        pytest.skip(reason)
    if not name.startswith("triton") and device.type != "cpu":
        pytest.skip("the test of a CPU's backend")
    return name


@pytest.fixture
def select(where: str) -> Iterator[Select]:
    """``coreset_select`` there, on memory that is full of NaN."""
    backend, _, tier = where.partition(", ")
    there: AbstractContextManager[None] = forced(tier) if tier else nullcontext()
    with there, poisoned():
        yield select_on(backend)
