"""Least loaded, by the plain definition."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, strategies as st

from gateway.replica import Replica
from gateway.route import choose


def replica(in_flight: int, *models: str, healthy: bool = True) -> Replica:
    return Replica(
        "http://x", models={name: {} for name in models}, healthy=healthy, in_flight=in_flight
    )


def test_the_replica_with_the_least_in_flight_is_chosen() -> None:
    """Of three that serve the model, the one with the fewest requests takes the next."""
    fleet = [replica(2, "m"), replica(1, "m"), replica(3, "m")]
    assert choose(fleet, "m", random.Random(0)) is fleet[1]


def test_ties_are_broken_at_random() -> None:
    """An idle fleet shares its first requests instead of sending all of them to the first."""
    fleet = [replica(0, "m") for _ in range(4)]
    rng = random.Random(1)
    counts = Counter(fleet.index(choose(fleet, "m", rng)) for _ in range(4000))
    assert min(counts.values()) > 800


def test_nothing_is_chosen_where_nothing_serves() -> None:
    """Down, or another model: both leave no choice."""
    fleet = [replica(0, "m", healthy=False), replica(0, "other")]
    assert choose(fleet, "m", random.Random(0)) is None
    assert choose([], "m", random.Random(0)) is None


def test_load_is_by_weight() -> None:
    """Twelve requests at once over weights 1 and 3: three and nine."""
    fleet = [replica(0, "m"), replica(0, "m")]
    fleet[1].weight = 3.0
    for _ in range(12):
        chosen = choose(fleet, "m", random.Random(0))
        assert chosen is not None
        chosen.in_flight += 1
    assert [one.in_flight for one in fleet] == [3, 9]


fleets = st.lists(
    st.builds(
        lambda load, models, healthy: replica(load, *models, healthy=healthy),
        st.integers(0, 5),
        st.sets(st.sampled_from("abc")),
        st.booleans(),
    ),
    max_size=8,
)


@given(fleets, st.sampled_from("abc"), st.integers(0, 2**32))
def test_the_choice_is_a_least_loaded_healthy_server_of_the_model(
    fleet: list[Replica], model: str, seed: int
) -> None:
    """For every fleet: an eligible replica, none with less; nothing only if there is none."""
    eligible = [r for r in fleet if r.healthy and model in r.models]
    chosen = choose(fleet, model, random.Random(seed))
    if not eligible:
        assert chosen is None
    else:
        assert chosen in eligible
        assert chosen.in_flight == min(r.in_flight for r in eligible)
