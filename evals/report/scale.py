"""One scale for every finding: 0 is no difference, 1 what was allowed, or what was to be gained."""

from __future__ import annotations

import math

from evals.verdict import Finding


def harm(finding: Finding) -> tuple[float, float, float] | None:
    """Low end, estimate and high end as multiples of the margin, in ascending order.

    For guardrails above 1 is harm beyond the margin, for claims a gain beyond what was asked. None
    where a finding has no margin, no estimate, or a margin of nothing.
    """
    if finding.margin is None or finding.estimate is None:
        return None
    unit = _distance(finding, finding.margin)
    if unit == 0 or not math.isfinite(unit):
        return None
    given = (
        finding.estimate if finding.low is None else finding.low,
        finding.estimate,
        finding.estimate if finding.high is None else finding.high,
    )
    low, middle, high = sorted(_distance(finding, value) / unit for value in given)
    return low, middle, high


def _distance(finding: Finding, value: float) -> float:
    """From equality: logarithms of ratios, so that twice and half are as far."""
    if finding.unit != "ratio":
        return value
    return math.log(value) if value > 0 else -math.inf
