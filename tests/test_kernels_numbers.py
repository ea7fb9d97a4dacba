"""Numbers at the ends of their range in the Triton kernels, as the other backends have them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from oracle import assert_as_accurate_as_eager
from poison import poisoned
from problems import random_case
from test_kernels import TIERS, forced

from fcn_kernels import coreset_select

tiers = pytest.mark.parametrize("tier", TIERS)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@tiers
@pytest.mark.parametrize("gamma", [20.0, -30.0])
def test_weights_beyond_float32(tier: str, gamma: float, device: torch.device) -> None:
    """Picks and gradients as in float64; distances saturate."""
    x, q = rows(1, 9, 4), torch.linspace(50, 200, 9)[None]
    exact = coreset_select(x.double(), 4, q.double(), gamma, backend="torch")
    leaf = x.to(device).requires_grad_()
    with forced(tier), poisoned():
        got = coreset_select(leaf, 4, q.to(device), gamma, backend="triton")
        (grad,) = torch.autograd.grad(got.features.sum(), leaf)
    assert got.indices.tolist() == exact.indices.tolist()
    limit = torch.finfo(torch.float32)
    wanted = exact.distances.clamp(max=limit.max)
    wanted[:, 0] = math.inf
    torch.testing.assert_close(got.distances.double().cpu(), wanted, rtol=2e-4, atol=limit.tiny)
    assert grad.isfinite().all()


@tiers
@pytest.mark.parametrize("gamma", [math.nan, math.inf])
def test_a_gamma_that_is_no_number(tier: str, gamma: float, device: torch.device) -> None:
    """The lowest row that may be picked, distance 0, no gradient beside the picked rows'."""
    mask = torch.tensor([[False, True, True, True, True]])
    leaf = rows(1, 5, 4).to(device).requires_grad_()
    from fcn_kernels.selection.kernels import launch
    from fcn_kernels.selection.problem import Problem

    problem = Problem(
        features=leaf.detach(), quality=torch.tensor([9.0, 1, 2, 3, 1]).to(device), gamma=torch.tensor(gamma),
        mask=mask.flatten().to(device), k=3, distinct=True,
    )  # fmt: skip
    with forced(tier), poisoned():
        out = launch.forward(problem, True)
        grads = launch.backward(problem, torch.ones_like(out.features), out.saved)
    assert out.indices.tolist() == [[3, 1, 2]]
    assert out.distances[0, 1:].tolist() == [0, 0]
    assert all(grad.isfinite().all() for grad in grads)


@tiers
@pytest.mark.parametrize("scale", [1e-36, 1e-24, 1e20, 1e37])
def test_norms_at_the_ends_of_float32(tier: str, scale: float, device: torch.device) -> None:
    """One row of such a norm, and all: picks as of the rows divided by it, gradients finite."""
    x, q = rows(2, 9, 6), torch.linspace(1, 2, 18).view(2, 9)
    plain = coreset_select(x, 4, q, 0.5, backend="torch")
    x[0] *= scale
    x[1, 3] *= scale
    leaf = x.to(device).requires_grad_()
    with forced(tier), poisoned():
        got = coreset_select(leaf, 4, q.to(device), 0.5, backend="triton")
        (grad,) = torch.autograd.grad(got.features[0].mean(), leaf)
    assert got.indices.tolist() == plain.indices.tolist()
    torch.testing.assert_close(got.distances.cpu(), plain.distances, rtol=1e-5, atol=1e-6)
    assert grad.isfinite().all()


@tiers
def test_a_pick_is_0_away_from_itself(tier: str, device: torch.device) -> None:
    """However large its weight is, and whatever rounds."""
    x = torch.cat([1e6 * rows(1, 1, 7), rows(1, 4, 7)], 1).to(device)
    with forced(tier), poisoned():
        got = coreset_select(x, 5, gamma=2.0, backend="triton")
    assert sorted(got.indices[0].tolist()) == [0, 1, 2, 3, 4]


@tiers
def test_noise_of_minus_infinity(tier: str, device: torch.device) -> None:
    """Where all scores are -inf: the lowest row that may be picked, and no gradient but that of the picked rows."""
    noise = torch.full((2, 1, 5), -math.inf)
    mask = torch.tensor([[False, True, True, True, True]])
    leaf = rows(1, 5, 4).to(device).requires_grad_()
    with forced(tier), poisoned():
        got = coreset_select(leaf, 2, noise=noise.to(device), mask=mask.to(device), distinct=True, backend="triton")
        (grad,) = torch.autograd.grad(got.features.sum(), leaf)
    assert got.indices.tolist() == [[1, 2]]
    expected = torch.zeros(1, 5, 4)
    expected[:, 1:3] = 1
    assert torch.equal(grad.cpu(), expected)


@tiers
def test_unit_rows_have_a_derivative_at_their_own_pick(tier: str, device: torch.device) -> None:
    """As in the listing: nothing is projected, so that a pick's distance to itself moves with its length."""
    case = random_case(2, 20, 9, 5, unit=True, gamma=-0.7, tau=0.5, noise=None).to(device)
    with forced(tier), poisoned():
        assert_as_accurate_as_eager(case, "triton")


@tiers
def test_rows_that_cannot_be_picked_take_no_gradient(tier: str, device: torch.device) -> None:
    """By squared distances, too, where the way from a pick to another is not a number."""
    x = rows(1, 6, 16)
    x[0, 0], x[0, 1], x[0, 4, 3] = 3e38, -3e38, math.nan
    leaf = x.to(device).requires_grad_()
    with forced(tier), poisoned():
        got = coreset_select(leaf, 3, metric="sqeuclidean", backend="triton")
        (grad,) = torch.autograd.grad(got.features.sum(), leaf)
    assert (grad[0, 4] == 0).all()
