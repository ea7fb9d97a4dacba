"""The reference listing against the definition of the operation, worked out by hand and in closed form."""

from __future__ import annotations

import pytest
import torch
from oracle import SMOOTH, WithGradientOf, listing, smooth_counterpart
from problems import random_case
from torch import Tensor

from reference.listing import coreset_listing

F64 = torch.float64


def test_picks_by_hand() -> None:
    """Four points of the plane: the best first, then the one opposite, then the one at a right angle to both."""
    features = torch.tensor([[[2.0, 0.0], [3.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
    quality = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    found = coreset_listing(features, quality, 3)
    assert found.indices.tolist() == [[0, 3, 2]]
    assert found.distances.tolist() == [[torch.inf, 2.0, 1.0]]
    torch.testing.assert_close(found.features[0], features[0, [0, 3, 2]])


def test_quality_weighs_the_distance() -> None:
    """At gamma = 2 a row at a right angle with quality 3 beats the opposite one with quality 1: 9 > 2."""
    features = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]])
    quality = torch.tensor([[4.0, 1.0, 3.0]])
    assert coreset_listing(features, quality, 2, 0.0).indices.tolist() == [[0, 1]]
    found = coreset_listing(features, quality, 2, 2.0, distance_scale=0.5)
    assert found.indices.tolist() == [[0, 2]]
    assert found.distances[0, 1].item() == 4.5


def test_noise_moves_the_pick_and_not_the_distance() -> None:
    features = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]])
    noise = torch.zeros(2, 1, 3)
    noise[1, 0, 2] = 5.0
    found = coreset_listing(features, torch.ones(1, 3), 2, noise=noise)
    assert found.indices.tolist() == [[0, 2]]
    assert found.distances[0, 1].item() == 1.0


def test_first_index_wins_a_tie() -> None:
    assert coreset_listing(torch.eye(5)[None], torch.ones(1, 5), 5).indices.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("distinct", [False, True])
def test_distinct_forbids_a_second_pick(distinct: bool) -> None:
    noise = torch.zeros(2, 1, 3)
    noise[:, 0, 1] = 50.0
    found = coreset_listing(torch.eye(3)[None], torch.ones(1, 3), 2, noise=noise, distinct=distinct)
    assert found.indices.tolist() == [[1, 0 if distinct else 1]]


def test_start_fixes_the_first_pick() -> None:
    found = coreset_listing(torch.eye(4)[None], torch.ones(1, 4), 2, start=torch.tensor([2]))
    assert found.indices.tolist() == [[2, 0]]


def test_normalized_takes_unit_rows_as_they_are() -> None:
    case = random_case(2, 8, 5, 4, unit=True, dtype=F64)
    noise = case.options["noise"]
    plain, unit = (
        coreset_listing(case.features, case.quality, 4, 0.5, noise=noise, normalized=normalized)
        for normalized in (False, True)
    )
    assert torch.equal(plain.indices, unit.indices)
    torch.testing.assert_close(plain.distances, unit.distances)


def test_gradient_of_one_pick_in_closed_form() -> None:
    """K = 1: dq_n = y_n (c . x_n - sum_m y_m c . x_m) / tau, dx = c on the picked row."""
    case = random_case(1, 6, 4, 1, dtype=F64)
    features, quality = case.features.requires_grad_(), case.quality.requires_grad_()
    noise, tau, weight = case.options["noise"], 0.7, torch.randn(4, dtype=F64)
    found = coreset_listing(features, quality, 1, noise=noise, tau=tau)
    dx, dq = torch.autograd.grad(found.features[0, 0] @ weight, (features, quality))
    y = torch.softmax((quality + noise[0]) / tau, -1)[0]
    along = features[0] @ weight
    torch.testing.assert_close(dq[0], y * (along - y @ along) / tau)
    expected = torch.zeros_like(dx)
    expected[0, found.indices[0, 0]] = weight
    torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("options", SMOOTH, ids=str)
def test_gradient_is_the_straight_through_one(options: dict[str, object]) -> None:
    """Against finite differences of the smooth function that has the straight-through gradient."""
    case = random_case(1, 5, 4, 3, dtype=F64, seed=3, distinct=True, **options)
    value, leaves = smooth_counterpart(case)

    def reference(features: Tensor, gamma: Tensor, quality: Tensor | None = None) -> Tensor:
        quality = None if quality is None else quality[None]
        return listing(features[None], case.k, quality, gamma, **case.options).features[0]

    assert torch.autograd.gradcheck(lambda *args: WithGradientOf.apply(value, reference, *args), leaves)
