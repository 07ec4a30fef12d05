"""A finding in a sentence, as terminal, pull request and verdict have it. Knows no statistics."""

from __future__ import annotations

from evals.verdict import Finding

_WHY = {
    "underpowered": "too few pairs to tell",
    "too_few_clusters": "too few independent conversations to tell",
    "methods_disagree": "two methods disagree",
    "not_measured": "nothing was measured",
}


def sentence(finding: Finding) -> str:
    """What was found, with its interval and its bound, and what would be needed to know more."""
    if finding.estimate is None:
        why = _WHY.get(finding.reason, finding.reason)
        return f"{finding.name}: {why} ({finding.detail.get('why', '')})"
    parts = [f"{finding.name}: {_amount(finding, finding.estimate)}"]
    if finding.low is not None and finding.high is not None:
        sure = 100 * (1 - 2 * finding.alpha)
        low, high = _amount(finding, finding.low), _amount(finding, finding.high)
        parts.append(f" ({sure:.0f} % interval {low} to {high})")
    parts.append(f", {_against(finding)}")
    if finding.decision == "inconclusive":
        parts.append(f": {_WHY.get(finding.reason, finding.reason)}")
        if finding.pairs_needed is not None and finding.pairs_needed > finding.pairs:
            parts.append(f", {finding.pairs_needed:,} pairs would do, there are {finding.pairs:,}")
    return "".join(parts)


def _against(finding: Finding) -> str:
    bound = _amount(finding, finding.margin) if finding.margin is not None else "nothing"
    if finding.kind == "claim":
        shown = "which shows" if finding.decision == "pass" else "which does not show"
        return f"{shown} the {bound} that it claims"
    word = {"pass": "within", "fail": "beyond", "inconclusive": "against"}[finding.decision]
    return f"{word} the {bound} that may be lost"


def _amount(finding: Finding, value: float) -> str:
    if finding.unit == "difference":
        return f"{100 * value:+.2f} points"
    if finding.unit == "ratio":
        return f"{100 * (value - 1):+.1f} %"
    return f"{value:.4g}"
