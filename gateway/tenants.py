"""What each tenant asked for, got and was refused: of the last minutes, and since the start.

Knows tenants by their names and counts alone. Bounded: what more than MOST tenants do is counted
together. What several processes counted is added up by `together`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from gateway.fate import FATES, JUDGED, MISSED, fate_of

if TYPE_CHECKING:
    from gateway.trail import Trail

MOST = 512  # tenants that are counted each by itself
SLOT_S = 20.0
SLOTS = 15
WINDOW_S = SLOT_S * SLOTS
OTHERS = "\0others"  # no tenant has such a name
# `told`: of prompts whose replica says what of them it had; others say nothing of cached tokens.
# `untold`: of answers that said no count, since their clients left or they were cut in the middle.
TOKENS = (
    "prompt_tokens", "told_tokens", "cached_tokens", "answer_tokens", "untold_tokens",
    "billed_tokens",
)  # fmt: skip
COUNTS = (*FATES, *TOKENS)
ORDERS = ("computed", "requests", "missed", "limited")
_AT = {fate: at for at, fate in enumerate(FATES)}
_PROMPT = len(FATES)

Counts = dict[str, list[int]]  # by tier, in the order of COUNTS
Told = dict[str, Any]


@dataclass(slots=True)
class Spent:
    """Of one tenant."""

    before: Counts = field(default_factory=dict)  # of slots that are gone
    slots: deque[tuple[int, Counts]] = field(default_factory=deque)

    def in_slot(self, slot: int) -> Counts:
        """What this slot has so far."""
        slots = self.slots
        if not slots or slots[-1][0] != slot:
            if len(slots) == SLOTS:
                self.before = summed((self.before, slots.popleft()[1]))
            slots.append((slot, {}))
        return slots[-1][1]

    def told(self, slot: int) -> list[Counts]:
        """Of the slots that are not over for longer than the window, and since the start."""
        now = summed(one for at, one in self.slots if at > slot - SLOTS)
        over = [one for at, one in self.slots if at <= slot - SLOTS]
        return [now, summed((self.before, *over, now))]


class Tenants:
    """Of one gateway process. Outlives policies."""

    def __init__(self) -> None:
        self._spent: dict[str, Spent] = {}

    def ended(self, trail: Trail) -> None:
        """One request; every one comes through here."""
        name = trail.tenant
        spent = self._spent.get(name)
        if spent is None:
            if len(self._spent) >= MOST and name:
                name = OTHERS
            spent = self._spent.setdefault(name, Spent())
        counts = spent.in_slot(int(trail.ended // SLOT_S))
        tier = trail.service.tier if trail.service is not None else ""
        row = counts.get(tier)
        if row is None:
            row = counts[tier] = [0] * len(COUNTS)
        row[_AT[fate_of(trail)]] += 1
        usage = trail.usage
        if usage is None:
            row[_PROMPT + 4] += computed_untold(trail)
            return
        row[_PROMPT] += usage.prompt_tokens
        if usage.cached_tokens is not None:
            row[_PROMPT + 1] += usage.prompt_tokens
            row[_PROMPT + 2] += usage.cached_tokens
        row[_PROMPT + 3] += usage.answer_tokens
        row[_PROMPT + 5] += usage.prompt_tokens + usage.answer_tokens

    def told(self, now: float) -> dict[str, list[Counts]]:
        """Of each by its name: of the window, and since the start. `now` as `Trail.ended`."""
        slot = int(now // SLOT_S)
        return {name: one.told(slot) for name, one in self._spent.items()}


def computed_untold(trail: Trail) -> int:
    """Tokens that a replica computed for a stream which had begun to say something: its prompt, but
    for what was foreseen to be cached, and what was seen of its answer, a piece as one. What was
    done for others is not known."""
    foreseen = trail.receipt.foreseen if trail.receipt is not None else None
    if foreseen is None or trail.spoke is None:
        return 0
    return max(0, foreseen.prompt - foreseen.captured) + trail.seen_tokens


def summed(several: Iterable[Mapping[str, list[int]]]) -> Counts:
    """Count by count."""
    found: Counts = {}
    for counts in several:
        for tier, row in counts.items():
            before = found.get(tier)
            found[tier] = list(row) if before is None else list(map(int.__add__, before, row))
    return found


def together(
    several: Iterable[Mapping[str, list[Counts]]], known: Iterable[str], by: str, top: int
) -> Told:
    """What processes told as one, the first `top` by one of ORDERS each by itself; those of the
    policy that asked for nothing come last. The rest is one more line."""
    names: dict[str, list[list[Counts]]] = {}
    for told in several:
        for name, pair in told.items():
            names.setdefault(name, []).append(pair)
    rows = {
        name: {
            "now": shaped(summed(now for now, _ in pairs)),
            "ever": shaped(summed(ever for _, ever in pairs)),
        }
        for name, pairs in names.items()
    }
    beyond = rows.pop(OTHERS, None)
    for name in known:
        rows.setdefault(name, {"now": shaped({}), "ever": shaped({})})

    def rank(name: str) -> tuple[Any, ...]:
        row = rows[name]
        return (-row["now"][by], -row["ever"][by], -row["ever"]["requests"], name)

    ordered = sorted(rows, key=rank)
    rest = [rows[name] for name in islice(ordered, top, None)]
    rest += [beyond] if beyond is not None else []
    whole = [*rows.values(), *([beyond] if beyond is not None else [])]
    return {
        "window_s": WINDOW_S,
        "by": by,
        "tenants": [{"name": name, **rows[name]} for name in ordered[:top]],
        "others": {"tenants": len(rest), **_added(rest)} if rest else None,
        "all": _added(whole),
    }


def shaped(counts: Counts) -> Told:
    """By name, over all tiers; and what each tier's requests were billed."""
    row = [sum(column) for column in zip(*counts.values(), strict=True)] or [0] * len(COUNTS)
    found: Told = dict(zip(COUNTS, row, strict=True))
    found["requests"] = sum(found[fate] for fate in FATES)
    found["judged"] = sum(found[fate] for fate in JUDGED)
    found["missed"] = sum(found[fate] for fate in MISSED)
    # What engines had to do for it: what was cached cost them next to nothing.
    found["computed"] = found["billed_tokens"] - found["cached_tokens"] + found["untold_tokens"]
    found["tiers"] = {tier: row[-1] for tier, row in sorted(counts.items()) if row[-1]}
    return found


def _added(rows: list[Told]) -> Told:
    return {span: _sum([row[span] for row in rows]) for span in ("now", "ever")}


def _sum(several: list[Told]) -> Told:
    found = shaped({})
    for one in several:
        for name, value in one.items():
            if name == "tiers":
                for tier, tokens in value.items():
                    found["tiers"][tier] = found["tiers"].get(tier, 0) + tokens
            else:
                found[name] += value
    return found
