"""A finding in words and figures: the same ones in JUnit, Markdown, HTML and on the terminal."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from evals.metrics import metric
from evals.questions import named
from evals.verdict import Finding, Verdict

# What a verdict says in a sentence; the reasons say why.
SENTENCES = {
    "pass": "Every guardrail holds and what was claimed is shown. This configuration may go live.",
    "fail": "Harm beyond what was allowed is proven.",
    "inconclusive": "Neither harm nor its absence is proven. Nothing goes live.",
    "invalid": "The measurement itself cannot be trusted. Nothing follows from it.",
    "no_benefit": "Nothing was lost, and nothing that was claimed is shown. It is not worth it.",
}
TITLES = {
    "pass": "Pass",
    "fail": "Fail",
    "inconclusive": "Inconclusive",
    "invalid": "Invalid",
    "no_benefit": "No benefit",
}
SIGNS = {"pass": "✓", "fail": "✗", "inconclusive": "?", "invalid": "!", "no_benefit": "="}
NBSP = "\u00a0"


def title(verdict: Verdict) -> str:
    """`Inconclusive (underpowered)`."""
    reason = verdict.reason.replace("_", " ")
    return f"{TITLES[verdict.decision]} ({reason})" if reason else TITLES[verdict.decision]


def figure(
    finding: Finding, value: float | None, *, signed: bool = True, places: int | None = None
) -> str:
    """A value in the unit of the finding: `−1.3 pp`, `+8.0 %`, `0.20 %`."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "−∞" if value < 0 else "∞"
    if finding.unit == "ratio":
        return _rounded(100 * (value - 1), "%", signed=signed, places=places)
    if metric(finding.metric).kind not in ("share", "flip", "divergence"):
        return _rounded(value, "", signed=signed and finding.unit != "share", places=places)
    if finding.unit == "share":
        return _rounded(100 * value, "%", signed=False, places=places)
    return _rounded(100 * value, "pp", signed=signed, places=places)


def _rounded(value: float, unit: str, *, signed: bool, places: int | None) -> str:
    """Two digits that say something, and a true minus."""
    if places is None:
        places = 1 if abs(value) >= 1 or value == 0 else 2
    text = f"{value:+.{places}f}" if signed else f"{value:.{places}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return f"{text.replace('-', '−')}{NBSP}{unit}" if unit else text.replace("-", "−")


def interval(finding: Finding) -> str:
    """`−2.1 … +0.4 pp`: both one-sided bounds."""
    if finding.low is None and finding.high is None:
        return "–"
    # Both ends with as many places as the wider one needs.
    wider = max((finding.low, finding.high), key=lambda end: abs(_off(finding, end)))
    text = figure(finding, wider)
    places = len(text.partition(NBSP)[0].partition(".")[2])
    low, high = (figure(finding, end, places=places) for end in (finding.low, finding.high))
    unit = low.rpartition(NBSP)[2]
    if NBSP in low and high.endswith(f"{NBSP}{unit}"):
        low = low.rpartition(NBSP)[0]
    return f"{low}{NBSP}…{NBSP}{high}"


def _off(finding: Finding, value: float | None) -> float:
    """How far from equality."""
    if value is None or not math.isfinite(value):
        return 0.0
    return value - 1 if finding.unit == "ratio" else value


def limit(finding: Finding) -> str:
    """What the interval must be: `> −2.0 pp`, `< +10.0 %`, `within ±10.0 %`."""
    if finding.margin is None:
        return "–"
    shown = figure(finding, finding.margin)
    if finding.test == "tost":
        return f"within ±{shown.lstrip('+−')}"
    return f"{'>' if lower_is_harm(finding) else '<'} {shown}"


def lower_is_harm(finding: Finding) -> bool:
    """Whether the margin lies below equality: accuracy that may fall, throughput that may."""
    if finding.margin is None or finding.unit == "share":
        return False
    equal = 1.0 if finding.unit == "ratio" else 0.0
    below = finding.margin < equal
    return not below if finding.kind == "claim" else below


def level(finding: Finding) -> str:
    """`90 %`: of the interval that two bounds at alpha make together."""
    return f"{100 * (1 - 2 * finding.alpha):g}{NBSP}%"


def what(finding: Finding) -> str:
    """`support-qa correct`, with its stratum where it is not everything."""
    source = named(finding.source)
    stratum = "" if finding.stratum in ("", "all") else f" · {finding.stratum}"
    return f"{source} {finding.metric}{stratum}"


def flips(finding: Finding) -> str:
    """`lost 6, gained 1`, where answers are right or wrong."""
    if finding.lost is None or finding.gained is None:
        return ""
    return f"lost {finding.lost}, gained {finding.gained}"


def shortfall(finding: Finding) -> str:
    """What these data could have shown, and what it would have taken; "" where enough was there."""
    if finding.decision != "inconclusive":
        return ""
    said = []
    if finding.mde is not None:
        # A distance from equality, without a sign.
        effect = finding.mde + 1 if finding.unit == "ratio" else finding.mde
        said.append(f"could have shown {figure(finding, effect, signed=False)}")
    if finding.pairs_needed is not None and finding.pairs_needed > finding.pairs:
        said.append(f"needs {finding.pairs_needed:,} pairs, had {finding.pairs:,}")
    return ", ".join(said)


def why(finding: Finding) -> str:
    """The reason of a finding and its shortfall, in one line."""
    told = (finding.reason.replace("_", " "), str(finding.detail.get("why", "")))
    return "; ".join(one for one in (*told, shortfall(finding)) if one)


def failed(finding: Finding) -> str:
    """What failed requests make of a finding: they count, and this is it without them."""
    if not finding.errors:
        return ""
    requests = (
        "failed request counts as a loss"
        if finding.errors == 1
        else ("failed requests count as losses")
    )
    without = figure(finding, finding.complete_estimate)
    rest = "" if finding.complete_estimate is None else f"; without them {without}"
    return f"{finding.errors:,} {requests}{rest}"


def moment(seconds: float | None) -> str:
    """`2026-11-26 07:30 UTC`."""
    if seconds is None:
        return "never"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def pairs_of(verdict: Verdict) -> int:
    """Pairs of the whole run: the most that any finding has over everything."""
    return max((one.pairs for one in verdict.findings if one.stratum in ("", "all")), default=0)
