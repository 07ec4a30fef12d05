"""The choice of a replica, by plain definitions."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import orjson
import pytest
from hypothesis import given, strategies as st

from gateway.replica import Replica
from gateway.route import (
    DELAYED_MAX,
    HINT_S,
    HINT_SHARE,
    TIE_S,
    TIE_SHARE,
    Ask,
    Option,
    decide,
    delayed,
    eligible,
    price,
)

IDLE = Option("a", 0, 0.0, 0, 1 / 4000, 0.001, 0.0)
ASK = Ask(4000, 0, 0.2, 0.0, "cost", 0.5)

costs = st.floats(0, 100, allow_subnormal=False)
options = st.lists(
    st.builds(
        Option,
        st.sampled_from("abcdefgh"),
        st.integers(0, 9),
        st.floats(0, 1e5),
        st.integers(0, 9000),
        st.floats(1e-6, 1e-2),
        st.floats(0, 0.1),
        st.floats(0, 1),
        st.floats(0.1, 10),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda option: option.url,
)
asks = st.builds(
    Ask,
    st.integers(0, 8000),
    st.integers(0, 4000),
    st.floats(0, 4),
    st.floats(0, 4),
    st.sampled_from(["cost", "p2c", "round_robin", "least_loaded"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 10**6),
    st.none() | st.sampled_from("abcdefgh"),
)


def replica(*models: str, healthy: bool = True) -> Replica:
    return Replica("http://x", models={name: {} for name in models}, healthy=healthy)


def test_only_who_is_well_and_serves_the_model_can_be_chosen() -> None:
    """An adapter is a model of its own: who has only its base does not serve it."""
    fleet = [replica("m", healthy=False), replica("other"), replica("m", "m-lora")]
    assert eligible(fleet, "m") == [fleet[2]]
    assert eligible(fleet, "m-lora") == [fleet[2]]
    assert eligible(fleet, "none") == []


def test_equal_costs_are_drawn_by_weight() -> None:
    """An idle fleet shares its first requests instead of sending all of them to the first."""
    free = replace(IDLE, s_per_answer=0.0)
    fleet = [free, replace(free, url="b"), replace(free, url="c", weight=2.0, in_flight=1)]
    rng = random.Random(1)
    counts = Counter(decide(fleet, replace(ASK, draw=rng.random())).at for _ in range(4000))
    assert counts[0] > 800
    assert counts[1] > 800
    assert counts[2] > 1700


def test_work_is_priced_as_well_as_wait() -> None:
    """Cached with a second of work before it, or idle with a second of its own to compute: the
    first, because it computes nothing twice; unless what waits is clearly longer."""
    cached = replace(IDLE, url="cached", cached_tokens=4000, waiting_tokens=4000)
    assert decide([IDLE, cached], ASK).at == 1
    assert decide([IDLE, replace(cached, waiting_tokens=6000)], ASK).at == 0
    assert decide([IDLE, replace(cached, waiting_tokens=6000)], replace(ASK, alpha=1.0)).at == 1


def test_a_beginning_that_all_prompts_share_attracts_nobody() -> None:
    """One replica has it, and all are idle: it is a tie, not a reason."""
    fleet = [replace(IDLE, cached_tokens=512), replace(IDLE, url="b")]
    chosen = {decide(fleet, replace(ASK, draw=draw, common_tokens=512)).at for draw in (0.1, 0.9)}
    assert chosen == {0, 1}


def test_answers_under_way_count_as_what_they_cost() -> None:
    fleet = [replace(IDLE, in_flight=4), replace(IDLE, url="b", in_flight=3)]
    assert decide(fleet, ASK).at == 1


def test_a_busy_replica_is_worth_more_of_its_cache() -> None:
    """Between idle ones, work goes to who has computed less lately."""
    fleet = [replace(IDLE, busy=0.5), replace(IDLE, url="b", busy=0.2)]
    assert decide(fleet, ASK).at == 1


def test_a_session_goes_where_it_was_as_long_as_that_costs_next_to_nothing() -> None:
    fleet = [IDLE, replace(IDLE, url="b", waiting_tokens=100)]
    assert decide(fleet, replace(ASK, hint="b")).at == 1
    fleet = [IDLE, replace(IDLE, url="b", waiting_tokens=1000)]
    assert decide(fleet, replace(ASK, hint="b")).at == 0


def test_the_busier_the_fleet_the_more_keeps_to_where_it_is_cached() -> None:
    """A wait that is not worth it on an idle fleet is worth it on a busy one."""
    fleet = [IDLE, replace(IDLE, url="b", cached_tokens=4000, waiting_tokens=8000)]
    assert decide(fleet, ASK).at == 0
    assert decide(fleet, replace(ASK, delayed=delayed(0.6))).at == 1
    assert [delayed(busy) for busy in (0.0, 0.5, 1.0)] == [0.0, 2.0, DELAYED_MAX]


@given(options, asks)
def test_the_choice_is_the_definition(fleet: list[Option], ask: Ask) -> None:
    """Cost: nobody is cheaper, but for a session's own. Least loaded: nobody has less. Round robin:
    in turn. Two choices: not the busiest, where there are more than one."""
    choice = decide(fleet, ask)
    chosen = fleet[choice.at]
    loads = [(option.in_flight + 1) / option.weight for option in fleet]
    least = min(term.cost_s for term in choice.terms)
    if ask.policy == "round_robin":
        assert choice.at == ask.turn % len(fleet)
    elif ask.policy == "least_loaded":
        assert loads[choice.at] == pytest.approx(min(loads))
    elif ask.policy == "p2c":
        assert len(fleet) == 1 or sorted(loads)[-2] >= loads[choice.at]
    else:
        slack = HINT_S + HINT_SHARE * least if chosen.url == ask.hint else 0.0
        slack = max(slack, TIE_S + TIE_SHARE * least)
        assert choice.terms[choice.at].cost_s <= least + slack


@given(options, asks)
def test_the_same_numbers_give_the_same_choice_also_by_way_of_json(
    fleet: list[Option], ask: Ask
) -> None:
    """A receipt that was written down decides as the gateway did, to the last bit."""
    told = orjson.loads(orjson.dumps({"options": fleet, "ask": ask}))
    again = decide([Option(**one) for one in told["options"]], Ask(**told["ask"]))
    assert again == decide(fleet, ask)


@given(options, asks, st.floats(0, 1e4))
def test_more_work_before_it_never_makes_an_option_cheaper(
    fleet: list[Option], ask: Ask, more: float
) -> None:
    for option in fleet:
        worse = replace(option, waiting_tokens=option.waiting_tokens + more)
        assert price(worse, ask).cost_s >= price(option, ask).cost_s
        cached = replace(option, cached_tokens=option.cached_tokens + 16)
        assert price(cached, ask).cost_s <= price(option, ask).cost_s
