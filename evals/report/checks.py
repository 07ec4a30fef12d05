"""What a control found, in a line: where it holds, a verdict has only its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from evals.questions import named
from evals.report.words import NBSP
from evals.verdict import Control

NAMES: Mapping[str, str] = {
    "aa": "The baseline against itself",
    "sabotage": "A planted defect is noticed",
    "trend": "It does not get worse as it goes",
    "activation": "What was switched on did run",
    "fingerprint": "Answers came from what was asked",
    "errors": "Few enough requests failed",
    "generator": "Requests were sent on time",
}


def found(control: Control) -> str:
    """What it said itself, else its numbers; "" where it has none."""
    tell = _TOLD.get(control.name)
    return control.said or (tell(control.detail) if tell else "")


def _differences(detail: Mapping[str, Any]) -> str:
    """`qa correct −0.1 pp, week ttft.p50 +0.3 %`."""
    told = []
    for key, one in detail.get("metrics", {}).items():
        source, _, metric = key.rpartition(" ")
        name = f"{named(source)} {metric}"
        if one["estimate"] is None:  # too little was asked of the second baseline
            told.append(f"{name} unknown")
            continue
        ratio = one["unit"] == "ratio"
        value = 100 * (one["estimate"] - (1 if ratio else 0))
        unit = "%" if ratio else "pp"
        told.append(f"{name} {value:+.1f}{NBSP}{unit}".replace("-", "−"))
    return ", ".join(told)


def _noticed(detail: Mapping[str, Any]) -> str:
    decisions = list(detail.get("decisions", {}).values())
    if not decisions:
        return ""
    return f"failed by {decisions.count('fail')} of {len(decisions)} guardrails"


def _ran(detail: Mapping[str, Any]) -> str:
    told = [
        f"{name} {one['found']:,.10g}"
        for name, one in detail.get("counters", {}).items()
        if one["found"] is not None
    ]
    if detail.get("exposed") is not None:
        told.append(f"{detail['exposed']:,} requests were touched")
    return ", ".join(told) or "nothing was asked to prove it"


def _answered(detail: Mapping[str, Any]) -> str:
    arms = detail.get("answered", {})
    return f"told by {', '.join(arms)}" if arms else "no answer carried one"


def _failed(detail: Mapping[str, Any]) -> str:
    """The share of each arm, over all sources."""
    sources = list(detail.get("sources", {}).values())
    pairs = sum(one["pairs"] for one in sources)
    if not pairs:
        return ""
    shares = (
        f"{arm} {100 * sum(one[arm] * one['pairs'] for one in sources) / pairs:.1f}{NBSP}%"
        for arm in ("baseline", "candidate")
    )
    return ", ".join(shares)


def _grown(detail: Mapping[str, Any]) -> str:
    """How often it was looked for; what was found a control says itself."""
    return f"{len(detail.get('metrics', {}))} trends by turn and by time looked for"


_TOLD: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "aa": _differences,
    "sabotage": _noticed,
    "trend": _grown,
    "activation": _ran,
    "fingerprint": _answered,
    "errors": _failed,
}
