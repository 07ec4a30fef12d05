"""Metrics: what each counts of one request, and what a request that failed counts as."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.battery import DISAGREE, NOT_MEASURED, TOO_FEW, UNDERPOWERED
from evals.gate import CONTROLS
from evals.metrics import NAMES, UNWANTED, UnknownMetric, metric, share_of
from evals.questions import SUPERIORITY, TESTS
from evals.verdict import EXIT_CODES
from telemetry import Observation


def seen(**known: object) -> Observation:
    return Observation("a", "suite:x", "baseline", "a", **known)  # type: ignore[arg-type]


def test_every_name_that_is_offered_is_known() -> None:
    assert {metric(name).name for name in NAMES} == set(NAMES)


def test_an_unknown_time_or_quantile_is_refused_with_what_is_near() -> None:
    with pytest.raises(UnknownMetric, match=r"did you mean 'ttft.p95'"):
        metric("tftt.p95")
    for wrong in ("ttft", "ttft.p0", "tpot.median"):
        with pytest.raises(UnknownMetric):
            metric(wrong)


def test_any_other_name_is_that_of_a_scorer() -> None:
    correct = metric("correct")
    assert share_of(correct, seen(scores={"correct": 0.5})) == 0.5
    assert share_of(correct, seen(scores={})) is None


def test_a_request_that_failed_is_wrong_and_late_and_bad() -> None:
    """Whatever its scores say: a failure never counts as good."""
    failed = seen(outcome="timeout", ttft_target_s=1.0, scores={"correct": 1.0, "bad_output": 0.0})
    assert share_of(metric("correct"), failed) == 0
    assert share_of(metric("slo_attained"), failed) == 0
    assert share_of(metric("served"), failed) == 0
    assert share_of(metric("bad_output"), failed) == 1


def test_targets_are_kept_when_both_times_are() -> None:
    kept = metric("slo_attained")
    assert share_of(kept, seen(ttft_s=0.9, tpot_s=0.1, ttft_target_s=1.0, tpot_target_s=0.1)) == 1
    assert share_of(kept, seen(ttft_s=0.9, tpot_s=0.2, ttft_target_s=1.0, tpot_target_s=0.1)) == 0
    assert share_of(kept, seen(ttft_s=1.1, ttft_target_s=1.0)) == 0
    assert share_of(kept, seen(ttft_s=1.1)) is None


def test_a_cached_token_costs_a_tenth_and_one_of_the_answer_four() -> None:
    cost = metric("cost").value(seen(prompt_tokens=100, cached_tokens=60, completion_tokens=5))
    assert cost == pytest.approx(40 + 6 + 20)


def test_quantiles_are_read_from_the_name() -> None:
    assert metric("e2e.p7").quantile == 0.07
    assert metric("gap_max.mean").quantile is None


def test_every_metric_test_and_reason_is_described() -> None:
    """docs/verdicts.md is how people read a verdict: what is not there, they cannot look up."""
    text = (Path(__file__).parents[2] / "docs" / "verdicts.md").read_text()
    missing = [name for name in NAMES if f"`{name}`" not in text and name.partition(".")[1] == ""]
    missing += [name for name in TESTS if f"`{name}`" not in text and name != SUPERIORITY]
    missing += [
        name
        for name in (*UNWANTED, UNDERPOWERED, TOO_FEW, NOT_MEASURED, DISAGREE)
        if f"`{name}`" not in text
    ]
    missing += [reason for _, reason in CONTROLS.values() if f"{reason}`" not in text]
    missing += [name for name in EXIT_CODES if f"| `{name}` | {EXIT_CODES[name]} |" not in text]
    assert not missing
