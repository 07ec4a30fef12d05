"""Whether live traffic still looks like the traffic that a hypothesis was judged on.

Compares two recordings by mixes and lengths; the index stands in `stats/drift.py`, what follows
from it in `policies/standing.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evals.rows import Row
from evals.stats.drift import MOVED, noise, psi_of_kinds, psi_of_numbers

ROWS_MIN = 100  # of either: fewer say nothing of a mix
_BINS = 10


@dataclass(frozen=True, slots=True)
class Moved:
    """Index by what was compared, less what chance alone makes of it."""

    before: int
    after: int
    psi: Mapping[str, float]

    @property
    def furthest(self) -> tuple[str, float]:
        return max(self.psi.items(), key=lambda one: one[1])

    @property
    def stays(self) -> bool:
        return self.furthest[1] <= MOVED


def compare(before: Sequence[Row], after: Sequence[Row]) -> Moved:
    """Raises ValueError for too few rows."""
    if min(len(before), len(after)) < ROWS_MIN:
        raise ValueError(
            f"{len(before)} requests were judged and {len(after)} are recorded: less than "
            f"{ROWS_MIN} of either say nothing of a mix"
        )
    found = {
        "prompt length": _numbers([_length(row) for row in before], [_length(row) for row in after])
    }
    for name, kinds in (
        ("first message", _opening),
        ("tier", lambda row: row.tier),
        ("tenant", lambda row: str(row.meta.get("tenant", ""))),
        ("turn", lambda row: str(min(row.turn, _BINS))),
    ):
        found[name] = _kinds([kinds(row) for row in before], [kinds(row) for row in after])
    return Moved(len(before), len(after), found)


def _numbers(before: list[float], after: list[float]) -> float:
    index = psi_of_numbers(before, after, _BINS)
    return max(0.0, index - noise(len(before), len(after), _BINS))


def _kinds(before: list[str], after: list[str]) -> float:
    index = psi_of_kinds(before, after)
    return max(0.0, index - noise(len(before), len(after), len({*before, *after})))


def _length(row: Row) -> float:
    if row.body is None:
        return float(row.prompt_tokens)
    return float(len(json.dumps(row.body.get("messages") or row.body.get("prompt") or "")))


def _opening(row: Row) -> str:
    """What many prompts share: the system prompt; "" for those without, where each is its own."""
    messages = (row.body or {}).get("messages")
    first = messages[0] if isinstance(messages, list) and messages else {}
    shared = isinstance(first, dict) and first.get("role") in ("system", "developer")
    return json.dumps(first.get("content")) if shared else ""
