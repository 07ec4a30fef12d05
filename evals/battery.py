"""One question over its pairs -> a Finding: which test, what it says, what it could have shown.

The decision is the question's own; `gate.py` takes all of them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from scipy import special

from evals import ratios, shares
from evals.pairs import Pair
from evals.questions import SUPERIORITY, Question
from evals.shares import Answer, NotMeasured
from evals.stats.estimate import Estimate, TooFewClusters
from evals.stats.power import mde, pairs_needed
from evals.stats.rates import rule_of_three, trials_needed
from evals.strata import ALL
from evals.texts import identical, law
from evals.verdict import Finding
from policies.hypothesis import Stats

UNDERPOWERED, TOO_FEW, NOT_MEASURED = "underpowered", "too_few_clusters", "not_measured"
DISAGREE = "methods_disagree"
_Test = Callable[[Question, Sequence[Pair], Stats], Answer]
_BY_KIND: Mapping[str, _Test] = {
    "share": shares.paired, "time": ratios.times, "rate": ratios.rates, "tokens": ratios.tokens,
}  # fmt: skip
_BY_TEST: Mapping[str, _Test] = {
    "rate_max": shares.rate, "percentile_max": shares.rate, "mean_max": shares.mean,
    "law_max": law,
}  # fmt: skip


def answer(
    question: Question,
    pairs: Sequence[Pair],
    stats: Stats,
    stratum: str = ALL,
    floor: Sequence[Pair] = (),
) -> Finding:
    """What the pairs of a stratum say. `floor`: pairs of the baseline with itself, for tests that
    allow what chance does anyway.
    """
    try:
        found = _ask(question, pairs, stats, floor)
    except TooFewClusters as error:
        return _open(question, pairs, stats, stratum, TOO_FEW, {"why": str(error)})
    except NotMeasured:
        why = f"no request of {question.source} says anything about {question.metric.name}"
        return _open(question, pairs, stats, stratum, NOT_MEASURED, {"why": why})
    return _finding(question, pairs, stats, stratum, found, floor)


def too_few(
    question: Question, pairs: Sequence[Pair], stats: Stats, stratum: str, least: int
) -> Finding:
    """A stratum that is smaller than was asked for says nothing, whatever its numbers."""
    why = f"{len(pairs)} pairs, and {least} are asked for"
    return _open(question, pairs, stats, stratum, UNDERPOWERED, {"why": why}, least)


def null_of(question: Question) -> Question:
    """The same metric, asked whether there is any difference at all: for controls."""
    metric = question.metric
    if metric.kind == "flip":
        metric = replace(
            metric, kind="share", better="higher", value=shares.correct, name="correct"
        )
    return replace(question, kind="claim", test=SUPERIORITY, metric=metric, bound=0.0)


def _ask(question: Question, pairs: Sequence[Pair], stats: Stats, floor: Sequence[Pair]) -> Answer:
    if not pairs:
        raise NotMeasured(question.metric.name)
    if question.test == "identical":
        return identical(question, pairs, floor, stats)
    return (_BY_TEST.get(question.test) or _BY_KIND[question.metric.kind])(question, pairs, stats)


def _finding(
    question: Question,
    pairs: Sequence[Pair],
    stats: Stats,
    stratum: str,
    found: Answer,
    floor: Sequence[Pair],
) -> Finding:
    estimate = found.estimate
    both = max(estimate.p, estimate.p_harm) <= stats.alpha  # nothing varies: no test says anything
    disagree = both or bool(estimate.detail.get(DISAGREE))
    decision: Literal["pass", "fail", "inconclusive"] = "inconclusive"
    if not disagree:
        if estimate.p_harm <= stats.alpha:
            decision = "fail"
        elif estimate.p <= stats.alpha:
            decision = "pass"
    blocks = question.metric.kind in ("time", "rate")
    smallest, needed = _power(question, estimate, found, stats)
    if blocks and needed is not None:
        needed = math.ceil(needed * len(pairs) / estimate.n)
    reason = "" if decision != "inconclusive" else DISAGREE if disagree else UNDERPOWERED
    return replace(
        _open(question, pairs, stats, stratum, reason, {**estimate.detail}),
        method=estimate.method,
        pairs=len(pairs) if blocks else estimate.n,
        clusters=estimate.clusters,
        lost=found.lost,
        gained=found.gained,
        baseline=found.baseline,
        candidate=found.candidate,
        estimate=estimate.estimate,
        low=estimate.low,
        high=estimate.high,
        p=estimate.p,
        decision=decision,
        mde=smallest,
        pairs_needed=needed,
        complete_estimate=_complete(question, pairs, stats, floor),
        detail={**estimate.detail, "p_harm": estimate.p_harm},
    )


def _open(
    question: Question,
    pairs: Sequence[Pair],
    stats: Stats,
    stratum: str,
    reason: str,
    detail: Mapping[str, Any],
    needed: int | None = None,
) -> Finding:
    """Nothing decided: what is known of a question before any test."""
    return Finding(
        name=question.name if stratum == ALL else f"{question.name} [{stratum}]",
        kind=question.kind,
        source=question.source,
        metric=question.metric.name,
        stratum=stratum,
        test=question.test,
        method="",
        unit=question.unit,
        pairs=len(pairs),
        clusters=len({one.cluster for one in pairs}),
        lost=None,
        gained=None,
        baseline=None,
        candidate=None,
        estimate=None,
        low=None,
        high=None,
        margin=question.margin,
        alpha=stats.alpha,
        p=None,
        decision="inconclusive",
        reason=reason,
        pairs_needed=needed,
        errors=sum(not one.complete for one in pairs),
        detail=dict(detail),
    )


def _complete(
    question: Question, pairs: Sequence[Pair], stats: Stats, floor: Sequence[Pair]
) -> float | None:
    """The estimate without the pairs of which a request failed; None where none did."""
    whole = [one for one in pairs if one.complete]
    if len(whole) == len(pairs):
        return None
    try:
        return _ask(question, whole, stats, floor).estimate.estimate
    except (TooFewClusters, NotMeasured):
        return None


def _power(
    question: Question, estimate: Estimate, found: Answer, stats: Stats
) -> tuple[float | None, int | None]:
    """The smallest effect that so many pairs show, and the pairs that the margin needs."""
    alpha, power, n = stats.alpha, stats.power, estimate.n
    if question.test in ("rate_max", "percentile_max") and question.unit == "share":
        events = math.ceil(estimate.estimate * n - 1e-9)
        proven = estimate.estimate < question.bound
        return estimate.high, trials_needed(question.bound, alpha, events) if proven else None
    distance = _distance(question)
    if found.lost is not None and found.gained is not None and estimate.method == "tango":
        flips = (found.lost + found.gained) / n
        smallest = max(mde(n, flips, alpha, power), rule_of_three(n, alpha))
        return smallest, pairs_needed(flips, distance, alpha, power) if distance else None
    width = _width(question, estimate)
    z = float(-special.ndtri(alpha)), float(special.ndtri(power))
    effect = (z[0] + z[1]) * width / (2 * z[0])
    needed = max(1, math.ceil(n * (effect / distance) ** 2)) if distance else None
    return (math.expm1(effect) if question.unit == "ratio" else effect), needed


def _distance(question: Question) -> float:
    return abs(math.log(question.margin)) if question.unit == "ratio" else abs(question.margin)


def _width(question: Question, estimate: Estimate) -> float:
    if question.unit == "ratio":
        return math.log(estimate.high / estimate.low)
    return estimate.high - estimate.low
