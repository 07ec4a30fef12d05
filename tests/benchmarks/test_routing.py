"""The simulated fleet: what it computes is what can be counted by hand."""

from __future__ import annotations

import random

import pytest

from benchmarks.lab.fleet import Cache, Fleet, Ours, Plain
from benchmarks.lab.workloads import WORKLOADS, Names, Request
from benchmarks.routing import ideal_hits, simulate


def test_a_prompt_takes_its_tokens_and_waits_for_those_before() -> None:
    """1,600 tokens at 1,000 a second, twice the same and once another, all at once on one."""
    fleet = Fleet(1, 1000.0, 10**6, 16)
    same, other = tuple(range(100)), tuple(range(1000, 1100))
    requests = [Request(0.0, prompt, ()) for prompt in (same, same, other)]
    outcome = fleet.run(requests, Plain("round_robin", 1, random.Random(0)))
    first, second, third = outcome.ttft_s
    assert first == pytest.approx(1.6)
    assert second == pytest.approx(1.6 + 0.016, abs=0.01)  # the last block is computed again
    assert third == pytest.approx(3.2 + 0.016, abs=0.02)
    assert outcome.found_blocks == 99
    assert outcome.computed_tokens == [16 * 201]


def test_the_cache_gives_up_what_was_unused_the_longest() -> None:
    cache = Cache(4)
    cache.keep([1, 2, 3, 4])
    assert cache.found([1, 2, 9]) == 2
    cache.keep([5, 6])
    assert set(cache.blocks) == {1, 2, 5, 6}


def test_the_ideal_is_one_cache_for_all() -> None:
    assert ideal_hits([[1, 2, 3], [1, 2, 4], [1, 2]]) == (3 / 8, 5)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_request_gets_its_first_token_and_nothing_stays_under_way(name: str) -> None:
    fleet = Fleet(4, 4000.0, 2048, 16)
    router = Ours(4, lambda: fleet.now, random.Random(1), "standard")
    outcome = fleet.run(WORKLOADS[name](random.Random(2), Names()), router)
    assert len(outcome.ttft_s) == sum(outcome.requests)
    assert all(replica.in_flight == 0 for replica in router.replicas)
    assert all(replica.waiting_tokens == 0 for replica in router.replicas)


def test_sessions_are_never_all_sent_to_one_replica() -> None:
    """Agents share a system prompt: the plain longest prefix sends all of them to one of four, and
    the gateway gives none more than twice its share."""
    assert max(simulate("agents", "longest_prefix", 1).requests) > 150
    for seed in range(3):
        requests = simulate("agents", "interactive", seed).requests
        assert max(requests) < 2 * sum(requests) / 4
