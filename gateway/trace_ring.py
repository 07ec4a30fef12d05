"""The latest traces of one gateway process, as its console and `headgate trace` read them.

Keeps trails, which cost next to nothing; spans are made of them when somebody asks. What went wrong
is looked for later than what went well, and so stays longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from heapq import merge, nlargest
from itertools import chain, islice
from operator import attrgetter
from typing import Any

from gateway.fate import fate_of
from gateway.phases import phases
from gateway.spans import shadow_spans, spans_of
from gateway.trail import Trail
from policies.tracing import ALWAYS

REASONS = len(ALWAYS)


class Ring:
    """The latest, so many; before these, as many of those that are worth a trace (`Trail.keep`), in
    equal shares by why: a flood of late ones leaves the one that failed. The oldest go first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._latest: deque[Trail] = deque(maxlen=most)
        self._worth: dict[str, deque[Trail]] = {}

    def __len__(self) -> int:
        return self.latest + sum(map(len, self._worth.values()))

    @property
    def latest(self) -> int:
        """How many of them are the latest."""
        return len(self._latest)

    def keep(self, trail: Trail) -> None:
        """One that has ended."""
        latest = self._latest
        if len(latest) == self._most and self._most and (why := latest[0].keep):
            worth = self._worth.get(why)
            if worth is None:
                worth = self._worth[why] = deque(maxlen=-(-self._most // REASONS))
            worth.append(latest[0])
        latest.append(trail)

    def __iter__(self) -> Iterator[Trail]:
        """The latest first, before anything is made of them."""
        older = map(reversed, self._worth.values())
        return chain(reversed(self._latest), merge(*older, key=attrgetter("ended"), reverse=True))

    def first(self, limit: int, *, slow: bool) -> list[Trail]:
        """The latest ones; with `slow`, those that took longest."""
        if slow:
            return nlargest(limit, self, key=attrgetter("e2e_s"))
        return list(islice(self, limit))

    def trail(self, name: str) -> Trail | None:
        """By the id of the trace, the request, the receipt or the answer; the latest of several."""
        return next((one for one in self if _is_named(one, name)), None)


def _is_named(trail: Trail, name: str) -> bool:
    receipt = trail.receipt
    known = (trail.trace_id, trail.request_id, receipt.id if receipt else "")
    return bool(name) and (name in known or name == trail.answer_id)


def brief(trail: Trail) -> dict[str, Any]:
    """What lists say of it, too."""
    service, usage = trail.service, trail.usage
    return {
        "tenant": trail.tenant,
        "model": trail.model,
        "tier": service.tier if service else "",
        "arm": trail.arm,
        "status": trail.status,
        "error": trail.error,
        "outcome": fate_of(trail),
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "cached_tokens": usage.cached_tokens if usage else None,
        "answer_tokens": usage.answer_tokens if usage else None,
        "ttft_s": trail.ttft_s,
        "e2e_s": trail.e2e_s,
        "keep": trail.keep,
    }


def told(trail: Trail) -> dict[str, Any]:
    """As JSON."""
    return {
        **brief(trail),
        "trace_id": trail.trace_id,
        "request_id": trail.request_id,
        "answer_id": trail.answer_id,
        "receipt": trail.receipt.id if trail.receipt else "",
        "replica": trail.hops[-1].replica.url if trail.hops else "",
        "started_at": trail.at,
        "tpot_s": trail.tpot_s,
        "phases": phases(trail),
        "spans": [span.payload() for span in (*spans_of(trail), *shadow_spans(trail))],
    }
