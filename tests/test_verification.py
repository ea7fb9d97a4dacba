"""ROC and TAR at FAR: against cases counted by hand and against brute force over all thresholds."""

from __future__ import annotations

import math

import pytest
import torch

from fcn_kernels.evaluation import verification
from fcn_kernels.evaluation.verification import FARS, roc, roc_of

metrics = pytest.importorskip("sklearn.metrics")
np = pytest.importorskip("numpy")

GENUINE = [0.9, 0.8, 0.55, 0.35]
IMPOSTOR = [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, -0.1, -0.2]


def curve(genuine: list[float], impostor: list[float]) -> verification.Roc:
    labels = torch.tensor([True] * len(genuine) + [False] * len(impostor))
    return roc(torch.tensor(genuine + impostor), labels)


def test_tar_at_far_counted_by_hand() -> None:
    # 1 false accept leaves room down to 0.61: two genuine pairs; 2 down to 0.51: three; 4 down to 0.31: all four
    assert curve(GENUINE, IMPOSTOR).tar_at([0.1, 0.15, 0.2, 0.3, 0.4, 1.0]) == [0.5, 0.5, 0.75, 0.75, 1.0, 1.0]


def test_a_far_below_one_false_accept_is_not_a_number() -> None:
    tars = curve(GENUINE, IMPOSTOR).tar_at([0.0999, 0.1])
    assert math.isnan(tars[0])
    assert tars[1] == 0.5
    by_default = curve(GENUINE, IMPOSTOR).tar_at()
    assert [math.isnan(tar) for tar in by_default] == [far < 0.1 for far in FARS]


@pytest.mark.parametrize("negatives", [10, 1000, 30_000])
def test_a_far_of_exactly_one_false_accept_is_measured(negatives: int) -> None:
    separate = curve([1.0, 0.9], [0.8] + [0.1] * (negatives - 1))
    assert separate.negatives == negatives
    assert separate.tar_at([1 / negatives]) == [1.0]


def test_roc_begins_with_no_accept_and_ends_with_all() -> None:
    made = curve(GENUINE, IMPOSTOR)
    assert (made.far[0], made.tar[0], made.threshold[0]) == (0, 0, math.inf)
    assert (made.far[-1], made.tar[-1]) == (1, 1)
    assert (made.far.diff() >= 0).all()
    assert (made.tar.diff() >= 0).all()
    assert (made.threshold.diff() < 0).all()
    assert made.far.dtype == torch.float64


def test_tied_scores_are_accepted_together() -> None:
    assert curve([0.5] * 4, [0.5] * 10).tar_at([0.1, 0.9, 1.0]) == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_does_better(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(30, (300,), generator=generator).double() / 30  # with ties
    genuine = torch.rand(300, generator=generator) < scores
    made = roc(scores, genuine)
    for far in (0.02, 0.1, 0.5):
        tars = [
            (scores[genuine] >= threshold).double().mean().item()
            for threshold in [*scores.unique().tolist(), math.inf]
            if (scores[~genuine] >= threshold).double().mean().item() <= far
        ]
        assert made.tar_at([far]) == [max(tars)]


@pytest.mark.parametrize("genuine_share", [0.02, 0.5, 0.98])
def test_the_corners_are_those_of_scikit_learns_curve(genuine_share: float) -> None:
    generator = torch.Generator().manual_seed(7)
    genuine = torch.rand(2000, generator=generator) < genuine_share
    scores = (torch.randn(2000, generator=generator) + genuine).mul(50).round() / 50  # with ties
    made = roc(scores, genuine)
    far, tar, thresholds = metrics.roc_curve(genuine.numpy(), scores.numpy(), drop_intermediate=False)
    points = set(zip(far.tolist(), tar.tolist(), thresholds.tolist(), strict=True))
    ours = list(zip(made.far.tolist(), made.tar.tolist(), made.threshold.tolist(), strict=True))
    assert set(ours) <= points
    # what lies between two of ours only lets more impostors in
    before = (made.threshold >= torch.from_numpy(thresholds)[:, None]).sum(1) - 1
    assert torch.equal(made.tar[before], torch.from_numpy(tar))
    fars = [0.05, 0.1, 0.3]
    assert made.tar_at(fars) == [float(tar[far <= wanted].max()) for wanted in fars]
    for wanted, tar_there, threshold in zip(fars, made.tar_at(fars), made.threshold_at(fars), strict=True):
        assert (scores[genuine] >= threshold).double().mean() == tar_there
        assert (scores[~genuine] >= threshold).double().mean() <= wanted


@pytest.mark.parametrize(
    ("genuine", "impostor", "expected"),
    [
        ([0.9, 0.8], [0.1, 0.2], 0.0),
        ([0.1, 0.2], [0.8, 0.9], 1.0),
        (GENUINE, IMPOSTOR, 0.25),  # at 0.5, three of ten are accepted and one of four is not: on the step to there
        ([0.5], [0.5], 0.5),
        ([0.9, 0.5, 0.5, 0.5], [0.5, 0.1, 0.1, 0.1], 3 / 16),  # on the line of a tie, from (0, 3/4) to (1/4, 0)
    ],
)
def test_equal_error_rate_by_hand(genuine: list[float], impostor: list[float], expected: float) -> None:
    assert curve(genuine, impostor).eer() == pytest.approx(expected, abs=1e-12)


def test_pairs_that_are_never_accepted_count() -> None:
    made = roc_of(np.array([0.9, 0.05]), np.array([0.5, 0.1]), missed=2)
    assert made.tar_at([0.5, 1.0]) == [0.25, 0.5]
    assert roc_of(np.array([]), np.array([0.5]), missed=1).tar_at([1.0]) == [0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="expected finite scores, got 1 that are not"):
        curve([0.5, bad], [0.1])
    with pytest.raises(ValueError, match="expected pairs of both kinds, got 1 genuine and 0"):
        curve([0.5], [])
