"""Launch geometry of the Triton kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fcn_kernels import coreset_select
from fcn_kernels.device import gpu
from fcn_kernels.device.splits import COOPERATIVE, LAUNCHES, WHOLE
from fcn_kernels.selection.kernels import launch
from fcn_kernels.selection.kernels.plans import MAX_ROWS, SPLIT_ROWS, Sizes, backward_plans, forward_plans
from fcn_kernels.selection.problem import Problem

SIZES = list(product((1, 7, 200), (1, 20, 64, 300, 8000, None), (1, 100, 512, 4096), (2, 4), (False, True)))
GPU = gpu.Device(processors=132, cooperative=True)


@pytest.mark.parametrize("device_kind", [GPU, gpu.INTERPRETER], ids=["gpu", "interpreter"])
def test_plans_fit_and_cover(device_kind: gpu.Device) -> None:
    for (sets, rows, dim, itemsize, ragged), plan_for in product(SIZES, (forward_plans, backward_plans)):
        plans = plan_for(Sizes(sets, rows, dim, itemsize, ragged, device_kind))
        assert plans[-1].shortest == 0
        assert plans[0].longest >= MAX_ROWS
        assert all(a.shortest == b.longest + 1 for a, b in pairwise(plans))  # each set is one launch's
        for plan in plans:
            for size in (plan.block_n, plan.chunk, plan.warps, plan.block_r):
                assert size & (size - 1) == 0
                assert size >= 1
            assert plan.chunk * plan.chunks >= dim
            loads = 16 // itemsize if dim % 16 == 0 else 1  # elements of a thread at once
            assert plan.block_n * plan.chunk >= 32 * plan.warps * loads  # each row has as many threads as it takes
            if plan.split == WHOLE.value:
                assert plan.parts == 1
            else:
                assert len(plans) == 1
                assert plan.parts > 1
                assert rows // plan.parts >= SPLIT_ROWS
                assert plan.split == (COOPERATIVE if device_kind.cooperative else LAUNCHES).value
                assert sets * plan.parts <= device_kind.processors * plan.at_once  # all run at once


def test_programs_of_a_warp_take_sets_only_where_a_warp_has_whole_rows() -> None:
    """Else those of four warps would sum rows in another order."""

    def launches(features: torch.Tensor) -> int:
        problem = Problem(
            features,
            torch.ones(len(features)),
            torch.tensor(0.5),
            cu_seqlens=torch.arange(0, len(features) + 1, 8),
            k=3,
        )
        return len(launch.plans(problem)[0])

    assert launches(torch.empty(800, 512)) == launches(torch.empty(800, 24)) == launches(torch.empty(800, 3)) == 2
    assert launches(torch.empty(800, 100)) == launches(torch.empty(800, 520)[:, :512]) == 1
    assert launches(torch.empty(800 * 512 + 1)[1:].view(800, 512)) == 1


def test_large_sets_are_split() -> None:
    """The paper's sizes: a program for 20 photos, 8,000 photos of one person are shared by the whole GPU."""
    assert forward_plans(Sizes(256, 20, 512, 2, False, GPU))[0].parts == 1
    assert forward_plans(Sizes(1, 8000, 512, 2, False, GPU))[0].parts > 100
    assert len(forward_plans(Sizes(256, None, 512, 2, True, GPU))) == 2


def test_five_calls_lead_from_the_public_function_to_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    package, stacks = Path(launch.__file__).parents[2], []

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            own = [frame.function for frame in inspect.stack() if package in Path(frame.filename).parents]
            stacks.append(own)
            return lambda **_: None

    for name in ("select_forward", "select_backward"):
        monkeypatch.setattr(launch, name, Kernel())
    rows = torch.randn(1, 9, 16)
    coreset_select(rows, 3, backend="triton")
    coreset_select(rows.requires_grad_(), 3, backend="triton").features.sum().backward()
    assert [stack[-1] for stack in stacks] == ["coreset_select", "coreset_select", "backward"]
    assert [len(stack) - 1 for stack in stacks] == [4, 5, 3]
