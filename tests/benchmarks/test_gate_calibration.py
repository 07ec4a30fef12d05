"""What the calibration counts is what gates decide: its shortcuts say what the product says."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.lab import calibrating, calibrating_growth, gates
from evals.battery import answer
from evals.pairs import AA, BASELINE, CANDIDATE, Pair
from evals.questions import questions
from evals.stats.clustered import cluster_tango
from evals.stats.sequential import EProcess
from evals.stats.tango import tango
from policies.hypothesis import Hypothesis, Stats
from telemetry import Observation

ALPHA = calibrating.ALPHA


@pytest.mark.parametrize(("n", "flips", "margin"), [(50, 0.06, 0.05), (310, 0.03, 0.02)])
def test_a_table_that_reaches_the_critical_statistic_passes(
    n: int, flips: float, margin: float
) -> None:
    lost, gained = gates.flips(np.random.default_rng(1), 40, n, flips, -margin / 2)
    passes = calibrating._passes(lost, gained, n, margin)
    exact = [
        tango(int(b), int(c), n, -margin).p <= ALPHA for b, c in zip(lost, gained, strict=True)
    ]
    assert passes.tolist() == exact
    assert 0 < sum(exact) < 40


def test_clusters_pass_whether_their_p_is_exact_or_only_on_the_same_side_of_alpha() -> None:
    """Few of the clusters have a flip, so that p would be exact in each."""
    sizes, margin = np.full(60, 10), 0.02
    drawn = gates.clustered_flips(np.random.default_rng(2), 30, sizes, 0.02, -0.005, 0.3)
    p = calibrating._cluster_p(*drawn, sizes, margin)
    names = np.repeat(np.arange(60), 10).tolist()
    for lost, gained, one in zip(*drawn, p, strict=True):
        values = np.concatenate(
            [
                [-1.0] * b + [1.0] * c + [0.0] * (10 - b - c)
                for b, c in zip(lost, gained, strict=True)
            ]
        )
        assert (one <= ALPHA) == (cluster_tango(values, names, -margin).p <= ALPHA)


def test_a_sequence_is_proven_at_the_pair_at_which_an_e_process_proves_it() -> None:
    drawn = calibrating._sequence(np.random.default_rng(3), 3, 0.12, 0.0)
    for row, first in zip(drawn, calibrating._first(drawn, -0.05), strict=True):
        process = EProcess(-0.05)
        for diff in row[: int(first) - 1]:
            process.update(float(diff))
        assert not process.pass_at(ALPHA)
        process.update(float(row[int(first) - 1]))
        assert process.pass_at(ALPHA)


@pytest.mark.parametrize(
    ("own", "rate", "decided"),
    [
        (0.0, 0.0, "pass"),
        (0.0, 0.1, "fail"),
        (0.004, 0.002, "pass"),
        (0.05, 0.08, "inconclusive"),
        (0.05, 0.4, "fail"),
    ],
)
def test_whether_answers_are_the_same_is_decided_as_in_a_gate(
    own: float, rate: float, decided: str
) -> None:
    """Where the baseline never differs from itself, seldom, and often."""
    rng = np.random.default_rng(4)
    again = np.arange(calibrating_growth.CONTROLLED) < own * calibrating_growth.CONTROLLED
    differs = rng.random(calibrating_growth.ROWS) < rate
    found = calibrating_growth._identity(again, differs, 0.02)
    asked = Hypothesis.model_validate(
        {
            "apiVersion": "headgate/v1",
            "kind": "Hypothesis",
            "metadata": {"name": "same"},
            "baseline": {"url": "http://a"},
            "candidate": {"url": "http://b"},
            "kind_of_change": "lossless_exact",
            "guardrails": [
                {"suite": "s", "metric": "divergence", "test": "identical", "margin": 0.02}
            ],
        }
    )
    base = [_said(at, BASELINE, differs=False) for at in range(calibrating_growth.ROWS)]
    pairs = [
        Pair(one, _said(at, CANDIDATE, differs=bool(differs[at]))) for at, one in enumerate(base)
    ]
    floor = [Pair(base[at], _said(at, AA, differs=bool(moved))) for at, moved in enumerate(again)]
    told = answer(questions(asked)[0], pairs, Stats(), floor=floor)
    assert told.p == pytest.approx(found.p, abs=1e-12)
    assert told.detail["p_harm"] == pytest.approx(found.p_harm, abs=1e-12)
    assert told.decision == decided


def _said(at: int, arm: str, *, differs: bool) -> Observation:
    return Observation(
        f"q{at:04}", "suite:s", arm, f"q{at:04}", text="other" if differs else "same"
    )
