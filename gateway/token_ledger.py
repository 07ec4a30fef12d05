"""The token ledger: what became of one request's tokens, count by count, and what must hold of it.

Pure. Counts come from different places (the gateway's tokenizer, the trimming, the replica's usage,
the stream, the tenant's limits), so that one who miscounts contradicts another. A count that nobody
has told is None, and nothing is demanded of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

STAGES = (
    "received", "trimmed", "templated", "cached", "prefilled", "drafted", "accepted", "emitted",
    "billed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One request's counts, in tokens."""

    received: int | None = None  # of the prompt as the client sent it
    trimmed: int = 0  # of these, left out by the gateway
    counted: int | None = None  # of the prompt that was sent on, by the gateway's exact count
    templated: int | None = None  # the same, by the replica
    cached: int | None = None  # of these, that it had
    accepted: int | None = None  # of the answer, that a draft had guessed
    rejected: int | None = None
    emitted: int | None = None  # of the answer, by the replica's usage
    streamed: int | None = None  # the same, by what came in the stream
    billed: int | None = None  # prompt and answer, as the usage adds them up
    charged: int | None = None  # the same, as the tenant's limits were charged
    allowed: int | None = None  # of the answer, at most, by the request

    @property
    def prefilled(self) -> int | None:
        """What the replica had to compute of the prompt."""
        if self.templated is None or self.cached is None:
            return None
        return self.templated - self.cached

    @property
    def drafted(self) -> int | None:
        if self.accepted is None or self.rejected is None:
            return None
        return self.accepted + self.rejected

    def stages(self) -> Mapping[str, int]:
        """The counts that are known, by stage."""
        found = {name: getattr(self, name) for name in STAGES}
        return {name: count for name, count in found.items() if count is not None}


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _same(one: int | None, other: int | None) -> bool:
    return one is None or other is None or one == other


def _within(part: int | None, whole: int | None) -> bool:
    return part is None or whole is None or 0 <= part <= whole


# By name: what holds of every request.
INVARIANTS: Mapping[str, Callable[[Entry], bool]] = {
    "trimmed_within_received": lambda e: _within(e.trimmed, e.received),
    "templated_as_counted": lambda e: _same(e.templated, e.counted),
    "cached_within_templated": lambda e: _within(e.cached, e.templated),
    "accepted_within_emitted": lambda e: _within(e.accepted, e.emitted),
    "emitted_as_streamed": lambda e: _same(e.emitted, e.streamed),
    "emitted_within_allowed": lambda e: _within(e.emitted, e.allowed),
    "billed_is_sum": lambda e: _same(e.billed, _sum(e.templated, e.emitted)),
    "charged_is_sum": lambda e: _same(e.charged, _sum(e.templated, e.emitted)),
}


def violated(entry: Entry) -> tuple[str, ...]:
    """The invariants that do not hold of it, by name."""
    return tuple(name for name, holds in INVARIANTS.items() if not holds(entry))
