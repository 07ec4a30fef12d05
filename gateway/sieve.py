"""Requests that are kept, sifted by what somebody looks for; and how long they took, by bucket.

Works on trails as the ring has them, and makes lines of those alone that are shown.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from gateway import problems
from gateway.fate import FATES, MISSED, fate_of
from gateway.pause import Pause
from gateway.query import number, one_of, refuse_unknown
from gateway.trace_ring import brief
from gateway.trail import Trail

USUAL, MOST = 50, 200  # lines in one answer
LOOKED_AT = 2000  # the latest ones: however many are kept, nobody waits for who looks
AT_ONCE = 25  # of these, then others may go on
TEXT_CHARS = 200
CHOICES = 50  # values of a field that are told, to choose among
BOUNDS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
FIELDS: Mapping[str, Callable[[Trail], str]] = {
    "tenant": lambda one: one.tenant,
    "model": lambda one: one.model,
    "tier": lambda one: one.service.tier if one.service else "",
    "arm": lambda one: one.arm,
    "replica": lambda one: one.hops[-1].replica.url if one.hops else "",
}
ASKED = (*FIELDS, "outcome", "clock", "order", "text", "over_s", "under_s", "limit")
OUTCOMES = (*FATES, "missed")
Clock = Literal["first", "whole"]


@dataclass(frozen=True, slots=True)
class Sieve:
    """What a request has to be."""

    fields: Mapping[str, str]  # each as it is in FIELDS, exactly
    outcomes: Sequence[str]  # empty: any
    text: str  # in one of its ids or names
    clock: Clock  # what over_s and under_s are of: the first token, or all of it
    over_s: float
    under_s: float
    slowest: bool  # first, rather than the latest
    limit: int

    @classmethod
    def of(cls, asked: Mapping[str, str]) -> Sieve:
        """By what stands in a query. Raises Problem 400."""
        refuse_unknown(asked, ASKED)
        outcome = one_of(asked, "outcome", ("", *OUTCOMES))
        clock = one_of(asked, "clock", ("first", "whole"))
        order = one_of(asked, "order", ("latest", "slowest"))
        return cls(
            {name: asked[name] for name in FIELDS if asked.get(name)},
            MISSED if outcome == "missed" else (outcome,) if outcome else (),
            asked.get("text", "")[:TEXT_CHARS].lower(),
            "whole" if clock == "whole" else "first",
            _moment(asked, "over_s", 0.0),
            _moment(asked, "under_s", math.inf),
            order == "slowest",
            number(asked, "limit", USUAL, MOST),
        )

    def took_s(self, trail: Trail) -> float | None:
        return trail.ttft_s if self.clock == "first" else trail.e2e_s

    def passes(self, trail: Trail) -> bool:
        """All but for how long it took."""
        if any(FIELDS[name](trail) != value for name, value in self.fields.items()):
            return False
        if self.outcomes and fate_of(trail) not in self.outcomes:
            return False
        return not self.text or any(self.text in one.lower() for one in _texts(trail))

    def in_time(self, took_s: float | None) -> bool:
        if took_s is None:
            return self.over_s == 0 and self.under_s == math.inf
        return self.over_s < took_s <= self.under_s or took_s == self.over_s == 0


async def sift(trails: Iterable[Trail], sieve: Sieve, latest: int = LOOKED_AT) -> dict[str, Any]:
    """Of one process. `trails`: the latest first, so many; then older ones that are worth it.
    Streams go on meanwhile."""
    looked = list(islice(trails, LOOKED_AT))
    shown: list[tuple[Trail, float | None]] = []
    choices: dict[str, set[str]] = {name: set() for name in FIELDS}
    buckets = _buckets()
    pause = Pause()
    for at, one in enumerate(looked):
        if at % AT_ONCE == 0:
            await pause()
        for name, read in FIELDS.items():
            choices[name].add(read(one))
        if not sieve.passes(one):
            continue
        took_s = sieve.took_s(one)
        _enter(buckets, one, took_s)
        if sieve.in_time(took_s):
            shown.append((one, took_s))
    if sieve.slowest:
        shown.sort(key=lambda pair: pair[1] or 0.0, reverse=True)
    return {
        "requests": [row(one) for one, _ in shown[: sieve.limit]],
        "matched": len(shown),
        "kept": len(looked),
        "older": max(0, len(looked) - latest),
        "buckets": buckets,
        "choices": {name: sorted(found - {""})[:CHOICES] for name, found in choices.items()},
    }


def merged(several: Sequence[dict[str, Any]], sieve: Sieve) -> dict[str, Any]:
    """What processes told, as one."""
    rows = [row for one in several for row in one["requests"]]
    took = "ttft_s" if sieve.clock == "first" else "e2e_s"
    rows.sort(key=lambda one: (one[took] or 0.0) if sieve.slowest else one["at"], reverse=True)
    return {
        "requests": rows[: sieve.limit],
        "matched": sum(one["matched"] for one in several),
        "kept": sum(one["kept"] for one in several),
        "older": sum(one["older"] for one in several),
        "clock": sieve.clock,
        "buckets": [
            _joined(some) for some in zip(*(one["buckets"] for one in several), strict=True)
        ],
        "choices": {
            name: sorted({value for one in several for value in one["choices"][name]})[:CHOICES]
            for name in FIELDS
        },
    }


def row(one: Trail) -> dict[str, Any]:
    """One line of a list."""
    receipt = one.receipt
    return {
        **brief(one),
        "id": one.request_id,
        "receipt": receipt.id if receipt else None,
        "at": one.at,
        "replica": one.hops[-1].replica.url if one.hops else None,
        "attempts": len(one.hops),
        "foreseen_ttft_s": receipt.foreseen_ttft_s if receipt else None,
    }


def _texts(one: Trail) -> Iterable[str]:
    yield from (one.request_id, one.trace_id, one.error)
    yield from (read(one) for read in FIELDS.values())
    if one.receipt is not None:
        yield one.receipt.id


def _buckets() -> list[dict[str, Any]]:
    """Each with the one of it that took longest, which has a trace."""
    tops = (*BOUNDS_S, None)
    return [
        {"under_s": top, "count": 0, "missed": 0, "slowest": None, "slowest_s": 0.0} for top in tops
    ]


def _enter(buckets: list[dict[str, Any]], one: Trail, took_s: float | None) -> None:
    if took_s is None:
        return
    bucket = buckets[bisect_left(BOUNDS_S, took_s)]
    bucket["count"] += 1
    bucket["missed"] += fate_of(one) in MISSED
    if took_s >= bucket["slowest_s"]:
        bucket["slowest"], bucket["slowest_s"] = one.request_id, took_s


def _joined(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
    most = max(some, key=lambda one: float(one["slowest_s"]))
    counts = {name: sum(one[name] for one in some) for name in ("count", "missed")}
    return {**most, **counts}


def _moment(asked: Mapping[str, str], name: str, usual: float) -> float:
    text = asked.get(name, "")
    if not text:
        return usual
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise problems.wrong_value(name, "seconds from 0 on", problems.quote(text))
    return value
