"""The AdaFace head: its margin against the formula worked out by hand, its gradients and its running statistics."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_kernels.heads.adaface import AdaFace

ANGLE = 0.9  # of the test's descriptor to its identity


def head_at(mean: float, deviation: float, **options: float) -> AdaFace:
    """Two identities along the axes of the plane, in eval() with given statistics, in float64."""
    head = AdaFace(2, 2, **options).double().eval()
    head.weight.data = torch.eye(2).double()
    head.norm_statistics.copy_(torch.tensor([mean, deviation]))
    return head


def descriptor(angle: float = ANGLE) -> Tensor:
    return torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64, requires_grad=True)


def logits(head: AdaFace, norm: float, angle: float = ANGLE) -> list[float]:
    result: list[float] = head(descriptor(angle), torch.tensor([norm]).double(), torch.tensor([0]))[0].tolist()
    return result


@pytest.mark.parametrize(
    ("norm", "z_hat"),
    [
        (10.0, 0.0),  # CosFace: a margin off the cosine
        (12.0, 0.333 * 2 / (3 + 1e-3)),
        (7.0, 0.333 * -3 / (3 + 1e-3)),
        (1000.0, 1.0),  # clipped: the angle is eased, the cosine pays double
        (0.001, -1.0),  # clipped: ArcFace, a margin on the angle
    ],
)
def test_margin_follows_the_norm_as_the_formula_says(norm: float, z_hat: float) -> None:
    own, other = logits(head_at(10, 3), norm)
    assert own == pytest.approx(48 * (math.cos(ANGLE - 0.8 * z_hat) - (0.8 * z_hat + 0.8)), rel=1e-12)
    assert other == pytest.approx(48 * math.sin(ANGLE), rel=1e-12)


def test_without_margin_it_is_a_scaled_cosine() -> None:
    assert logits(head_at(10, 3, m=0.0, s=5.0), 12.0) == pytest.approx([5 * math.cos(ANGLE), 5 * math.sin(ANGLE)])


def test_weights_count_by_their_direction_alone() -> None:
    head = head_at(10, 3)
    before = logits(head, 12.0)
    head.weight.data *= torch.tensor([[7.0], [0.01]])
    assert logits(head, 12.0) == pytest.approx(before, rel=1e-12)


@pytest.mark.parametrize("norm", [0.001, 8.0, 10.0, 1000.0])
def test_gradient_is_the_formula_s(norm: float) -> None:
    head, point = head_at(10, 3), descriptor()
    z_hat = max(-1.0, min(1.0, 0.333 * (norm - 10) / (3 + 1e-3)))
    head(point, torch.tensor([norm]).double(), torch.tensor([0]))[0, 0].backward()
    # d cos(theta + g) / d cos(theta) = sin(theta + g) / sin(theta), and cos(theta) is the first coordinate
    expected = 48 * math.sin(ANGLE - 0.8 * z_hat) / math.sin(ANGLE)
    assert point.grad is not None
    assert point.grad[0].tolist() == pytest.approx([expected, 0], rel=1e-12, abs=1e-12)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    head = AdaFace(6, 4).double().eval()
    head.norm_statistics.copy_(torch.tensor([10.0, 3.0]))
    points = F.normalize(torch.randn(5, 6).double()).requires_grad_()
    norms, labels = torch.tensor([2.0, 8, 10, 12, 30]).double(), torch.tensor([0, 1, 2, 3, 3])

    def loss(points: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(head, {"weight": weight}, (points, norms, labels))
        return result

    assert torch.autograd.gradcheck(loss, (points, head.weight))


def test_norm_gets_no_gradient() -> None:
    norm = torch.tensor([12.0, 9.0], requires_grad=True)
    AdaFace(4, 3)(F.normalize(torch.randn(2, 4)), norm, torch.tensor([0, 2])).sum().backward()
    assert norm.grad is None


def test_angle_that_leaves_the_half_circle_is_clipped_and_takes_no_gradient() -> None:
    head, point = head_at(10, 3), descriptor(0.3)
    long = torch.tensor([1000.0]).double()  # theta + g = 0.3 - 0.8 < 0
    own = head(point, long, torch.tensor([0]))[0, 0]
    assert own.item() == pytest.approx(48 * (math.cos(1e-3) - 1.6), rel=1e-12)
    own.backward()
    assert point.grad is not None
    assert point.grad.count_nonzero() == 0


@pytest.mark.parametrize("angle", [0.0, math.pi])
def test_gradient_is_finite_on_and_opposite_the_identity(angle: float) -> None:
    point = descriptor(angle)
    head_at(10, 3)(point, torch.tensor([10.0]).double(), torch.tensor([0])).sum().backward()
    assert point.grad is not None
    assert point.grad.isfinite().all()


def test_statistics_start_with_the_first_batch_and_then_follow() -> None:
    head = AdaFace(2, 2, t_alpha=0.25)
    assert head.norm_statistics.isnan().all()
    points, labels = F.normalize(torch.randn(2, 2)), torch.tensor([0, 1])
    head(points, torch.tensor([8.0, 12.0]), labels)
    assert head.norm_statistics.tolist() == pytest.approx([10, 8**0.5])
    head(points, torch.tensor([18.0, 22.0]), labels)
    assert head.norm_statistics.tolist() == pytest.approx([0.75 * 10 + 0.25 * 20, 8**0.5])
    head.eval()(points, torch.tensor([1.0, 100.0]), labels)
    assert head.norm_statistics.tolist() == pytest.approx([12.5, 8**0.5])
    fresh = AdaFace(2, 2)
    fresh.load_state_dict(head.state_dict())
    assert torch.equal(fresh.norm_statistics, head.norm_statistics)


def test_the_batch_takes_part_in_the_statistics_that_judge_it() -> None:
    head = AdaFace(2, 1, t_alpha=0.5).double()
    head.weight.data = torch.tensor([[1.0, 0.0]]).double()
    head.norm_statistics.copy_(torch.tensor([10.0, 3.0]))
    own = head(descriptor().expand(2, 2), torch.tensor([16.0, 16.0]).double(), torch.tensor([0, 0]))[0, 0].item()
    z_hat = 0.333 * (16 - 13) / (1.5 + 1e-3)  # against 0.333 * (16 - 10) / (3 + 1e-3) without it
    assert own == pytest.approx(48 * (math.cos(ANGLE - 0.8 * z_hat) - (0.8 * z_hat + 0.8)), rel=1e-12)


def test_a_batch_of_one_keeps_the_statistics_finite() -> None:
    head = AdaFace(2, 2)
    assert head(descriptor().float(), torch.tensor([7.0]), torch.tensor([0])).isfinite().all()
    assert head.norm_statistics.tolist() == [7, 0]


def test_eval_before_any_training_judges_a_batch_by_itself() -> None:
    head = AdaFace(2, 2).eval()
    result = head(F.normalize(torch.randn(3, 2)), torch.tensor([5.0, 6.0, 7.0]), torch.tensor([0, 1, 1]))
    assert result.isfinite().all()
    assert head.norm_statistics.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_its_margin_and_statistics_in_float32(dtype: torch.dtype) -> None:
    head = AdaFace(4, 3).to(dtype)
    assert (head.weight.dtype, head.norm_statistics.dtype) == (dtype, torch.float32)
    points = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
    points[0] = F.normalize(head.weight.detach())[1]
    points.requires_grad_()
    norms, labels = torch.linspace(80000, 90000, 6), torch.tensor([1, 0, 2, 1, 0, 2])
    for _ in range(3):
        loss = F.cross_entropy(head(points, norms, labels).float(), labels)
    loss.backward()
    assert points.grad is not None
    assert points.grad.isfinite().all()
    assert head.norm_statistics.tolist() == pytest.approx([85000, norms.std().item()])
    assert head.float().norm_statistics.tolist() == pytest.approx([85000, norms.std().item()])


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_does_not_stay_in_the_statistics(norm: float) -> None:
    head = AdaFace(2, 2, t_alpha=0.5)
    points, labels = F.normalize(torch.randn(2, 2)), torch.tensor([0, 1])
    head(points, torch.tensor([8.0, 12.0]), labels)
    head(points, torch.tensor([8.0, norm]), labels)
    assert head.norm_statistics.tolist() == pytest.approx([10, 8**0.5])


def test_training_with_it_tells_identities_apart() -> None:
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(5, 8))
    labels = torch.arange(100) % 5
    points, head = centres[labels] + 0.1 * torch.randn(100, 8), AdaFace(8, 5)
    norms, points = points.norm(dim=1), F.normalize(points)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.3)
    for _ in range(30):
        loss = F.cross_entropy(head(points, norms, labels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    nearest = (points @ F.normalize(head.weight).T).argmax(1)
    assert torch.equal(nearest, labels)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 5), (3,), (3,)), "expected descriptor of shape (B, 4), got (3, 5)"),
        (((4,), (3,), (3,)), "got (4,)"),
        (((0, 4), (1,), (0,)), "expected norm and labels of shape (0,), got (1,) and (0,)"),
        (((3, 4), (3, 1), (3,)), "expected norm and labels of shape (3,), got (3, 1) and (3,)"),
        (((3, 4), (3,), (2,)), "got (3,) and (2,)"),
    ],
)
def test_wrong_shapes_are_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    points, norm, labels = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=re.escape(message)):
        AdaFace(4, 2)(points, norm, labels.long())


@pytest.mark.parametrize(
    "options",
    [{"m": -0.1}, {"m": math.inf}, {"h": 0.0}, {"h": math.nan}, {"s": 0.0}, {"t_alpha": 0.0}, {"t_alpha": 1.5}],
)
def test_wrong_settings_are_refused(options: dict[str, float]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value}")):
        AdaFace(4, 2, **options)
