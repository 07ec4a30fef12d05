"""Evidence as it grew, and what this many pairs could have shown at all.

Computed by `evals.stats` from the pairs and the findings: nothing is drawn that was not measured.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean
from typing import Any

from evals.metrics import metric, share_of
from evals.pairs import Pair
from evals.report.answers import paired
from evals.report.markup import Markup, join, tag
from evals.report.plot import Axis, Plot, Point, figure, legend
from evals.report.words import NBSP, what
from evals.stats import tango
from evals.stats.sequential import Sequential
from evals.verdict import Finding
from telemetry import Observation

# The picture ends here: more evidence than a million to one looks the same.
_LEAST, _MOST = 1e-3, 1e6
_POINTS, _MARGINS = 300, 36
_MULTIPLES = ((4, "most"), (2, "more"), (1, "candidate"))


def evidence(
    findings: Sequence[Finding], rows: Sequence[Observation], power: float = 0.8
) -> Markup:
    """Two pictures for each guardrail of right and wrong answers over everything."""
    asked = [
        one
        for one in findings
        if one.kind == "guardrail"
        and one.test == "paired_ni"
        and one.unit == "difference"
        and one.margin
        and one.stratum in ("", "all")
    ]
    return join(
        *(
            tag("div", _trajectory(one, paired(rows, one.source)), _power(one, power), class_="two")
            for one in asked
        )
    )


def differences(finding: Finding, pairs: Sequence[Pair]) -> list[float]:
    """Candidate less baseline, a mean for each cluster in the order in which they began; a fall
    is harm, whichever way of the metric is better."""
    read = metric(finding.metric)
    sign = 1 if read.better == "higher" else -1
    clusters: dict[str, list[float]] = defaultdict(list)
    for one in pairs:
        before, after = share_of(read, one.baseline), share_of(read, one.candidate)
        if before is not None and after is not None:
            clusters[one.cluster].append(sign * (after - before))
    return [fmean(group) for group in clusters.values()]


def _trajectory(finding: Finding, pairs: Sequence[Pair]) -> Markup | None:
    diffs = differences(finding, pairs)
    if len(diffs) < 2 or finding.margin is None:
        return None
    watch = Sequential(-abs(finding.margin), finding.alpha)
    safe, harmful = [(0.0, 1.0)], [(0.0, 1.0)]
    for count, diff in enumerate(diffs, start=1):
        watch.update(diff)
        safe.append((count, _bounded(watch.safe.log_e)))
        harmful.append((count, _bounded(watch.harmful.log_e)))
    enough = 1 / finding.alpha
    values = [value for _, value in (*safe, *harmful)]
    y = Axis(min(*values, 0.1) / 1.5, max(*values, enough) * 1.5, log=True)
    plot = Plot(Axis(0, len(diffs)), y)
    heading = f"{what(finding)}: evidence as it grew"
    return figure(
        heading,
        plot.drawn(
            plot.rule("zero", y=1.0),
            plot.rule("limit", y=enough, name=f"enough, 1/α = {enough:g}"),
            plot.curve(_thinned(harmful), "harm"),
            plot.curve(_thinned(safe), "good"),
            label=f"{heading}: {watch.decision}",
            x_name="clusters" if len(diffs) < len(pairs) else "pairs",
            y_name="betting e-value",
        ),
        legend(("good", "for harm below the margin"), ("harm", "for harm beyond it")),
        "Each curve may be looked at as often as one likes: it passes 1/α by chance with "
        "probability α at most.",
    )  # fmt: skip


def _bounded(log_e: float) -> float:
    return min(max(math.exp(min(log_e, 100.0)), _LEAST), _MOST)


def _thinned(points: Sequence[Point]) -> list[Point]:
    """A few hundred of them, both ends among these."""
    stride = math.ceil(len(points) / _POINTS)
    return [*points[:-1:stride], points[-1]]


def _power(finding: Finding, power: float) -> Markup | None:
    """Probability to pass, over margins, for a candidate that is as good as the baseline."""
    if finding.margin is None or finding.lost is None or finding.gained is None:
        return None
    flips = max(finding.lost + finding.gained, 1) / finding.pairs
    margin = abs(finding.margin)
    widest = 2.2 * max(margin, min(finding.mde or 0.0, 0.4))
    margins = [widest * step / _MARGINS for step in range(1, _MARGINS + 1)]
    plot = Plot(
        Axis(0, widest, unit=f"{NBSP}pp", scale=100), Axis(0, 1, unit=f"{NBSP}%", scale=100)
    )
    curves = []
    for multiple, class_ in _MULTIPLES:
        pairs = multiple * finding.pairs
        chances = [(one, chance(pairs, flips, one, finding.alpha)) for one in margins]
        curves.append(plot.curve([(0.0, 0.0), *chances], class_))
    now = chance(finding.pairs, flips, margin, finding.alpha)
    heading = f"{what(finding)}: what could have been shown"
    names = [(class_, f"{multiple * finding.pairs:,} pairs") for multiple, class_ in _MULTIPLES]
    clustered = finding.clusters is not None and finding.clusters < finding.pairs
    return figure(
        heading,
        plot.drawn(
            plot.rule("target", y=power, name=f"{power:.0%}".replace("%", f"{NBSP}%"), start=True),
            plot.rule("limit", x=margin, name="margin"),
            *curves,
            label=f"{heading}: {now:.0%} at the margin of {100 * margin:g} points",
            x_name="margin", y_name="probability to pass, if nothing is lost",
        ),
        legend(*reversed(names)),
        f"With {100 * flips:.1f}{NBSP}% of answers flipping, {finding.pairs:,} pairs let an equal "
        f"candidate pass a margin of {100 * margin:g} points with probability {now:.2f}."
        + (" As if all pairs were independent; within clusters they are not." if clustered else ""),
    )  # fmt: skip


def chance(pairs: int, flips: float, margin: float, alpha: float) -> float:
    """Probability that so many pairs pass a candidate that is as good as the baseline."""
    return tango.power(pairs, flips, 0.0, -margin, NormalDist().inv_cdf(1 - alpha))


def planned_power(stats: Mapping[str, Any]) -> float:
    """Of a verdict's `stats`; 0.8 where they say nothing."""
    value = stats.get("power")
    return float(value) if isinstance(value, int | float) and 0 < value < 1 else 0.8
