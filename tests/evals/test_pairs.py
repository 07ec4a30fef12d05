"""Pairs of observations: nothing is dropped, nothing is counted twice, order plays no part."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from evals.pairs import AA, BASELINE, CANDIDATE, MISSING, DuplicateRows, pair, pair_control
from telemetry import Observation


def seen(name: str, arm: str, block: int = 0, repeat: int = 0) -> Observation:
    return Observation(name, "suite:x", arm, name, block=block, repeat=repeat)


def test_a_request_without_a_row_in_one_arm_has_failed_there() -> None:
    """Leaving a row out is no way to get better, in either arm."""
    pairs = pair(
        [seen("a", BASELINE), seen("b", BASELINE)], [seen("b", CANDIDATE), seen("c", CANDIDATE)]
    )
    assert [(one.id, one.baseline.ok, one.candidate.ok) for one in pairs] == [
        ("a", True, False), ("b", True, True), ("c", False, True)
    ]  # fmt: skip
    assert pairs[0].candidate.problem == MISSING
    assert pairs[2].baseline.arm == BASELINE


def test_a_missing_row_lies_in_the_block_that_its_partners_lie_in() -> None:
    """Arms run in blocks of different numbers: a missing row makes no block of its own."""
    left = [seen(f"r{n}", BASELINE, block=n // 3 * 2) for n in range(6)]
    right = [seen(f"r{n}", CANDIDATE, block=n // 3 * 2 + 1) for n in range(1, 6)]
    assert {one.block for one in pair(left, right)} == {(0, 1), (2, 3)}


def test_a_block_that_only_one_arm_was_asked_is_no_failure_of_the_other() -> None:
    """A run that stops as soon as it is sure stops between the two."""
    left = [seen(f"r{n}", BASELINE, block=n // 3) for n in range(6)]
    assert len(pair(left, [seen(f"r{n}", CANDIDATE, block=0) for n in range(3)])) == 3
    assert pair(left, []) == ()


def test_an_arm_that_answers_one_request_twice_is_refused() -> None:
    with pytest.raises(DuplicateRows, match="'a', repeat 0, twice"):
        pair([seen("a", BASELINE)] * 2, [seen("a", CANDIDATE)])


def test_repeats_of_a_request_are_pairs_of_their_own() -> None:
    left = [seen("a", BASELINE, repeat=n) for n in range(3)]
    assert len(pair(left, [seen("a", CANDIDATE, repeat=n) for n in range(3)])) == 3


def test_a_control_arm_that_ran_on_a_part_is_paired_on_that_part() -> None:
    """What it was never asked is no failure of it."""
    pairs = pair_control([seen(str(n), BASELINE) for n in range(9)], [seen("4", AA)])
    assert [(one.id, one.complete) for one in pairs] == [("4", True)]


@given(st.permutations(range(12)), st.permutations(range(12)))
def test_the_order_of_observations_plays_no_part(left: list[int], right: list[int]) -> None:
    first = pair([seen(str(n), BASELINE) for n in left], [seen(str(n), CANDIDATE) for n in right])
    rows = range(12)
    assert first == pair(
        [seen(str(n), BASELINE) for n in rows], [seen(str(n), CANDIDATE) for n in rows]
    )
