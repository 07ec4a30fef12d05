"""What replicas can take, learned: prompts by the rate of first tokens, places by their pace."""

from __future__ import annotations

import math

from gateway.capacity import Capacity
from gateway.queues import Room
from gateway.usage import Usage, usage_of


def read(capacity: Capacity, tokens: int, took_s: float, now: float, *, waiting: bool) -> float:
    capacity.reading(now)
    capacity.read(tokens, now + took_s, waiting=waiting, idle=True)
    return now + took_s


def test_nothing_is_held_back_before_anything_is_known() -> None:
    assert Capacity().room([64, 64], 0.5) == Room(128, 4, math.inf)
    assert Capacity().room([], 0.5).places == 0


def test_prompts_are_held_back_by_the_rate_that_was_seen_under_load() -> None:
    """4,000 tokens a second and a target of 500 ms: 1.5 times what is read in an eighth second."""
    capacity, now = Capacity(), 0.0
    for _ in range(100):
        now = read(capacity, 400, 0.1, now, waiting=True)
    assert capacity.rate is not None
    assert abs(capacity.rate - 4000) < 1
    assert capacity.room([64], 0.5).tokens == 1.5 * capacity.rate * 0.125
    assert capacity.room([64], None).tokens == 1.5 * capacity.rate


def test_a_quiet_time_teaches_no_lower_rate() -> None:
    """Replicas with little to do show less than they can."""
    capacity, now = Capacity(), 0.0
    for _ in range(50):
        now = read(capacity, 400, 0.1, now, waiting=True)
    for _ in range(50):
        now = read(capacity, 10, 0.1, now + 1, waiting=False)
    assert capacity.rate is not None
    assert capacity.rate > 3900


def test_places_are_given_up_while_tokens_are_slow_and_come_back() -> None:
    capacity, now = Capacity(), 0.0
    capacity.answered(0.010, 0.030, now, full=True)
    for _ in range(100):
        now += 0.2
        capacity.answered(0.060, 0.030, now, full=True)
    assert capacity.room([64], None).places < 32
    for _ in range(400):
        now += 0.5
        capacity.answered(0.012, 0.030, now, full=True)
    assert capacity.room([64], None).places == 64


def test_a_target_that_no_replica_can_keep_costs_no_places() -> None:
    """50 ms at best, 30 promised: fewer at once would not help."""
    capacity = Capacity()
    for step in range(100):
        capacity.answered(0.055 if step else 0.050, 0.030, float(step), full=True)
    assert capacity.share == 1.0


def test_usage_is_read_from_the_end_of_a_stream_or_a_body() -> None:
    event = (
        b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,'
        b'"total_tokens":10,"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
    )
    assert usage_of([b"data: {}\n\n", event, b"data: [DONE]\n\n"]) == Usage(
        7, 3, 4, total_tokens=10
    )
    assert usage_of([event[:40], event[40:]]) == Usage(7, 3, 4, total_tokens=10)
    assert usage_of([b'{"usage": {"prompt_tokens": 7}, "x": 1}']) == Usage(7, 0, None)
    assert usage_of([b'data: {"usage":null}']) is None
    assert usage_of([]) is None


def test_a_text_that_looks_like_usage_is_none() -> None:
    """Inside a JSON string the quotes are escaped."""
    text = rb'{"content":"\"usage\": {\"prompt_tokens\": 9, \"completion_tokens\": 9}"}'
    assert usage_of([text]) is None
    real = text + b',"usage":{"prompt_tokens":1,"completion_tokens":2}'
    assert usage_of([real]) == Usage(1, 2, None)
