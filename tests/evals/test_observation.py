"""Observations and verdicts survive the way over JSON."""

from __future__ import annotations

import json

import pytest

from evals.verdict import Control, Finding, Side, Verdict
from telemetry import Observation


def test_an_observation_comes_back_from_json_as_it_was() -> None:
    """What is at its default is left out on the way."""
    plain = Observation("a-1", "suite:x", "baseline", "a")
    assert plain.payload() == {
        "id": "a-1", "source": "suite:x", "arm": "baseline", "cluster": "a"
    }  # fmt: skip
    full = Observation(
        "a-1", "suite:x", "candidate", "a", outcome="timeout", status=504, ttft_s=0.25,
        token_ids=(1, 2), tool_calls=({"name": "f"},), scores={"exact": 0.0},
    )  # fmt: skip
    for one in (plain, full):
        assert Observation.of(json.loads(json.dumps(one.payload()))) == one


def test_an_unknown_field_of_an_observation_is_an_error() -> None:
    with pytest.raises(TypeError, match="colour"):
        Observation.of({"id": "a", "source": "live", "arm": "a", "cluster": "a", "colour": 1})


def test_a_verdict_comes_back_from_json_as_it_was() -> None:
    finding = Finding(
        "guardrail 1", "guardrail", "suite:x", "correct", "all", "paired_ni", "tango", "difference",
        200, 200, 3, 2, 0.9, 0.895, -0.005, -0.02, 0.01, -0.02, 0.05, 0.04, "pass",
    )  # fmt: skip
    side = Side("root", {"weights": "w"})
    verdict = Verdict(
        "h", "pass", "", ("all guardrails hold",), (finding,), (Control("aa", ok=True),),
        side, side, side, 1.0, None, "lossy_model", {"order": "abba"}, {"alpha": 0.05}, {"x": "1"},
    )  # fmt: skip
    assert Verdict.of(json.loads(json.dumps(verdict.payload()))) == verdict
    assert verdict.exit_code == 0
