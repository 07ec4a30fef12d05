"""The two arms that test the gate: a second baseline, in which nothing may be found, and a spoiled
one, in which something must be. Knows no decisions but its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from evals import ratios, shares
from evals.battery import answer, null_of
from evals.metrics import UNWANTED
from evals.pairs import Pair, by_source
from evals.questions import Question
from evals.stats.betting import betting
from evals.stats.estimate import cluster_sums
from evals.stats.many import holm
from evals.texts import SAME_LAW
from evals.verdict import Control, Finding
from policies.hypothesis import Stats

# Chance that two equal arms are called different, over all metrics together.
AA_ALPHA = 0.01
_FEWEST_BLOCKS = 4
_QUALITY, _SPEED, _ANY = "quality", "speed", "anything"


def check_aa(asked: Sequence[Question], floor: Sequence[Pair], stats: Stats) -> Control:
    """Baseline against baseline differs in nothing that is asked: else time, order or another
    arm's cache speaks, not the change.
    """
    if not floor:
        return Control("aa", False, {}, "the second baseline has no rows")
    found = _nulls(asked, floor, stats)
    two_sided = [min(1.0, 2 * min(one["p_rise"], one["p_harm"])) for one in found.values()]
    said = []
    for (name, one), p in zip(found.items(), holm(two_sided), strict=True):
        one["p"] = p
        if p <= AA_ALPHA:
            said.append(
                f"two equal arms differ in {name} by {_percent(one['estimate'], one['unit'])} "
                f"(p {p:.2g}): what differs is not the change"
            )
    return Control("aa", not said, {"alpha": AA_ALPHA, "metrics": found}, "; ".join(said))


def check_sabotage(asked: Sequence[Question], spoiled: Sequence[Pair], stats: Stats) -> Control:
    """A planted defect is found by each sort of guardrail there is, and would not have passed."""
    if not spoiled:
        return Control("sabotage", False, {}, "the spoiled arm has no rows")
    rails = [one for one in asked if one.kind == "guardrail"]
    found = _nulls(rails, spoiled, stats)
    sources = by_source(spoiled)
    judged = [answer(one, sources.get(one.source, ()), stats) for one in rails]
    found |= {
        _key(question): _of_finding(finding)
        for question, finding in zip(rails, judged, strict=True)
        if question.metric.kind in ("divergence", "law")
    }
    said = []
    for sort, names in _sorts(rails).items():
        harm = holm([found[name]["p_harm"] for name in names if name in found])
        if not any(p <= stats.alpha for p in harm):
            said.append(f"a planted loss of {sort} is not seen by {', '.join(names)}")
    if judged and all(one.decision == "pass" for one in judged):
        said.append("the spoiled arm passes every guardrail")
    decisions = {one.name: one.decision for one in judged}
    detail = {"alpha": stats.alpha, "metrics": found, "decisions": decisions}
    return Control("sabotage", not said, detail, "; ".join(said))


def _nulls(
    asked: Iterable[Question], pairs: Sequence[Pair], stats: Stats
) -> dict[str, dict[str, Any]]:
    """For each metric of each source: whether there is any difference at all, both ways."""
    fixed = stats.model_copy(update={"mode": "fixed"})
    sources = by_source(pairs)
    found: dict[str, dict[str, Any]] = {}
    for question in asked:
        key = _key(question)
        if key in found or question.metric.kind in ("divergence", "law", "drift"):
            continue
        null, rows = null_of(question), sources.get(question.source, ())
        finding = answer(null, rows, fixed)
        found[key] = _of_finding(finding) if finding.p is not None else _few(null, rows, finding)
    return found


def _of_finding(finding: Finding) -> dict[str, Any]:
    return {
        "pairs": finding.pairs,
        "unit": finding.unit,
        "method": finding.method,
        "estimate": finding.estimate,
        "p_rise": 1.0 if finding.p is None else finding.p,
        # of laws it is asked whether they differ at all, as of all others here
        "p_harm": finding.detail.get(SAME_LAW, finding.detail.get("p_harm", 1.0)),
    }


def _few(question: Question, pairs: Sequence[Pair], finding: Finding) -> dict[str, Any]:
    """A control that ran on a part has fewer clusters and blocks than a guardrail needs: bets on
    the clusters' means, a plain t over the blocks. Enough to see that something is there.
    """
    told = {**_of_finding(finding), "why": finding.detail.get("why", "")}
    worse = -1.0 if question.metric.better == "lower" else 1.0
    if question.metric.kind == "share" and (seen := shares.units(question.metric, pairs)):
        diffs = np.array([worse * (one.candidate - one.baseline) for one in seen])
        sums, sizes = cluster_sums(diffs, [one.cluster for one in seen])
        bet = betting(sums / sizes, 0.0)
        told |= {"method": bet.method, "estimate": worse * bet.estimate}
        return {**told, "p_rise": bet.p, "p_harm": bet.p_harm}
    if question.metric.kind in ("time", "rate"):
        logs = worse * np.array(ratios.block_logs(question.metric, pairs))
        if logs.size >= _FEWEST_BLOCKS and float(logs.std(ddof=1)) > 0:
            error = float(logs.std(ddof=1)) / np.sqrt(logs.size)
            p = float(special.stdtr(logs.size - 1, -logs.mean() / error))
            told |= {"method": "block_t", "estimate": float(np.exp(worse * logs.mean()))}
            return {**told, "p_rise": p, "p_harm": 1 - p}
    return told


def _sorts(rails: Sequence[Question]) -> Mapping[str, list[str]]:
    """What the defect shows in: wrong answers in scores, slow ones in times. What has neither has
    to see it in whatever it has.
    """
    sorts: dict[str, list[str]] = {}
    for one in rails:
        metric = one.metric
        scored = bool(metric.scorer) and metric.scorer not in UNWANTED and metric.kind == "share"
        if scored or metric.kind in ("flip", "divergence", "law"):
            sorts.setdefault(_QUALITY, []).append(_key(one))
        elif metric.kind in ("time", "rate"):
            sorts.setdefault(_SPEED, []).append(_key(one))
    named = sorts or {_ANY: [_key(one) for one in rails]}
    return {sort: list(dict.fromkeys(names)) for sort, names in named.items()}


def _key(question: Question) -> str:
    return f"{question.source} {question.metric.name}"


def _percent(value: float | None, unit: str) -> str:
    if value is None:
        return "an unknown amount"
    return f"{100 * (value - 1):+.1f} %" if unit == "ratio" else f"{100 * value:+.2f} points"
