"""How often the kernels load the rows, counted load by load in the interpreter."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("loads can be counted in the interpreter only", allow_module_level=True)

from side_by_side import side_by_side

from benchmarks.checks import reads
from fcn_kernels.device.splits import COOPERATIVE
from fcn_kernels.selection.kernels import launch
from fcn_kernels.selection.kernels.common import RESIDENT_TIER

ROWS, K = 64, 3
ALONE = 1 / ROWS  # a pick's row, loaded by itself


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], reads.Reads]:
    return {(r.tier, r.given): r for r in reads.measure(ROWS, K)}


@pytest.mark.parametrize("given", reads.CALLS)
@pytest.mark.parametrize("tier", ["resident", "ragged, set that fits"])
def test_a_set_that_fits_is_read_once(measured: dict, tier: str, given: str) -> None:
    r = measured[tier, given]
    assert r.forward == 1 + K * ALONE
    # once for all steps, once beside the gradient that is written, in tiles that each need the picks' rows
    tiles = ROWS // (launch.WRITE_ELEMENTS * 32 // 16)
    assert 2 < r.backward <= 2 + (tiles * (K - 1) + 2 * K) * ALONE


@pytest.mark.parametrize("tier", ["ragged, larger set", "streaming"])
def test_a_streamed_set_is_read_once_a_distance(measured: dict, tier: str) -> None:
    assert measured[tier, "quality"].forward == K - 1 + (K + 1) * ALONE  # the first pick's row is looked at before
    assert measured[tier, "norms"].forward == K + K * ALONE
    assert measured[tier, "norms, start"].forward == K - 1 + 2 * K * ALONE  # the start's row is looked at each step
    assert K < measured[tier, "quality"].backward < K + 0.25
    assert K + 1 < measured[tier, "norms"].backward < K + 1.25


def test_parts_read_what_the_set_would(measured: dict) -> None:
    """Each of the two parts, and in LAUNCHES each launch, loads the picks' rows for itself."""
    assert K - 1 < measured["split", "quality"].forward < K - 1 + 2 * (K + 1) * ALONE + ALONE
    assert K < measured["split", "norms"].forward < K + 2 * K * ALONE + ALONE
    assert K - 1 < measured["split", "norms, start"].forward < K - 1 + 4 * K * ALONE + ALONE
    assert K < measured["split", "quality"].backward < K + 0.75


def test_parts_that_hold_their_rows_read_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes a set of 8,000 rows one read on an H100."""
    held = launch.Plan(RESIDENT_TIER.value, ROWS // 2, 16, 1, 2, COOPERATIVE.value)
    monkeypatch.setattr(launch, "forward_plan", lambda *sizes: held)
    with side_by_side():
        forward, _ = reads.passes(ROWS, K)
    assert forward == 1 + 2 * K * ALONE


def test_the_count_counts() -> None:
    """A tensor that nothing loads, and one that is loaded whole: a set of one row, picked once."""
    once, _ = reads.passes(1, 1)
    assert once == 2  # the tile, and the pick
