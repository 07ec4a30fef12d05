"""The token ledger of a worker: what became of one answer's tokens, and what must hold of it.

Pure. A sequence's own state says how long prompt and answer are, what was found and what has its
keys and values; the counts say what the engine did for it step by step. One of the two that goes
wrong contradicts the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

STAGES = ("templated", "cached", "prefilled", "drafted", "accepted", "sampled", "emitted")


@dataclass(slots=True)
class Counts:
    """What the engine did for one sequence, in tokens; its thread alone adds."""

    prefilled: int = 0  # rows of the prompt that were computed, again ones too
    drafted: int = 0
    accepted: int = 0
    sampled: int = 0  # drawn from the model's own logits
    emitted: int = 0  # handed out to its client
    computed: int = 0  # that had keys and values at its end


@dataclass(frozen=True, slots=True)
class Entry:
    """One answer that came whole, in tokens."""

    counts: Counts
    templated: int  # of the prompt
    cached: int  # of these, found when it was first admitted
    said: int  # of the answer, as the sequence has it
    allowed: int  # of the answer, at most
    proposed: int  # guesses that the sequence was given
    preempted: bool  # so that what it had computed may have been computed again

    def stages(self) -> Mapping[str, int]:
        """Its counts by stage."""
        counts = self.counts
        return {
            "templated": self.templated,
            "cached": self.cached,
            "prefilled": counts.prefilled,
            "drafted": counts.drafted,
            "accepted": counts.accepted,
            "sampled": counts.sampled,
            "emitted": counts.emitted,
        }


def _all_read(entry: Entry) -> bool:
    read = entry.counts.prefilled + entry.cached
    return read >= entry.templated if entry.preempted else read == entry.templated


# By name: what holds of every answer that came whole.
INVARIANTS: Mapping[str, Callable[[Entry], bool]] = {
    "prefilled_and_cached_is_templated": _all_read,
    "cached_within_templated": lambda e: 0 <= e.cached <= e.templated,
    "drafted_as_proposed": lambda e: e.counts.drafted == e.proposed,
    "accepted_within_drafted": lambda e: 0 <= e.counts.accepted <= e.counts.drafted,
    "emitted_is_sampled_and_accepted": lambda e: (
        e.counts.emitted == e.counts.sampled + e.counts.accepted
    ),
    "emitted_as_said": lambda e: e.counts.emitted == e.said,
    "emitted_within_allowed": lambda e: e.said <= e.allowed,
    "computed_is_all_but_last": lambda e: (
        not e.said or e.counts.computed == e.templated + e.said - 1
    ),
}


def violated(entry: Entry) -> tuple[str, ...]:
    """The invariants that do not hold of it, by name."""
    return tuple(name for name, holds in INVARIANTS.items() if not holds(entry))
