"""The forest: every interval against what it may reach, all on one scale."""

from __future__ import annotations

from collections.abc import Sequence

from evals.report.markup import Markup, join, tag
from evals.report.plot import Axis
from evals.report.scale import harm
from evals.report.words import (
    SIGNS,
    TITLES,
    failed,
    figure,
    flips,
    interval,
    level,
    limit,
    what,
    why,
)
from evals.verdict import Finding

# Multiples of the margin that the picture always shows, and beyond which it shows an arrow.
_LEAST, _MOST = (-1.0, 1.6), 4.0


def forest(findings: Sequence[Finding], heading: str, lead: str) -> Markup:
    """A section with a row for each finding. Nothing where there are none."""
    if not findings:
        return Markup()
    claims = findings[0].kind == "claim"
    ends = [one for one in map(harm, findings) if one is not None]
    low = max(min([_LEAST[0], *(one[0] for one in ends)]) - 0.15, -_MOST)
    high = min(max([_LEAST[1], *(one[2] for one in ends)]) + 0.15, _MOST)
    axis = Axis(low, high)
    return tag(
        "section",
        tag("h2", heading),
        tag("p", lead, class_="lead"),
        tag(
            "div",
            _scale(axis, claims=claims),
            tag("ol", *(_row(one, axis) for one in findings), class_="rows"),
            class_="forest claims" if claims else "forest",
        ),
    )


def _scale(axis: Axis, *, claims: bool) -> Markup:
    """What the two lines are, over the intervals."""
    names = [(0.0, "no difference"), (1.0, "asked for" if claims else "limit")]
    texts = [
        tag("text", name, x=f"{100 * axis.at(value):.2f}%", y=13, text_anchor="middle")
        for value, name in names
    ]
    # The columns are those of the rows; where there is one column only, the picture stands alone.
    picture = tag("svg", *texts, height=18, class_="scale", aria_hidden="true")
    return tag("div", tag("span"), picture, tag("span"), class_="row head", aria_hidden="true")


def _row(finding: Finding, axis: Axis) -> Markup:
    notes = [one for one in (flips(finding), why(finding), failed(finding)) if one]
    pairs = f"{finding.pairs:,} pairs"
    if finding.clusters and finding.clusters != finding.pairs:
        pairs += f", {finding.clusters:,} clusters"
    method = finding.method.replace("_", " ")
    return tag(
        "li",
        tag(
            "div",
            tag("strong", what(finding)),
            tag("span", f"{pairs} · {method}" if method else pairs, class_="quiet"),
            *(tag("span", note, class_="quiet") for note in notes),
            class_="name",
        ),
        _picture(finding, axis),
        tag(
            "div",
            tag("b", figure(finding, finding.estimate)),
            tag("span", interval(finding), title=f"{level(finding)} interval")
            if finding.estimate is not None
            else None,
            tag("span", f"must be {limit(finding)}".replace("be within", "be"), class_="quiet"),
            class_="figures",
        ),
        badge(finding.decision),
        class_=f"row {finding.decision}",
    )


def badge(decision: str) -> Markup:
    """The decision as a sign and a word: nobody needs to see the colour."""
    return tag(
        "span",
        tag("i", SIGNS[decision], aria_hidden="true"),
        TITLES[decision],
        class_=f"badge {decision}",
    )


def _picture(finding: Finding, axis: Axis) -> Markup:
    ends = harm(finding)
    zero, one = (f"{100 * axis.at(value):.2f}%" for value in (0.0, 1.0))
    marks = [tag("line", x1=zero, x2=zero, y1="0", y2="100%", class_="zero")]
    limits = (-1.0, 1.0) if finding.test == "tost" else (1.0,)
    marks += [_forbidden(axis, value, claim=finding.kind == "claim") for value in limits]
    if ends is None:
        marks.append(tag("text", "no interval", x=one, y="50%", dy="0.32em", dx=8, class_="note"))
    else:
        marks.append(_interval(axis, ends))
    label = f"{what(finding)}: {figure(finding, finding.estimate)}, {interval(finding)}"
    return tag("svg", *marks, height=34, class_="interval", role="img", aria_label=label)


def _forbidden(axis: Axis, value: float, *, claim: bool) -> Markup:
    """The limit, and the side on which an interval must not reach."""
    at = 100 * axis.at(value)
    left = (value < 0) != claim
    return join(
        tag("rect", x="0" if left else f"{at:.2f}%", width=f"{at if left else 100 - at:.2f}%",
            y="0", height="100%", class_="beyond"),
        tag("line", x1=f"{at:.2f}%", x2=f"{at:.2f}%", y1="0", y2="100%", class_="limit"),
    )  # fmt: skip


def _interval(axis: Axis, ends: tuple[float, float, float]) -> Markup:
    low, middle, high = (f"{100 * axis.at(value):.2f}%" for value in ends)
    marks = [tag("line", x1=low, x2=high, y1="50%", y2="50%", class_="bar")]
    for value, at, arrow in ((ends[0], low, "◂"), (ends[2], high, "▸")):
        if axis.low <= value <= axis.high:
            marks.append(tag("line", x1=at, x2=at, y1="32%", y2="68%", class_="bar"))
        else:  # goes on outside
            marks.append(tag("text", arrow, x=at, y="50%", dy="0.34em", class_="arrow",
                             text_anchor="start" if arrow == "◂" else "end"))  # fmt: skip
    if axis.low <= ends[1] <= axis.high:
        marks.append(tag("circle", cx=middle, cy="50%", r=4.5, class_="point"))
    return join(*marks)
