"""Budgets: the best one is found, chances are learned and forgotten, rest is hysteresis."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings, strategies as st

from spec_decode.adapt import (
    CHANCE_MAX,
    FIRST_CHANCE,
    FIRST_LENGTH,
    GROUPS_MAX,
    LOOK_SHARE,
    REST_STEPS_MAX,
    Chances,
    History,
    Lengths,
    Offer,
    Rest,
    best_budget,
)

offers = st.lists(
    st.builds(
        Offer,
        most=st.integers(1, 4),
        rate=st.floats(0.05, 0.98),
        priced=st.booleans(),
        read_s=st.floats(0.0, 0.5),
    ),
    min_size=1,
    max_size=4,
)


def gain(counts, offers, answers, step_s, pass_s, span_s=0.0) -> float:
    """The geometric mean of what one way to share guesses out does for the answers, by its formula;
    those without an offer get a token a step."""
    said = [
        1 + sum(offer.rate**place for place in range(1, count + 1))
        for offer, count in zip(offers, counts, strict=True)
    ]
    priced = [count for offer, count in zip(offers, counts, strict=True) if offer.priced]
    rows = [sum(count > at for count in priced) for at in range(max(priced, default=0))]
    read_s = sum(
        offer.read_s for offer, count in zip(offers, counts, strict=True) if offer.priced and count
    )
    spans_s = span_s * sum(count > 0 for count in counts)
    seconds = step_s(sum(counts)) + sum(map(pass_s, rows)) + read_s + spans_s
    return math.prod(said) ** (1 / answers) * step_s(0) / seconds


@settings(max_examples=200, deadline=None)
@given(
    offers=offers,
    token_s=st.floats(0.01, 1.0),
    span_s=st.sampled_from([0.0, 0.1, 0.5]),
    room=st.integers(0, 16),
)
def test_no_way_to_share_guesses_out_is_faster_where_they_are_looked_up(
    offers, token_s, span_s, room
):
    """Trying every combination finds nothing better than taking those first that give most for what
    they cost; where room runs out, nothing much better."""
    offers = [Offer(one.most, one.rate) for one in offers]
    answers = len(offers) + 1

    def step_s(guesses: int) -> float:
        return 1.0 + token_s * guesses

    budget = best_budget(
        offers, answers, map(step_s, itertools.count()), lambda rows: 0.0, room, span_s=span_s
    )
    assert sum(budget.counts) <= room
    assert budget.gain == pytest.approx(
        gain(budget.counts, offers, answers, step_s, lambda rows: 0.0, span_s)
    )
    every = itertools.product(*(range(one.most + 1) for one in offers))
    # A guess that hardly ever comes to be looked at is not counted: see SURVIVAL_MIN.
    best = max(
        gain(counts, offers, answers, step_s, lambda rows: 0.0, span_s)
        for counts in every
        if sum(counts) <= room
    )
    tight = span_s > 0 and room < sum(one.most for one in offers)
    assert budget.gain >= best * (0.8 if tight else 0.97)


@settings(max_examples=100, deadline=None)
@given(offers=offers, pass_s=st.floats(0.0, 1.0))
def test_what_a_draft_costs_counts_once_a_pass(offers, pass_s):
    """The budget's own account of its time is the formula's, and it never falls below no guess."""

    def step_s(guesses: int) -> float:
        return 1.0 + 0.1 * guesses

    def cost_s(rows: int) -> float:
        return pass_s * (1 + 0.1 * rows)

    budget = best_budget(offers, len(offers), map(step_s, itertools.count()), cost_s, 100)
    assert budget.gain == pytest.approx(gain(budget.counts, offers, len(offers), step_s, cost_s))
    assert budget.gain >= 1


def test_nobody_is_made_slower_for_another_ones_gain():
    """Four answers of which one is foreseen well: its guess would bring 3 % more tokens a second,
    all of them to this one, and make everybody's steps a fifth longer. Alone it gets the guess, and
    so do four like it; beside prompts that wait it does not."""
    good, poor = Offer(1, 0.95), Offer(1, 0.05)

    def budget(*offers, waiting=0):
        steps_s = (1.0 + 0.2 * guesses for guesses in itertools.count())
        return best_budget(offers, len(offers), steps_s, lambda rows: 0.0, 16, waiting=waiting)

    assert budget(good, poor, poor, poor).counts == [0, 0, 0, 0]
    assert budget(good, waiting=3).counts == [0]
    assert budget(good).counts == [1]
    assert budget(*[good] * 4).counts == [1] * 4


def test_the_published_optima_come_out():
    """One answer, draft steps of a twentieth, a tenth and a fifth of the target's (numbers.md)."""
    for share, rate, best, best_gain in (
        (0.05, 0.6, 4, 1.92),
        (0.05, 0.8, 8, 3.09),
        (0.1, 0.6, 3, 1.67),
        (0.1, 0.8, 6, 2.47),
        (0.2, 0.6, 2, 1.40),
        (0.2, 0.8, 4, 1.87),
        (0.4, 0.6, 1, 1.14),
    ):
        budget = best_budget(
            [Offer(15, rate, priced=True)],
            1,
            itertools.repeat(1.0),
            lambda rows, share=share: share,
            15,
        )
        assert abs(budget.counts[0] - best) <= 1  # the optimum is flat
        assert budget.gain == pytest.approx(best_gain, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(rate=st.floats(0.05, 0.95), seed=st.integers(0, 2**32))
def test_chances_are_learned(rate, seed):
    """After a hundred drafts the estimate is near what is true."""
    rng = random.Random(seed)
    chances = Chances()
    for _ in range(100):
        accepted = 0
        while accepted < 5 and rng.random() < rate:
            accepted += 1
        chances.observe(5, accepted)
    assert chances.rate(FIRST_CHANCE) == pytest.approx(rate, abs=0.3)


def test_an_answer_leans_on_its_group_and_the_group_on_everybody():
    """Before it has shown anything, an answer is expected to do what its neighbours did."""
    history, kind = History(), ("ngram", 3)
    assert history.rate(kind, 1, ("chat",)) == FIRST_CHANCE
    for _ in range(50):
        history.observe(kind, 7, ("chat",), 4, 4)
        history.observe(kind, 8, ("code",), 4, 0)
    assert history.rate(kind, 1, ("chat",)) > 0.8
    assert history.rate(kind, 1, ("code",)) < 0.3
    assert 0.2 < history.rate(kind, 1, ("new",)) < 0.8
    for _ in range(20):
        history.observe(kind, 1, ("chat",), 4, 0)
    assert history.rate(kind, 1, ("chat",)) < 0.3, "it has shown that it is different"
    assert history.rate(("ngram", 9), 1, ("chat",)) == FIRST_CHANCE, "another trust"
    history.end(1)
    assert 1 not in history.answers


@given(st.lists(st.tuples(st.integers(1, 15), st.integers(0, 15)), max_size=60))
def test_chances_stay_chances(drafts):
    """Whatever is observed, a chance lies between 0 and the largest that is believed."""
    history, kind = History(), ("draft", 0)
    for guessed, accepted in drafts:
        history.observe(kind, 1, ("a", "b"), guessed, min(guessed, accepted))
    assert 0 <= history.rate(kind, 1, ("a", "b")) <= CHANCE_MAX


def test_what_is_passed_over_is_tried_again_some_day():
    """A kind of guess that was always wrong loses its bad name by not being used."""
    history, kind = History(), ("ngram", 2)
    for _ in range(50):
        history.observe(kind, 1, ("chat",), 3, 0)
    low = history.rate(kind, 2, ("chat",))
    for _ in range(300):
        history.forget([(kind, 1, ("chat",)), (kind, 2, ("chat",))])
    assert low < 0.1
    assert history.rate(kind, 2, ("chat",)) > 0.5


def test_a_gain_that_comes_and_goes_switches_rarely():
    """Between the gain to begin with and the one to stay with nothing is switched."""
    rest = Rest()
    assert not rest.judge(1.03, 8, 0.0)
    assert rest.judge(1.2, 8, 0.0)
    assert all(rest.judge(gain, 8, 0.0) for gain in (1.03, 1.05, 1.02) * 10)
    assert not rest.judge(0.99, 8, 0.0)
    assert not rest.judge(1.03, 8, 0.0)


@given(share=st.floats(0.0, 3.0))
def test_looking_in_vain_takes_next_to_nothing_of_the_time(share):
    """However long a look takes against a step, looks that find nothing take half a per cent."""
    rest = Rest()
    looks = sum(1 for _ in range(5000) if not rest.rests(64) and not rest.judge(1.0, 64, share))
    assert looks * share / 5000 <= 0.005 + share / REST_STEPS_MAX + 16 * share / 5000
    assert share >= LOOK_SHARE or looks == 5000, "and where it costs nothing every step looks"


def test_a_look_that_finds_something_ends_the_pauses():
    """Text that repeats itself now and then is looked at in every step."""
    rest = Rest()
    for _ in range(50):
        assert rest.judge(2.0, 1, 0.1)
        for _ in range(4):
            assert not rest.rests(1)
            assert not rest.judge(1.0, 1, 0.1)


def test_rest_ends_when_the_batch_shrinks():
    """For a smaller batch everything is different: it is looked at at once."""
    rest = Rest()
    for _ in range(2000):
        assert rest.rests(64) or not rest.judge(1.0, 64, 0.5)
    while not rest.rests(64):
        rest.judge(1.0, 64, 0.5)
    assert rest.rests(60), "a batch of about the same size"
    assert not rest.rests(16)
    assert rest.judge(1.5, 16, 0.5)
    assert not any(rest.rests(16) for _ in range(10))


def test_lengths_tell_what_is_to_come():
    """From other answers of the group; one that has outlived them goes on for half its length."""
    lengths = Lengths()
    assert lengths.left("chat", 0, 1000) == FIRST_LENGTH
    for _ in range(100):
        lengths.observe("chat", 20)
    assert lengths.left("chat", 5, 1000) == pytest.approx(15)
    assert lengths.left("chat", 100, 1000) == pytest.approx(50)
    assert lengths.left("chat", 100, 7) == 7
    assert lengths.left("chat", 20, 1) == 1
    for number in range(1000):
        lengths.observe(number, 5)
    assert len(lengths.means) <= GROUPS_MAX
