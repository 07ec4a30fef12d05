"""How far two arms are apart, as people are shown it: against the law, and against draws."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, strategies as st

from gateway.intervals import FEW, median, medians_apart, share, shares_apart

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts, counts)
def test_what_was_seen_lies_within_and_the_other_way_round_is_the_same(
    one: tuple[int, int], other: tuple[int, int]
) -> None:
    a, b = share(*one), share(*other)
    assert a is not None
    assert b is not None
    for found in (a, b):
        assert 0 <= found["low"] <= found["at"] <= found["high"] <= 1
    there, back = shares_apart(a, b), shares_apart(b, a)
    assert there is not None
    assert back is not None
    assert there["low"] <= there["at"] <= there["high"]
    for end, opposite in (("at", "at"), ("low", "high"), ("high", "low")):
        assert there[end] == pytest.approx(-back[opposite], abs=1e-12)


def test_shares_are_as_published() -> None:
    """Newcombe 1998, table II: 56 of 70 less 48 of 80, with 95 % from 0.0524 to 0.3339."""
    found = shares_apart(share(48, 80), share(56, 70))
    assert found is not None
    assert found["low"] == pytest.approx(0.0524, abs=5e-5)
    assert found["high"] == pytest.approx(0.3339, abs=5e-5)
    assert share(0, 0) is None


@pytest.mark.parametrize("n", [FEW, 9, 20, 60, 61, 400])
def test_a_median_is_held_in_95_of_100_draws_or_more(n: int) -> None:
    """By the binomial law of the ranks that are taken."""
    found = median([float(one) for one in range(n)])
    assert found is not None
    low, high = round(found["low"]), round(found["high"])
    held = sum(math.comb(n, k) for k in range(low + 1, high + 1)) / 2**n
    assert held >= 0.95
    assert held <= 0.995 or n <= 20
    assert median([1.0] * (FEW - 1)) is None


def test_two_medians_are_apart_by_what_they_are_in_most_draws() -> None:
    """Skewed times, 150 against 60 of them: the truth is held 93 times in a hundred or more."""
    rng = random.Random(7)
    truth, held, rounds = math.log(2) * (1.3 - 1.0), 0, 400
    for _ in range(rounds):
        one = [rng.expovariate(1.0) for _ in range(150)]
        other = [1.3 * rng.expovariate(1.0) for _ in range(60)]
        found = medians_apart(median(one), median(other))
        assert found is not None
        held += found["low"] <= truth <= found["high"]
    assert held / rounds >= 0.93
    assert medians_apart(None, median([1.0] * 9)) is None
