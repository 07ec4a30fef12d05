"""Which findings of a verdict a changed leaf spoils. docs/binding.md has the same table.

Knows names of leaves, sources and metrics; computes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Aspect = Literal["quality", "speed", "slo"]
# `check`: the finding may well still hold; that no answer changes has to be shown again by A/A.
Effect = Literal["stale", "check"]

_ANSWERS: Mapping[Aspect, Effect] = {"quality": "stale", "speed": "stale", "slo": "stale"}
_TIMES: Mapping[Aspect, Effect] = {"quality": "check", "speed": "stale", "slo": "stale"}

EFFECTS: Mapping[str, Mapping[Aspect, Effect]] = {
    "weights": _ANSWERS,
    "draft": _ANSWERS,
    "tokenizer": _ANSWERS,
    "template": _ANSWERS,
    "adapters": _ANSWERS,
    "engine": _ANSWERS,
    "numerics": _ANSWERS,
    "edge": _ANSWERS,
    "trim": _ANSWERS,
    "response_cache": _ANSWERS,
    "upstreams": _ANSWERS,
    "url": _ANSWERS,
    "hypothesis": _ANSWERS,
    "device": _TIMES,
    "batching": _TIMES,
    "routing": _TIMES,
    "scheduling": _TIMES,
    "transport": _TIMES,
    "slo": {"slo": "stale"},
}
# Leaves of one source: they spoil what was found on it, and nothing else.
_OF_SOURCE = re.compile(r"(suite|scorers|judge|replay):(.+)", re.DOTALL)

_SPEED = re.compile(
    r"(ttft|tpot|e2e|gap|gap_max|itl|queue|throughput|requests|memory|cpu)([._].*)?"
)
_SLO = ("slo_attained", "goodput")


@dataclass(frozen=True, slots=True)
class Spoiled:
    """A finding that a changed leaf took the ground from."""

    finding: str
    leaf: str
    effect: Effect


def aspect(metric: str) -> Aspect:
    """What a metric speaks of; a scorer's name, and any that is not known, of quality."""
    if metric in _SLO:
        return "slo"
    return "speed" if _SPEED.fullmatch(metric) else "quality"


def effect(leaf: str, source: str, metric: str) -> Effect | None:
    """Of a changed leaf on a finding; None: it stands. A leaf that is not known spoils all."""
    if (match := _OF_SOURCE.fullmatch(leaf)) is not None:
        kind, name = match.groups()
        of = f"replay:{name}" if kind == "replay" else f"suite:{name}"
        return "stale" if of == source else None
    return EFFECTS.get(leaf, _ANSWERS).get(aspect(metric))


def spoiled(verdict: Mapping[str, Any], leaves: Iterable[str]) -> tuple[Spoiled, ...]:
    """What no longer stands of a verdict's payload once these leaves are others; each finding at
    the leaf that spoils it most."""
    found = []
    named = list(leaves)
    for finding in verdict["findings"]:
        if finding["kind"] == "control":
            continue
        hits = [
            Spoiled(finding["name"], leaf, hit)
            for leaf in named
            if (hit := effect(leaf, finding["source"], finding["metric"])) is not None
        ]
        found += sorted(hits, key=lambda one: one.effect != "stale")[:1]
    return tuple(found)
