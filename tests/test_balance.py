"""The order in which packed sets are started."""

import pytest

from benchmarks.balance import slowdown
from benchmarks.workloads import IJBC_ROWS, IJBC_SETS, template_lengths


def test_slowdown_of_known_schedules() -> None:
    assert slowdown([1, 1, 1, 1], places=2) == 1
    assert slowdown([1, 1, 2], places=2) == pytest.approx(1.5)  # 1 | 1, then 2 beside nothing: 3 of 2
    assert slowdown([2, 1, 1], places=2) == 1


def test_longest_first_is_even_at_the_size_of_ijbc() -> None:
    lengths = template_lengths(IJBC_SETS, IJBC_ROWS)
    assert slowdown(sorted(lengths, reverse=True)) < 1.01
    assert slowdown(lengths) > 1.2  # why they are sorted
