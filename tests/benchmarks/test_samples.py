"""Statistics of repeated measurements."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest
from hypothesis import given, strategies as st

from benchmarks.lab.samples import (
    mean_interval,
    paired_difference,
    percentile,
    share_interval,
    sign_test,
)

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(VALUES, st.floats(0, 100))
def test_a_percentile_is_what_numpy_says(values, percent):
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-6)


def test_a_percentile_of_nothing_or_beyond_100_is_refused():
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
    with pytest.raises(ValueError, match="0 to 100"):
        percentile([1.0], 101)


def test_a_paired_difference_sees_through_a_drift_that_hides_it_from_medians():
    """The machine slows down by 100 over the run; the second of each pair costs 1 more."""
    noise = random.Random(0)
    first = [at / 2 + noise.gauss(0, 0.1) for at in range(200)]
    second = [value + 1 + noise.gauss(0, 0.1) for value in first]
    found = paired_difference(first, second, random.Random(1))
    assert found.low < 1 < found.high
    assert found.high - found.low < 0.1
    assert found.low <= found.median <= found.high


def test_an_interval_of_equal_series_holds_zero_and_is_repeatable():
    noise = random.Random(0)
    first = [noise.gauss(5, 1) for _ in range(100)]
    second = [noise.gauss(5, 1) for _ in range(100)]
    found = paired_difference(first, second, random.Random(1))
    assert found.low < 0 < found.high
    assert found == paired_difference(first, second, random.Random(1))
    assert found.median == statistics.median(b - a for a, b in zip(first, second, strict=True))


def test_series_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1.0, 2.0], [1.0], random.Random(0))
    with pytest.raises(ValueError, match="no pairs"):
        paired_difference([], [], random.Random(0))


def test_the_interval_of_a_share_is_wilsons():
    """Known values: 0 of 10, and 21 of 600."""
    assert share_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert share_interval(21, 600) == pytest.approx((0.0230, 0.0529), abs=1e-4)
    with pytest.raises(ValueError, match="no share"):
        share_interval(2, 1)


@given(st.integers(0, 200), st.integers(1, 200))
def test_a_share_lies_in_its_interval(hits, more):
    low, high = share_interval(hits, hits + more)
    assert 0 <= low <= hits / (hits + more) <= high <= 1


def test_as_many_losses_as_gains_say_nothing_and_many_more_say_something():
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 5) == 1.0
    assert sign_test(0, 1) == 1.0
    assert sign_test(1, 9) == sign_test(9, 1) == pytest.approx(22 / 1024)


def test_the_interval_of_a_mean_is_as_wide_as_its_groups_are_few():
    """A hundred values of one group are one observation of groups, not a hundred."""
    noise = random.Random(0)
    levels = [noise.gauss(5, 1) for _ in range(40)]
    low, high = mean_interval([100 * one for one in levels], [100] * 40, random.Random(1))
    assert low < statistics.mean(levels) < high
    assert 0.4 < high - low < 0.8
