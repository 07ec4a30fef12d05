"""The gate: each verdict and each of its reasons is reached, in the order of its checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from evals.controls import Facts
from evals.pairs import AA, BASELINE, CANDIDATE, SABOTAGE
from evals.questions import Unanswerable
from evals.verdict import Finding, Verdict
from telemetry import Observation
from tests.evals.simulated import (
    CORRECT,
    FASTER,
    REPLAY,
    SUITE,
    TTFT,
    failing,
    hypothesis,
    judged,
    observed,
    replayed,
    suite,
)

NO_ARMS = {"aa_control": False, "sabotage_control": False}


def named(verdict: Verdict, metric: str, stratum: str = "all") -> Finding:
    return next(one for one in verdict.findings if (one.metric, one.stratum) == (metric, stratum))


def without(observations: list[Observation], *arms: str) -> list[Observation]:
    return [one for one in observations if one.arm not in arms]


# ---- the verdicts -------------------------------------------------------------------------------


def test_a_candidate_that_loses_nothing_and_gains_what_it_claims_passes() -> None:
    verdict = judged(observed())
    assert (verdict.decision, verdict.reason, verdict.exit_code) == ("pass", "", 0)
    assert [one.decision for one in verdict.findings] == ["pass"] * 3
    assert all(one.ok for one in verdict.controls)
    assert verdict.reasons[-1] == "every guardrail holds"
    assert verdict.expires_at == 1000.0 + 30 * 86400


def test_a_loss_beyond_the_margin_fails_and_is_told_first() -> None:
    verdict = judged(observed(wrong=0.15))
    assert (verdict.decision, verdict.reason, verdict.exit_code) == ("fail", "", 1)
    found = named(verdict, "correct")
    assert (found.decision, found.method) == ("fail", "tango")
    assert found.high is not None and found.high < -0.05
    assert found.lost is not None and found.lost > 40
    assert verdict.reasons[0].startswith("guardrail 1 qa correct paired_ni: -")


def test_a_candidate_that_is_slower_than_the_margin_fails() -> None:
    verdict = judged(observed(slower=1.3))
    assert verdict.decision == "fail"
    assert named(verdict, "ttft.p50").low > 1.1  # type: ignore[operator]


def test_an_identical_candidate_holds_every_guardrail_and_has_no_benefit() -> None:
    verdict = judged(observed(tpot=1.0))
    assert (verdict.decision, verdict.exit_code) == ("no_benefit", 5)
    assert {one.decision for one in verdict.findings if one.kind == "guardrail"} == {"pass"}
    assert "does not show the -8.0 % that it claims" in verdict.reasons[0]


def test_a_gain_has_to_be_beyond_what_is_claimed_not_beyond_nothing() -> None:
    """Faster by 5 %, for sure, is not faster by 8 %."""
    verdict = judged(observed(tpot=0.95))
    assert verdict.decision == "no_benefit"
    assert named(verdict, "tpot.p50").high < 1.0  # type: ignore[operator]


def test_one_claim_of_several_is_enough() -> None:
    other = {"suite": "qa", "metric": "correct", "direction": "higher", "min_effect": 0.1}
    verdict = judged(observed(), hypothesis(claims=[other, FASTER]))
    assert verdict.decision == "pass"
    assert [one.decision for one in verdict.findings if one.kind == "claim"] == ["fail", "pass"]


def test_what_claims_nothing_passes_when_it_loses_nothing() -> None:
    assert judged(observed(tpot=1.0), hypothesis(claims=[])).decision == "pass"


def test_too_few_pairs_are_inconclusive_and_say_how_many_would_do() -> None:
    few = [one for one in observed() if one.source != SUITE or int(one.id[1:]) < 40]
    asked = hypothesis(design={"sabotage_control": False})
    verdict = judged(few, asked)
    assert (verdict.decision, verdict.reason, verdict.exit_code) == (
        "inconclusive", "underpowered", 3
    )  # fmt: skip
    assert named(verdict, "correct").pairs_needed == 59
    assert "59 pairs would do, there are 40" in verdict.reasons[0]


def test_the_example_of_forty_items_is_inconclusive() -> None:
    """Six lost and one gained of 40, against two points: the interval, the smallest margin that
    could be tested and the pairs that two points need."""
    lost, gained = set(range(6)), {10}
    rows = [
        Observation(
            f"q{n:02}", SUITE, arm, f"q{n:02}",
            scores={"correct": float(n not in (lost if arm == CANDIDATE else gained))},
        )
        for arm in (BASELINE, CANDIDATE)
        for n in range(40)
    ]  # fmt: skip
    asked = hypothesis(claims=[], guardrails=[{**CORRECT, "margin": 0.02}], design=NO_ARMS)
    verdict = judged(rows, asked)
    found = named(verdict, "correct")
    assert (verdict.decision, verdict.reason) == ("inconclusive", "underpowered")
    assert (found.lost, found.gained, found.estimate) == (6, 1, pytest.approx(-0.125))
    assert found.low == pytest.approx(-0.246, abs=0.004)
    assert found.high == pytest.approx(-0.020, abs=0.010)  # exact: a little wider than Tango
    assert found.mde == pytest.approx(0.16, abs=0.006)
    assert found.pairs_needed == pytest.approx(2705, rel=0.02)


def test_conversations_too_few_to_be_independent_are_inconclusive() -> None:
    rows = [one for arm in (BASELINE, CANDIDATE) for one in suite(arm, rows=1000, a_cluster=100)]
    asked = hypothesis(claims=[], guardrails=[CORRECT], design=NO_ARMS)
    verdict = judged(rows, asked)
    assert (verdict.decision, verdict.reason) == ("inconclusive", "too_few_clusters")
    assert "10 clusters, and at least 20 are needed" in verdict.reasons[0]


def test_a_gate_that_does_not_see_a_planted_loss_is_insensitive() -> None:
    """A scorer that calls everything right lets everything through."""
    blind = [
        replace(one, scores={"correct": 1.0}) if one.source == SUITE else one for one in observed()
    ]
    verdict = judged(blind)
    assert (verdict.decision, verdict.reason) == ("inconclusive", "insensitive")
    assert "a planted loss of quality is not seen by suite:qa correct" in verdict.reasons[0]


def test_a_gate_that_does_not_see_a_planted_delay_is_insensitive() -> None:
    fast = [one for one in observed() if not (one.arm == SABOTAGE and one.source == REPLAY)]
    verdict = judged([*fast, *replayed(SABOTAGE)])
    assert (verdict.decision, verdict.reason) == ("inconclusive", "insensitive")
    assert "a planted loss of speed" in verdict.reasons[0]


@pytest.mark.parametrize(("arm", "reason"), [(AA, "aa_failed"), (SABOTAGE, "insensitive")])
def test_a_control_that_is_asked_for_and_did_not_run_is_no_control(arm: str, reason: str) -> None:
    assert judged(without(observed(), arm)).reason == reason


def test_two_equal_arms_that_differ_make_the_run_invalid() -> None:
    """What drifts between arms would be taken for the change."""
    slow = [*without(observed(), AA), *suite(AA), *replayed(AA, slower=1.2)]
    verdict = judged(slow)
    assert (verdict.decision, verdict.reason, verdict.exit_code) == ("invalid", "aa_failed", 4)
    assert "two equal arms differ in replay:week ttft.p50 by +2" in verdict.reasons[0]


# ---- errors -------------------------------------------------------------------------------------


def test_failures_of_the_candidate_are_losses_and_the_rest_is_told_beside() -> None:
    """An eighth of the requests fail, and all others are right: nothing is dropped."""
    verdict = judged(failing(observed(), CANDIDATE, every=8))
    found = named(verdict, "correct")
    assert verdict.decision == "fail"
    assert found.errors == 50
    assert found.estimate is not None and found.estimate < -0.08
    assert found.complete_estimate == pytest.approx(0.0, abs=0.01)


def test_timeouts_are_late_for_a_quantile() -> None:
    """A tenth that never came moves the 95th percentile, though all others are as fast."""
    slow = failing(observed(), CANDIDATE, every=10, outcome="timeout")
    asked = hypothesis(guardrails=[{**TTFT, "metric": "ttft.p95"}], claims=[])
    verdict = judged(slow, asked)
    assert (verdict.decision, named(verdict, "ttft.p95").decision) == ("fail", "fail")


def test_a_dead_endpoint_is_invalid_and_never_a_pass() -> None:
    verdict = judged(failing(observed(), CANDIDATE, every=1))
    assert (verdict.decision, verdict.reason) == ("invalid", "errors")
    assert "the candidate failed 100.0% of its requests (it broke)" in verdict.reasons[0]


@pytest.mark.parametrize("every", [1, 10])
def test_a_baseline_that_fails_compares_nothing(every: int) -> None:
    verdict = judged(failing(observed(), BASELINE, every=every))
    assert (verdict.decision, verdict.reason) == ("invalid", "errors")
    assert "the baseline itself failed" in verdict.reasons[0]


def test_requests_that_the_baseline_sheds_are_no_errors_of_the_run() -> None:
    """Replayed overload: sent away in both arms is an outcome, not a broken server."""
    rows = failing(observed(), BASELINE, every=10, outcome="refused")
    verdict = judged(failing(rows, CANDIDATE, every=10, outcome="refused"))
    assert next(one for one in verdict.controls if one.name == "errors").ok


def test_a_source_that_nobody_asked_is_invalid() -> None:
    verdict = judged([one for one in observed() if one.source == SUITE])
    assert (verdict.decision, verdict.reason) == ("invalid", "errors")
    assert "replay:week: no request was asked" in verdict.reasons[0]


def test_rows_that_the_candidate_lacks_are_losses() -> None:
    rows = [one for one in observed() if not (one.arm == CANDIDATE and one.id.endswith("1"))]
    verdict = judged(rows)
    assert verdict.decision == "fail"
    assert named(verdict, "correct").errors == 40


# ---- what ran -----------------------------------------------------------------------------------


def test_a_change_that_never_ran_is_not_activated() -> None:
    asked = hypothesis(activation=[{"metric": "quantized_linear_calls", "min": 5}])
    cases: list[tuple[dict[str, float], str]] = [
        ({}, "nothing counts quantized_linear_calls"),
        ({"headgate_quantized_linear_calls_total": 4.0}, "rose by 4 where 5 prove"),
    ]
    for counters, said in cases:
        verdict = judged(observed(), asked, Facts(activation=counters))
        assert (verdict.decision, verdict.reason) == ("invalid", "not_activated")
        assert said in verdict.reasons[0]
    ran = Facts(activation={"headgate_quantized_linear_calls_total": 5.0})
    assert judged(observed(), asked, ran).decision == "pass"


def test_what_observations_tell_proves_that_it_ran_too() -> None:
    asked = hypothesis(activation=[{"metric": "accepted_tokens"}])
    assert judged(observed(), asked).reason == "not_activated"
    rows = [replace(one, accepted_tokens=3 * (one.arm == CANDIDATE)) for one in observed()]
    assert judged(rows, asked).decision == "pass"


def test_an_answer_with_a_foreign_fingerprint_is_invalid() -> None:
    prints = {BASELINE: "fp_b", CANDIDATE: "fp_c", AA: "fp_b", SABOTAGE: "fp_b"}
    rows = [replace(one, fingerprint=prints[one.arm]) for one in observed()]
    facts = Facts(fingerprints={BASELINE: ("fp_b",), CANDIDATE: ("fp_c",), AA: ("fp_b",)})
    assert judged(rows, facts=facts).decision == "pass"
    rows[450] = replace(rows[450], fingerprint="fp_b")
    for known in (facts, Facts()):
        verdict = judged(rows, facts=known)
        assert (verdict.decision, verdict.reason) == ("invalid", "fingerprint_mismatch")


def test_load_that_came_late_is_invalid() -> None:
    verdict = judged(observed(), facts=Facts(generator="a tenth was sent 2 s late"))
    assert (verdict.decision, verdict.reason) == ("invalid", "generator_saturated")
    assert verdict.reasons == ("a tenth was sent 2 s late",)


# ---- the order ----------------------------------------------------------------------------------

_Breaks = Callable[[list[Observation]], list[Observation]]


def _blind(rows: list[Observation]) -> list[Observation]:
    return [*without(rows, SABOTAGE), *suite(SABOTAGE), *replayed(SABOTAGE)]


def _drifts(rows: list[Observation]) -> list[Observation]:
    return [*without(rows, AA), *suite(AA, wrong=0.3), *replayed(AA)]


def _foreign(rows: list[Observation]) -> list[Observation]:
    return [replace(one, fingerprint=f"fp_{n % 2}") for n, one in enumerate(rows)]


def _loses(rows: list[Observation]) -> list[Observation]:
    return [*without(rows, CANDIDATE), *suite(CANDIDATE, wrong=0.3), *replayed(CANDIDATE)]


def _dies(rows: list[Observation]) -> list[Observation]:
    return failing(rows, CANDIDATE, every=1)


@pytest.mark.parametrize(
    ("breaks", "facts", "reason"),
    [
        ([_loses, _blind, _drifts, _foreign, _dies], Facts(generator="late"), "errors"),
        ([_loses, _blind, _drifts, _foreign], Facts(generator="late"), "fingerprint_mismatch"),
        ([_loses, _blind, _drifts], Facts(generator="late"), "generator_saturated"),
        ([_loses, _blind, _drifts], Facts(), "not_activated"),
        ([_loses, _blind, _drifts], Facts(activation={"ran": 1}), "aa_failed"),
        ([_loses, _blind], Facts(activation={"ran": 1}), ""),
        ([_blind], Facts(activation={"ran": 1}), "insensitive"),
    ],
)
def test_the_weightiest_trouble_names_the_verdict(
    breaks: list[_Breaks], facts: Facts, reason: str
) -> None:
    """Runs that are worth nothing first; harm that is proven stands though the gate is blind to
    other harm; only then what is not known."""
    rows = observed()
    for one in breaks:
        rows = one(rows)
    asked = hypothesis(activation=[{"metric": "ran"}])
    verdict = judged(rows, asked, facts)
    assert verdict.reason == reason
    assert verdict.decision == {"": "fail", "insensitive": "inconclusive"}.get(reason, "invalid")


def test_what_is_not_known_comes_before_what_it_is_good_for() -> None:
    few = [one for one in observed(tpot=1.0) if one.source != SUITE or int(one.id[1:]) < 50]
    asked = hypothesis(design={"sabotage_control": False})
    assert judged(few, asked).decision == "inconclusive"


# ---- what is asked ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guardrail", "said"),
    [
        ({**CORRECT, "metric": "ttft.p95"}, "ttft.p95 cannot be shown by paired_ni; use ratio_ni"),
        ({**TTFT, "metric": "correct"}, "correct cannot be shown by ratio_ni; use paired_ni"),
        (
            {"replay": "week", "metric": "ttft.mean", "test": "percentile_max", "within": 1},
            "ttft.mean is no percentile: name one, such as ttft.p99",
        ),
        ({**TTFT, "metric": "tftt.p95"}, "did you mean 'ttft.p95'"),
        (
            {"suite": "qa", "metric": "correct", "test": "rate_max", "max": 0.1},
            "more of correct is better",
        ),
    ],
)
def test_a_guardrail_that_nothing_can_answer_is_refused(
    guardrail: dict[str, object], said: str
) -> None:
    with pytest.raises(Unanswerable, match=said) as caught:
        judged(observed(), hypothesis(guardrails=[guardrail]))
    assert caught.value.where[:2] == ("guardrails", 0)


def test_a_claim_in_the_wrong_direction_is_refused() -> None:
    with pytest.raises(Unanswerable, match=r"of tpot\.p50 lower is better, not higher"):
        judged(observed(), hypothesis(claims=[{**FASTER, "direction": "higher"}]))
