"""What live traffic says of a candidate: harm is found, nothing is found where nothing is."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

from evals.metrics import metric
from evals.monitor import LEARN, Monitor, Signal, signals
from policies.hypothesis import Hypothesis
from telemetry import Observation

SERVED = Signal("served", metric("served"), 0.02)
BAD = Signal("bad_output", metric("bad_output"), 0.02, alone=True)
SLOW = Signal("ttft.p95", metric("ttft.p95"), 0.05, beyond=0.1)


def seen(at: int, arm: str, source: str = "live", **more: Any) -> Observation:
    more = {"scores": {"bad_output": 0.0}, "tier": "standard", "prompt_tokens": 100} | more
    return Observation(f"{at}", source, arm, f"{source} {arm} {at}", **more)


def failed(at: int, arm: str, source: str = "live") -> Observation:
    return seen(at, arm, source, outcome="error", status=502, scores={})


def mirrored(at: int, *, wrong: bool = False) -> list[Observation]:
    """A pair of the shadow, the candidate's answer first or last."""
    other = failed(at, "candidate", "shadow") if wrong else seen(at, "candidate", "shadow")
    pair = [seen(at, "baseline"), other]
    return pair if at % 2 else pair[::-1]


def test_pairs_of_the_shadow_prove_that_nothing_is_lost() -> None:
    """No failure in 300 pairs is proof at a margin of two points, and 30 are not."""
    monitor = Monitor([SERVED, BAD], 0.05)
    for at in range(30):
        for one in mirrored(at):
            monitor.saw(one)
    assert not monitor.passed
    for at in range(30, 300):
        for one in mirrored(at):
            monitor.saw(one)
    assert monitor.pairs == 300
    assert monitor.passed
    assert monitor.harm is None


def test_a_shadow_that_fails_more_is_harmful() -> None:
    monitor = Monitor([SERVED], 0.05)
    for at in range(300):
        for one in mirrored(at, wrong=at % 8 == 0):
            monitor.saw(one)
    assert monitor.harm is not None
    assert "served is worse by more than 0.02" in monitor.harm
    assert not monitor.passed


def live(monitor: Monitor, begin: int, count: int, fails: float, seed: int = 1) -> None:
    """Both arms in turn; the candidate fails at such a share."""
    rng = random.Random(seed)
    for at in range(begin, begin + count):
        monitor.saw(seen(2 * at, "baseline"))
        bad = rng.random() < fails
        monitor.saw((failed if bad else seen)(2 * at + 1, "candidate"))


def test_a_candidate_that_degrades_after_it_was_proved_is_found() -> None:
    """The wealth of a long good time does not hide what a step shows."""
    monitor = Monitor([SERVED], 0.05)
    live(monitor, 0, 2000, 0.0)
    assert monitor.passed
    monitor.next_stage()
    live(monitor, 2000, 400, 0.15)
    assert monitor.harm is not None


def test_a_candidate_that_degrades_long_after_its_last_step_began_is_found() -> None:
    """Thousands of good pairs within one step hide nothing either: it is looked for anew."""
    monitor = Monitor([SERVED], 0.05)
    live(monitor, 0, 3000, 0.0)
    live(monitor, 3000, 600, 0.15)
    assert monitor.harm is not None


def test_a_candidate_that_loses_its_way_in_long_talks_is_found() -> None:
    """One late turn in five fails, and no first one, which alone would count otherwise."""
    for late, harmful in ((0, False), (6, True)):
        monitor, rng = Monitor([SERVED], 0.05), random.Random(2)
        for at in range(300):
            for arm in ("baseline", "candidate"):
                for turn in (0, late):
                    bad = turn and arm == "candidate" and rng.random() < 0.2
                    told = (failed if bad else seen)(at, arm)
                    monitor.saw(replace(told, id=f"{arm} {at} {turn}", turn=turn))
        assert (monitor.harm is not None) == harmful


def test_a_percentile_within_a_time_is_watched_without_the_baseline() -> None:
    """Three of a hundred later than 300 ms, where one may be; and none."""
    prompt = Signal("ttft.p99 within", metric("ttft.p99"), 0.01, alone=True, limit_s=0.3)
    for slow, harmful in ((0.2, False), (0.4, True)):
        monitor = Monitor([prompt], 0.05)
        for at in range(1500):
            taken_s = slow if at % 25 == 0 else 0.1
            monitor.saw(seen(at, "candidate", ttft_s=taken_s))
        assert (monitor.harm is not None, monitor.passed) == (harmful, not harmful)


def test_equal_arms_are_seldom_called_harmful() -> None:
    """Both fail at 5 %: in 40 rollouts of 600 requests there is no alarm to be expected."""
    alarms = 0
    for seed in range(40):
        monitor, rng = Monitor([SERVED], 0.05), random.Random(seed)
        for at in range(300):
            for arm in ("baseline", "candidate"):
                one = failed if rng.random() < 0.05 else seen
                monitor.saw(one(2 * at + (arm == "candidate"), arm))
        alarms += monitor.harm is not None
    assert alarms <= 2


def test_first_tokens_that_come_late_are_harm() -> None:
    """The limit is learned from the baseline; twice its time is beyond it."""
    monitor, rng = Monitor([SLOW], 0.05), random.Random(3)
    for at in range(LEARN):
        monitor.saw(seen(-at - 1, "baseline", ttft_s=0.1 + 0.01 * rng.random()))
    for at in range(200):
        monitor.saw(seen(2 * at, "baseline", ttft_s=0.1 + 0.01 * rng.random()))
        monitor.saw(seen(2 * at + 1, "candidate", ttft_s=0.2 + 0.01 * rng.random()))
    assert monitor.harm is not None
    assert "ttft.p95" in monitor.harm


def test_turns_of_one_conversation_count_once() -> None:
    monitor = Monitor([SERVED], 0.05)
    for at in range(50):
        for arm in ("baseline", "candidate"):
            monitor.saw(Observation(f"{arm} {at}", "live", arm, "one"))
    assert monitor.told()[0]["pairs"] == 1


def test_what_the_client_did_wrong_counts_for_nobody() -> None:
    monitor = Monitor([SERVED], 0.05)
    for at in range(100):
        monitor.saw(seen(2 * at, "baseline"))
        monitor.saw(seen(2 * at + 1, "candidate", outcome="refused", status=400))
    assert monitor.told()[0]["pairs"] == 0


def test_it_goes_on_after_a_restart() -> None:
    """By JSON: the same evidence as without one."""
    whole, first = Monitor([SERVED, BAD], 0.05), Monitor([SERVED, BAD], 0.05)
    for monitor in (whole, first):
        live(monitor, 0, 200, 0.01)
    second = Monitor([SERVED, BAD], 0.05)
    second.go_on(json.loads(json.dumps(first.state())))
    for monitor in (whole, second):
        live(monitor, 200, 200, 0.01, seed=2)
    assert second.told() == whole.told()


def test_guardrails_become_signals_and_those_without_an_answer_are_told() -> None:
    hypothesis = Hypothesis.model_validate(
        {
            "apiVersion": "headgate/v1",
            "kind": "Hypothesis",
            "metadata": {"name": "h"},
            "baseline": {"config": "a.yaml"},
            "candidate": {"patch": {"runtime.kv": "int8"}},
            "kind_of_change": "lossy_model",
            "guardrails": [
                {"suite": "s", "metric": "correct", "test": "paired_ni", "margin": 0.02},
                {"replay": "r", "metric": "slo_attained", "test": "paired_ni", "margin": 0.01},
                {"replay": "r", "metric": "bad_output", "test": "rate_max", "max": 0.002},
                {"replay": "r", "metric": "ttft.p95", "test": "ratio_ni", "margin": 0.1},
            ],
        }
    )
    found, unseen = signals(hypothesis)
    assert [one.name for one in found] == ["slo_attained", "bad_output", "ttft.p95", "served"]
    assert [one.alone for one in found] == [False, True, False, False]
    assert unseen == ["correct"]
