"""Changes together: what each adds to the others, and what is left over."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evals.matrix import FULL, Effect, Matrix, arms_of, matrix, without
from evals.pairs import BASELINE
from policies.hypothesis import Hypothesis
from telemetry import Observation
from tests.evals.simulated import CORRECT, TTFT, hypothesis, replayed, suite

LENGTH = {"replay": "week", "metric": "output_tokens", "test": "tost", "margin": 0.1}


def stack(*names: str) -> list[Hypothesis]:
    return [
        hypothesis(metadata={"name": name}, claims=[], guardrails=[CORRECT, TTFT, LENGTH])
        for name in names
    ]


def rows(arm: str, lost: set[int], slower: float = 1.0, longer: float = 1.0) -> list[Observation]:
    """An arm that gets these tens of rows wrong."""
    told = [
        replace(one, scores={"correct": float(int(one.id[1:]) // 10 not in lost)})
        for one in suite(arm)
    ]
    return [
        *told,
        *(
            replace(one, completion_tokens=round(100 * longer * (1 + int(one.id[1:]) % 5)))
            for one in replayed(arm, slower)
        ),
    ]


def found(effects: tuple[Effect, ...], metric: str, of: str) -> Effect:
    return next(one for one in effects if (one.metric, one.of) == (metric, of))


def judged(additive: bool) -> Matrix:
    """A loses rows of two tens, B of another two; B is faster by a fifth. Not additive: together
    they lose six tens more, and are as fast as nothing."""
    a, b = {0, 1}, {2, 3}
    both = a | b if additive else a | b | {4, 5, 6, 7, 8, 9}
    seen = [
        *rows(BASELINE, set()),
        *rows(without("b"), a, longer=1.5),
        *rows(without("a"), b, 0.8),
        *rows(FULL, both, 0.8 if additive else 1.0, 1.5),
    ]
    return matrix(stack("a", "b"), seen)


def test_a_stack_takes_an_arm_more_than_changes_and_one_with_all() -> None:
    assert arms_of(("a", "b")) == (BASELINE, FULL, "without a", "without b")


def test_changes_that_add_up_have_no_interaction() -> None:
    made = judged(additive=True)
    assert found(made.total, "correct", "together").estimate == pytest.approx(-0.1)
    assert found(made.marginal, "correct", "a").estimate == pytest.approx(-0.05)
    assert found(made.marginal, "correct", "b").estimate == pytest.approx(-0.05)
    left = found(made.interaction, "correct", "interaction")
    assert left.estimate == pytest.approx(0.0, abs=1e-9)
    assert found(made.marginal, "ttft.p50", "a").estimate == pytest.approx(1.0, abs=0.05)
    assert found(made.marginal, "ttft.p50", "b").estimate == pytest.approx(0.8, abs=0.05)
    assert found(made.marginal, "output_tokens", "a").estimate == pytest.approx(1.5)
    assert found(made.interaction, "output_tokens", "interaction").estimate == pytest.approx(1.0)
    speed = found(made.interaction, "ttft.p50", "interaction")
    assert speed.low is not None and speed.high is not None and speed.low < 1 < speed.high


def test_changes_that_get_in_each_others_way_are_seen() -> None:
    """Each alone loses 5 points, together they lose 25: each takes 20 from the other's stack."""
    made = judged(additive=False)
    assert found(made.total, "correct", "together").estimate == pytest.approx(-0.25)
    left = found(made.interaction, "correct", "interaction")
    assert left.estimate == pytest.approx(-0.4 + 0.25)
    assert left.high is not None and left.high < 0
    speed = found(made.interaction, "ttft.p50", "interaction")
    assert speed.estimate == pytest.approx(1.25, rel=0.1)
    assert speed.low is not None and speed.low > 1


def test_what_arms_think_of_a_text_is_added_up_too() -> None:
    """KL of the baseline's law, known before: 0.1 by one, 0.3 by the other, 0.5 by both;
    a judge's scores are shares as others are."""
    drift = {"suite": "qa", "metric": "kl", "test": "mean_max", "max": 0.5}
    stacked = [
        hypothesis(metadata={"name": name}, claims=[], guardrails=[drift]) for name in ("a", "b")
    ]
    told = {BASELINE: 0.0, without("b"): 0.1, without("a"): 0.3, FULL: 0.5}
    rows = [one for arm, kl in told.items() for one in suite(arm, 60, scores={"kl": kl})]
    made = matrix(stacked, rows)
    assert found(made.total, "kl", "together").estimate == pytest.approx(0.5)
    assert found(made.marginal, "kl", "a").estimate == pytest.approx(0.2)
    assert found(made.marginal, "kl", "b").estimate == pytest.approx(0.4)
    assert found(made.interaction, "kl", "interaction").estimate == pytest.approx(0.1)
    assert "+0.5 [+0.5, +0.5]" in made.table()
    few = matrix(stacked, [one for one in rows if int(one.id[1:]) < 5])
    assert "at least 20 are needed" in found(few.total, "kl", "together").why


def test_what_nobody_measured_is_told_as_such() -> None:
    made = matrix(stack("a", "b"), [*suite(BASELINE), *suite(FULL)])
    assert found(made.marginal, "correct", "a").estimate is None
    assert "nothing measured" in made.table() or "says anything" in made.table()


def test_the_table_has_a_line_for_each_change_and_for_what_is_left() -> None:
    said = judged(additive=True).table()
    assert "qa correct\n  a " in said
    assert "-5.00 points" in said
    assert said.count("only together") == 3
