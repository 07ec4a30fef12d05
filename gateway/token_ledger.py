"""The token ledger: what became of one request's tokens, count by count, and what must hold of it.

Pure. Counts come from different places (the gateway's tokenizer, the trimming, the replica's usage,
the stream, the tenant's limits), so that one who miscounts contradicts another. A count that nobody
has told is None, and nothing is demanded of it.
"""

from __future__ import annotations

from typing import NamedTuple

STAGES = (
    "received", "trimmed", "templated", "cached", "prefilled", "drafted", "accepted", "emitted",
    "billed",
)  # fmt: skip
# What has to hold of every request.
INVARIANTS = (
    "trimmed_within_received", "templated_as_counted", "cached_within_templated",
    "accepted_within_emitted", "accepted_as_marked", "rejected_as_marked", "emitted_as_streamed",
    "emitted_within_allowed", "billed_is_sum", "charged_is_sum",
)  # fmt: skip


class Entry(NamedTuple):
    """One request's counts, in tokens."""

    received: int | None = None  # of the prompt as the client sent it
    trimmed: int = 0  # of these, left out by the gateway
    counted: int | None = None  # of the prompt that was sent on, by the gateway's exact count
    templated: int | None = None  # the same, by the replica
    cached: int | None = None  # of these, that it had
    accepted: int | None = None  # of the answer, that a draft had guessed
    rejected: int | None = None  # that were guessed in vain
    marked_accepted: int | None = None  # the same, by the marks in the stream
    marked_rejected: int | None = None
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


def enter(totals: dict[str, int], e: Entry) -> None:
    """Adds the counts that are known, by stage."""
    for name, count in (
        ("received", e.received), ("trimmed", e.trimmed), ("templated", e.templated),
        ("cached", e.cached), ("prefilled", e.prefilled), ("drafted", e.drafted),
        ("accepted", e.accepted), ("emitted", e.emitted), ("billed", e.billed),
    ):  # fmt: skip
        if count:
            totals[name] += count


def violated(e: Entry) -> list[str]:
    """The invariants that do not hold of it, by name."""
    whole = None if e.templated is None or e.emitted is None else e.templated + e.emitted
    held = (
        _within(e.trimmed, e.received),
        _same(e.templated, e.counted),
        _within(e.cached, e.templated),
        _within(e.accepted, e.emitted),
        _same(e.accepted, e.marked_accepted),
        _same(e.rejected, e.marked_rejected),
        _same(e.emitted, e.streamed),
        _within(e.emitted, e.allowed),
        _same(e.billed, whole),
        _same(e.charged, whole),
    )
    if all(held):
        return []
    return [name for name, holds in zip(INVARIANTS, held, strict=True) if not holds]


def _same(one: int | None, other: int | None) -> bool:
    return one == other or one is None or other is None


def _within(part: int | None, whole: int | None) -> bool:
    return part is None or whole is None or 0 <= part <= whole
