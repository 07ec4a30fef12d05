"""What is learned of a replica's speed, what is under way there, and what all prompts share."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, strategies as st

from gateway.rates import DEPTHS, Common, Pace, Work


@pytest.mark.parametrize("per_token", [1 / 150, 1 / 4000, 1 / 60000])
def test_a_replicas_speed_is_learned_from_first_tokens(per_token: float) -> None:
    """Within a tenth after a hundred, whatever it is, from guesses that are far off."""
    rng, pace = random.Random(1), Pace()
    for _ in range(100):
        tokens, before = rng.uniform(50, 4000), rng.choice([0, rng.uniform(50, 20000)])
        took_s = tokens * per_token * rng.uniform(0.95, 1.05)
        answers = rng.randrange(12)
        ttft_s = 0.02 + before * per_token + took_s + answers * 0.004
        pace.learn(tokens, took_s, before + tokens, answers, ttft_s)
    assert pace.s_per_token == pytest.approx(per_token, rel=0.1)
    assert pace.factor < 1.5
    assert not pace.wrong


def test_what_requests_under_way_cost_is_learned() -> None:
    """Each adds 10 ms, whatever there is to compute; 30 ms are always spent."""
    rng, pace = random.Random(1), Pace()
    for _ in range(200):
        tokens, answers = rng.uniform(50, 500), rng.randrange(30)
        took_s = tokens / 4000
        pace.learn(tokens, took_s, tokens, answers, 0.03 + took_s + answers * 0.01)
    assert pace.s_per_answer == pytest.approx(0.01, rel=0.1)
    assert pace.fixed_s == pytest.approx(0.03, abs=0.02)


def test_a_wrong_guess_of_what_waits_does_not_spoil_the_rate() -> None:
    """What counts is what was computed between one first token and the next. (Fitted to the whole
    wait, rates ran away from themselves: too fast a rate hid what waits, which hid the rate.)"""
    pace = Pace()
    for _ in range(200):
        pace.learn(1000, 4.0, 1000, 0, 400.0)
    assert pace.s_per_token == pytest.approx(0.004, rel=0.01)


def test_a_model_that_does_not_hold_says_so_and_recovers() -> None:
    """First tokens that have nothing to do with work; later they have again."""
    rng, pace = random.Random(2), Pace()
    for _ in range(60):
        late_s = rng.choice([0.05, 60.0])
        pace.learn(rng.uniform(0, 4000), late_s, rng.uniform(0, 4000), 0, late_s)
    assert pace.wrong
    for _ in range(400):
        work = rng.uniform(100, 4000)
        pace.learn(work, work / 2000, work, 0, work / 2000)
    assert not pace.wrong


seconds = st.floats(0, 1e4)
observations = st.tuples(
    st.floats(1, 1e6), seconds, st.floats(1, 1e7), st.integers(0, 500), seconds
)


@given(st.lists(observations, max_size=80))
def test_what_is_learned_stays_finite_and_positive(seen: list[tuple]) -> None:
    pace = Pace()
    for tokens, took_s, ahead, answers, ttft_s in seen:
        pace.learn(tokens, took_s, ahead, answers, ttft_s)
        assert math.isfinite(pace.foresee_s(ahead, answers))
        assert pace.foresee_s(ahead, answers) >= 0
        assert pace.s_per_token > 0
        assert 0 < pace.s_per_answer <= 0.1
        assert pace.fixed_s >= 0


steps = st.lists(st.tuples(st.sampled_from("br"), st.integers(0, 9), st.floats(0, 5)), max_size=60)


@given(steps)
def test_what_waits_is_what_was_booked_and_not_released(seen: list[tuple[str, int, float]]) -> None:
    """Never less than nothing, never more than all; nothing once all are released, twice or not."""
    work, now, open_ = Work(), 0.0, {}
    for kind, number, later in seen:
        now += later
        if kind == "b":
            open_[work.book(100.0 * number, now)] = 100.0 * number
        elif open_:
            chosen = list(open_)[number % len(open_)]
            work.release(chosen, now)
            work.release(chosen, now)
            del open_[chosen]
        waiting = work.waiting_tokens(now + 0.01, 1 / 1000)
        assert 0 <= waiting <= sum(open_.values())
    for one in open_:
        work.release(one, now)
    assert work.waiting_tokens(now, 1 / 1000) == 0


def test_what_waits_gets_less_as_time_passes_and_no_less_than_nothing() -> None:
    work = Work()
    work.book(4000.0, 10.0)
    assert [work.waiting_tokens(10.0 + s, 1 / 1000) for s in (0, 1, 4, 9)] == [4000, 3000, 0, 0]


def test_busy_is_a_share_that_fades() -> None:
    work = Work()
    for second in range(120):
        work.computed(0.5, float(second))
    assert work.busy(119.0) == pytest.approx(0.5, abs=0.05)
    assert work.busy(119.0 + 300) < 0.001


def hashes(*parts: int) -> tuple[bytes, ...]:
    return tuple(str(parts[: end + 1]).encode() for end in range(len(parts)))


def test_what_most_prompts_begin_with_is_common_and_a_burst_of_equal_ones_is_not() -> None:
    """Forty prompts that share ten blocks; then another beginning, forty times the same prompt."""
    common = Common()
    for number in range(40):
        common.saw(hashes(*range(10), 100 + number, 7))
    assert common.depth(hashes(*range(10), 999)) == max(d for d in DEPTHS if d <= 10)
    for _ in range(400):
        common.saw(hashes(*range(50, 60)))
    assert common.depth(hashes(*range(50, 60))) == 0
    assert common.depth(hashes(*range(10), 999)) > 0


def test_nothing_is_common_before_there_is_evidence() -> None:
    common = Common()
    for number in range(5):
        common.saw(hashes(1, 2, 3, number))
        assert common.depth(hashes(1, 2, 3)) == 0


@given(st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=300))
def test_what_is_counted_is_what_is_in_the_window(prompts: list[list[int]]) -> None:
    common = Common()
    for prompt in prompts:
        common.saw(hashes(*prompt))
    assert sum(common.counts.values()) == sum(map(len, common.window))
    assert all(count > 0 for count in common.counts.values())
