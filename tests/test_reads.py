"""How often the kernels load the rows, counted load by load in the interpreter."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("loads can be counted in the interpreter only", allow_module_level=True)

from benchmarks.checks import reads

ROWS, K = 64, 3
ALONE = 1 / ROWS  # a pick's row, loaded by itself


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], reads.Reads]:
    return {(r.way, r.given): r for r in reads.measure(ROWS, K)}


def test_rows_are_read_once_a_distance(measured: dict) -> None:
    assert measured["whole", "quality"].forward == K - 1 + (K + 1) * ALONE  # the first pick's row is looked at before
    assert measured["whole", "norms"].forward == K + K * ALONE
    assert measured["whole", "norms, start"].forward == K - 1 + (K + 1) * ALONE
    assert measured["whole", "squared distances"].forward == K - 1 + (K + 1) * ALONE
    assert measured["whole", "squared distances, state"].forward == K + (K + 1) * ALONE
    assert measured["whole", "quality"].backward == K + K * ALONE
    assert measured["whole", "norms"].backward == K + 1 + K * ALONE
    assert measured["whole", "norms, start"].backward == K + K * ALONE
    # each pass loads the pick from which it sees its rows
    assert measured["whole", "squared distances"].backward == K + 3 * K * ALONE


def test_a_set_of_one_tile_is_read_once(measured: dict) -> None:
    """And the picks, each by itself, when they are written."""
    assert {r.forward for r in measured.values() if r.way == "held"} == {1 + K * ALONE}


def test_parts_read_what_the_set_would(measured: dict) -> None:
    """Each of the two parts, and in LAUNCHES each launch, loads the picks' rows for itself."""
    assert measured["split", "quality"].forward == K - 1 + 2 * (K + 1) * ALONE
    assert measured["split", "norms"].forward == K + 2 * K * ALONE
    assert K < measured["split", "quality"].backward < K + 2 * (K + 3) * ALONE
    assert K + 1 < measured["split", "norms"].backward < K + 1 + 2 * (K + 3) * ALONE


def test_rows_that_cannot_win_are_not_read() -> None:
    """After the first picks less than a quarter of 128 rows a pick."""
    rows, k, eager = 128, 16, 4
    every, some = reads.many_picks(rows, k, eager=eager)
    assert every > k - 1
    assert eager < some < eager + (k - eager) / 4
    assert some < every / 2


def test_the_count_counts() -> None:
    """A tensor that nothing loads, and one that is loaded whole: a set of one row, picked once."""
    once, _ = reads.passes(1, 1)
    assert once == 2  # the tile, and the pick


def test_clustering_reads_rows_for_the_shares_and_for_the_sums() -> None:
    found = {r.call: (r.forward, r.backward) for r in reads.measure_clustering()}
    assert found == {
        "sums": (2, 2),
        "sums, keys and scale": (2, 1),  # forward, first for elements that are not finite
        "chunks": (2, 3),  # norms and sums; norms again, the shares' gradients, and that of the norms
        "chunks, norms given": (2, 1),  # forward, first for elements that are not finite
        "small chunks": (2, 3),
        "small chunks, norms given": (1, 1),  # elements that are not finite show in the sums
    }
