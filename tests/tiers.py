"""The Triton launchers' tiers, forced upon small sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from oracle import Outcome, outcome, select_on, weights_for
from poison import poisoned
from problems import Case

from fcn_kernels.device.splits import COOPERATIVE, LAUNCHES
from fcn_kernels.selection.kernels import launch
from fcn_kernels.selection.kernels.plans import Plan

TIERS = ("whole", "two lengths", "split")


def plans_of(tier: str, dim: int) -> tuple[Plan, ...]:
    """Tiles of 4 rows and 16 columns, so that small sets are walked in several; 3 parts of a set where it is split."""
    plan = Plan(4, 16, -(-dim // 16), 1, block_r=8)
    return {
        "whole": (plan,),
        "two lengths": (
            plan._replace(shortest=7, look=2),
            plan._replace(block_n=2, longest=6, last=3),
        ),
        "split": (plan._replace(parts=3, split=LAUNCHES.value),),
        "split at barriers": (plan._replace(parts=3, split=COOPERATIVE.value),),
    }[tier]


@contextmanager
def forced(tier: str, backward: str | None = None) -> Iterator[None]:
    """Launch by these plans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "forward_plans", lambda sizes, *_: plans_of(tier, sizes.dim))
        patch.setattr(
            launch,
            "backward_plans",  # in which no program looks through sets for its own
            lambda sizes, *_: tuple(plan._replace(look=0) for plan in plans_of(backward or tier, sizes.dim)),
        )
        yield


def run(case: Case, tier: str = "whole") -> Outcome:
    with forced(tier), poisoned():
        return outcome(select_on("triton"), case, weights_for(case))
