"""The gate: observations of four arms -> one Verdict. Pure: the same rows, the same verdict.

The order of checks is `_decide`'s; docs/verdicts.md tells it to readers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from evals.battery import TOO_FEW, answer, too_few
from evals.controls import (
    Facts,
    check_activation,
    check_errors,
    check_fingerprints,
    check_generator,
)
from evals.pairs import (
    AA,
    BASELINE,
    CANDIDATE,
    SABOTAGE,
    Pair,
    by_arm,
    by_source,
    pair,
    pair_control,
)
from evals.questions import Question, questions
from evals.sensitivity import check_aa, check_sabotage
from evals.stats.many import holm
from evals.strata import AFFECTED, ALL, affected, strata, touched, traces
from evals.trends import check_trend
from evals.verdict import Control, Decision, Finding, Side, Verdict
from evals.words import sentence
from policies.hypothesis import Hypothesis
from telemetry import Observation

# Control -> what a verdict is called when it does not hold.
CONTROLS: Mapping[str, tuple[Decision, str]] = {
    "errors": ("invalid", "errors"),
    "fingerprint": ("invalid", "fingerprint_mismatch"),
    "generator": ("invalid", "generator_saturated"),
    "activation": ("invalid", "not_activated"),
    "aa": ("invalid", "aa_failed"),
    "sabotage": ("inconclusive", "insensitive"),
    "trend": ("inconclusive", "gets_worse"),
}
# Strata that must pass by themselves; others can only fail.
_MUST_PASS = (ALL, AFFECTED)


def judge(
    hypothesis: Hypothesis,
    observations: Iterable[Observation],
    sides: tuple[Side, Side],
    spec: Side,
    now: float,
    facts: Facts | None = None,
) -> Verdict:
    """What the observations of all arms say of a hypothesis.

    `sides`: baseline and candidate; `spec`: hypothesis, suites, replays. `now` in seconds since
    1970. Raises Unanswerable for a hypothesis that asks what cannot be answered, DuplicateRows.
    """
    facts = facts or Facts()
    arms = by_arm(observations)
    base = arms.get(BASELINE, [])
    pairs = pair(base, arms.get(CANDIDATE, []))
    floor = pair_control(base, arms.get(AA, []))
    findings = judge_pairs(hypothesis, pairs, floor)
    asked = questions(hypothesis)
    fields = traces(hypothesis)
    controls = (
        check_errors(pairs, hypothesis.sources),
        check_fingerprints((one for rows in arms.values() for one in rows), sides, facts),
        check_generator(facts),
        check_activation(
            hypothesis.activation, pairs, touched(pairs, fields) if fields else None, facts
        ),
        *_arm_controls(hypothesis, asked, floor, pair_control(base, arms.get(SABOTAGE, []))),
        check_trend(asked, pairs),
    )
    decision, reason, reasons = _decide(findings, controls)
    return Verdict(
        hypothesis=hypothesis.name,
        decision=decision,
        reason=reason,
        reasons=reasons,
        findings=findings,
        controls=controls,
        baseline=sides[0],
        candidate=sides[1],
        spec=spec,
        made_at=now,
        expires_at=now + hypothesis.validity.max_age,
        kind_of_change=hypothesis.kind_of_change,
        design={**hypothesis.design.model_dump(mode="json"), **facts.design},
        stats=hypothesis.stats.model_dump(mode="json"),
        versions=dict(facts.versions),
    )


def judge_pairs(
    hypothesis: Hypothesis, pairs: Sequence[Pair], floor: Sequence[Pair] = ()
) -> tuple[Finding, ...]:
    """Every claim and guardrail over every stratum, decided together; also for a look at a run
    that goes on. `floor`: pairs of the baseline with itself.
    """
    sources, floors = by_source(pairs), by_source(floor)
    fields = traces(hypothesis)
    found = [
        finding
        for question in questions(hypothesis)
        for finding in _strata(
            hypothesis,
            question,
            sources.get(question.source, ()),
            floors.get(question.source, ()),
            fields,
        )
    ]
    return _together(found, hypothesis.stats.alpha)


def _strata(
    hypothesis: Hypothesis,
    question: Question,
    pairs: Sequence[Pair],
    floor: Sequence[Pair],
    fields: Sequence[str],
) -> Iterable[Finding]:
    """A question over all its pairs; a guardrail also over those that the change touched, and over
    each part that its file names.
    """
    stats = hypothesis.stats
    yield answer(question, pairs, stats, ALL, floor)
    if question.kind == "claim":
        return
    hit = affected(pairs, fields) if fields else []
    if 0 < len(hit) < len(pairs):
        least = hypothesis.validity.min_affected_pairs
        if len(hit) < least:
            yield too_few(question, hit, stats, AFFECTED, least)
        else:
            yield answer(question, hit, stats, AFFECTED, floor)
    for name, part in strata(pairs, question.strata).items():
        yield answer(question, part, stats, name, floor)


def _together(found: Sequence[Finding], alpha: float) -> tuple[Finding, ...]:
    """A guardrail fails, and a claim is shown, at what Holm leaves of alpha; that all guardrails
    pass needs no correction (intersection-union).
    """
    findings = list(found)
    rails = [index for index, one in enumerate(findings) if one.kind == "guardrail"]
    claims = [index for index, one in enumerate(findings) if one.kind == "claim"]
    harm = holm([findings[index].detail.get("p_harm", 1.0) for index in rails])
    for index, p in zip(rails, harm, strict=True):
        if findings[index].decision == "fail" and p > alpha:
            findings[index] = replace(
                findings[index], decision="inconclusive", reason="underpowered"
            )
        findings[index] = _told(findings[index], "p_harm_holm", p)
    gain = holm([_known(findings[index].p) for index in claims])
    for index, p in zip(claims, gain, strict=True):
        if findings[index].decision == "pass" and p > alpha:
            findings[index] = replace(
                findings[index], decision="inconclusive", reason="underpowered"
            )
        findings[index] = _told(findings[index], "p_holm", p)
    return tuple(findings)


def _known(p: float | None) -> float:
    return 1.0 if p is None else p


def _told(finding: Finding, name: str, value: Any) -> Finding:
    return replace(finding, detail={**finding.detail, name: value})


def _arm_controls(
    hypothesis: Hypothesis,
    asked: Sequence[Question],
    floor: Sequence[Pair],
    spoiled: Sequence[Pair],
) -> list[Control]:
    controls = []
    if hypothesis.design.aa_control:
        controls.append(check_aa(asked, floor, hypothesis.stats))
    if hypothesis.design.sabotage_control:
        controls.append(check_sabotage(asked, spoiled, hypothesis.stats))
    return controls


def _decide(
    findings: Sequence[Finding], controls: Sequence[Control]
) -> tuple[Decision, str, tuple[str, ...]]:
    """First what makes the run worth nothing; then harm that is proven, which stands even where
    the gate is blind to other harm; then what is not known; then whether it was worth it.
    """
    broken: dict[str, Control] = {one.name: one for one in controls if not one.ok}
    rails = [one for one in findings if one.kind == "guardrail"]
    failed = [one for one in rails if one.decision == "fail"]
    open_ = [one for one in rails if one.decision != "pass" and one.stratum in _MUST_PASS]
    for name, (decision, reason) in CONTROLS.items():
        if name in broken and decision == "invalid":
            return decision, reason, _said(broken, failed)
    if failed:
        return "fail", "", _said({}, [*failed, *(one for one in open_ if one not in failed)])
    if blind := next((name for name in CONTROLS if name in broken), None):
        return *CONTROLS[blind], _said(broken, open_)
    if open_:
        named = {one.reason for one in open_}
        reason = TOO_FEW if TOO_FEW in named else next(one.reason for one in open_)
        return "inconclusive", reason, _said({}, open_)
    claims = [one for one in findings if one.kind == "claim"]
    shown = [one for one in claims if one.decision == "pass"]
    if claims and not shown:
        return "no_benefit", "", _said({}, claims)
    return "pass", "", (*_said({}, shown), "every guardrail holds")


def _said(broken: Mapping[str, Control], findings: Sequence[Finding]) -> tuple[str, ...]:
    controls = [broken[name].said for name in CONTROLS if name in broken]
    return (*controls, *(sentence(one) for one in findings))
