"""The store of one process: dictionaries whose entries expire, bounded.

Its operations are atomic because none of them awaits. It is also the plain reference of RedisStore.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

from cache.store import BUCKET_KEPT_S, QUOTA_KEPT_S, Entries, Quota, Rule, Taken, Want

KEYS_MAX = 10**6  # of each kind; beyond it what expires first goes
V = TypeVar("V")


class MemoryStore:
    """`cache.store.Store` for one process."""

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        keys_max: int = KEYS_MAX,
        among: int = 1,
    ) -> None:
        """One of `among` processes that cannot ask each other gives its share of every rule."""
        self._clock = clock
        self._among = among
        self._levels: Expiring[Level] = Expiring(keys_max)
        self._values: Expiring[bytes] = Expiring(keys_max)
        self._sums: Expiring[float] = Expiring(keys_max)
        self._logs: Expiring[deque[_Entry]] = Expiring(keys_max)
        self._boards: dict[str, Expiring[bytes]] = {}
        self._numbers = count(1)
        self._keys_max = keys_max

    # ---- limits ---------------------------------------------------------------------------------

    async def take(self, wants: Sequence[Want]) -> Taken:
        now, wants = self._clock(), self._shares(wants)
        levels = [self._level(want, now) for want in wants]
        waits = [
            0.0 if want.amount <= level.left else level.wait_s(want.rule, want.amount, now)
            for level, want in zip(levels, wants, strict=True)
        ]
        if any(waits):
            short = tuple(index for index, wait_s in enumerate(waits) if wait_s > 0)
            left = tuple([level.left for level in levels])
            return Taken(False, left, max(waits), short, self._among)
        for level, want in zip(levels, wants, strict=True):
            level.left -= want.amount
            self._keep(want, level, now)
        return Taken(True, tuple([level.left for level in levels]), among=self._among)

    async def settle(self, changes: Sequence[Want]) -> None:
        now = self._clock()
        for change in self._shares(changes):
            level = self._level(change, now)
            level.left = min(change.rule.capacity, level.left + change.amount)
            self._keep(change, level, now)

    async def restore(self, left: Sequence[Want]) -> None:
        now = self._clock()
        for want in self._shares(left):
            level = self._level(want, now)
            level.left = min(level.left, want.amount)
            self._keep(want, level, now)

    def _shares(self, wants: Sequence[Want]) -> Sequence[Want]:
        if self._among == 1:
            return wants
        return [want._replace(rule=want.rule.share(self._among)) for want in wants]

    def _level(self, want: Want, now: float) -> Level:
        """As it is now; a new one is kept by nobody yet."""
        level = self._levels.get(want.key, now)
        if level is None:
            return Level(want.rule.capacity, now)
        level.refill(want.rule, now)
        return level

    def _keep(self, want: Want, level: Level, now: float) -> None:
        self._levels.set(want.key, level, level.expires_at(want.rule), now)

    # ---- values, counters -----------------------------------------------------------------------

    async def get(self, key: str) -> bytes | None:
        return self._values.get(key, self._clock())

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        now = self._clock()
        self._values.set(key, value, now + ttl_s, now)

    async def swap(self, key: str, old: bytes | None, new: bytes | None, ttl_s: float) -> bool:
        now = self._clock()
        if self._values.get(key, now) != old:
            return False
        if new is None:
            self._values.pop(key)
        else:
            self._values.set(key, new, now + ttl_s, now)
        return True

    async def count(self, key: str, amount: float, ttl_s: float) -> float:
        now = self._clock()
        total = self._sums.get(key, now)
        if total is None:
            self._sums.set(key, amount, now + ttl_s, now)
            return amount
        self._sums.change(key, total + amount)
        return total + amount

    # ---- logs, boards ---------------------------------------------------------------------------

    async def append(self, key: str, entries: Sequence[bytes], keep: int, ttl_s: float) -> None:
        now = self._clock()
        log = self._logs.get(key, now) or deque(maxlen=keep)
        log.extend(_Entry(next(self._numbers), now + ttl_s, data) for data in entries)
        self._logs.set(key, log, max((entry.ends_at for entry in log), default=now), now)

    async def read(self, key: str, after: str, limit: int) -> Entries:
        now = self._clock()
        read = int(after.partition("-")[0] or 0)  # another store's cursor has two numbers
        fresh = [
            entry
            for entry in self._logs.get(key, now) or ()
            if entry.number > read and now < entry.ends_at
        ][:limit]
        return Entries(tuple(e.data for e in fresh), str(fresh[-1].number) if fresh else after)

    async def post(self, board: str, owner: str, note: bytes, ttl_s: float) -> None:
        now = self._clock()
        notes = self._boards.setdefault(board, Expiring(self._keys_max))
        if ttl_s > 0:
            notes.set(owner, note, now + ttl_s, now)
        else:
            notes.pop(owner)

    async def notes(self, board: str) -> Mapping[str, bytes]:
        notes = self._boards.get(board)
        return notes.items_at(self._clock()) if notes is not None else {}

    async def aclose(self) -> None:
        """Nothing to end."""


@dataclass(slots=True)
class Level:
    """What was left of a rule at a moment."""

    left: float
    at: float

    def refill(self, rule: Rule, now: float) -> float:
        """What is left now. A clock that goes backwards refills nothing twice."""
        if now > self.at:
            self.left += (now - self.at) * rule.per_s
            self.at = now
        self.left = min(rule.capacity, self.left)
        return self.left

    def wait_s(self, rule: Rule, amount: float, now: float) -> float:
        """Seconds until an amount fits that is more than what is left; 0 where it does."""
        if isinstance(rule, Quota):
            return max(1.0, rule.ends_at - now) if amount <= rule.capacity else math.inf
        lacking = min(amount, rule.capacity) - self.left
        if lacking <= 0:
            return 0.0
        return lacking / rule.per_s if rule.per_s > 0 else math.inf

    def expires_at(self, rule: Rule) -> float:
        """When there is nothing to remember of it any more."""
        if isinstance(rule, Quota):
            return rule.ends_at + QUOTA_KEPT_S
        lacking = rule.capacity - self.left
        full_in_s = lacking / rule.per_s if rule.per_s > 0 else QUOTA_KEPT_S
        return self.at + full_in_s + BUCKET_KEPT_S


@dataclass(frozen=True, slots=True)
class _Entry:
    number: int  # grows over all logs, so that a cursor stays behind what comes
    ends_at: float
    data: bytes


@dataclass(slots=True)
class _Kept(Generic[V]):
    value: V
    ends_at: float
    due_at: float  # of its entry among the ends, which may be earlier: ends mostly move on


class Expiring(Generic[V]):
    """A dictionary whose entries have an end; at most `keys_max` of them."""

    def __init__(self, keys_max: int) -> None:
        self._kept: dict[str, _Kept[V]] = {}
        self._due: list[tuple[float, str]] = []  # a heap; what no entry names is out of date
        self._keys_max = keys_max

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str, now: float) -> V | None:
        kept = self._kept.get(key)
        return kept.value if kept is not None and now < kept.ends_at else None

    def ends_at(self, key: str) -> float:
        """When a kept entry ends."""
        return self._kept[key].ends_at

    def set(self, key: str, value: V, ends_at: float, now: float) -> None:
        known = self._kept.get(key)
        if known is not None and known.due_at <= ends_at:
            known.value, known.ends_at = value, ends_at
            if now < self._due[0][0]:
                return
        else:
            self._kept[key] = _Kept(value, ends_at, ends_at)
            heapq.heappush(self._due, (ends_at, key))
        self._forget(now)

    def change(self, key: str, value: V) -> None:
        """Another value with the same end."""
        self._kept[key].value = value

    def pop(self, key: str) -> None:
        self._kept.pop(key, None)

    def items_at(self, now: float) -> dict[str, V]:
        return {key: kept.value for key, kept in self._kept.items() if now < kept.ends_at}

    def _forget(self, now: float) -> None:
        """Lets go what is over, and what ends first while there is too much."""
        while self._due and (self._due[0][0] <= now or len(self._kept) > self._keys_max):
            due_at, key = heapq.heappop(self._due)
            kept = self._kept.get(key)
            if kept is None or kept.due_at != due_at:
                continue
            if kept.ends_at > due_at:
                kept.due_at = kept.ends_at
                heapq.heappush(self._due, (kept.ends_at, key))
            else:
                del self._kept[key]
        if len(self._due) > 2 * len(self._kept) + 64:  # what was taken out early
            self._due = [(kept.due_at, key) for key, kept in self._kept.items()]
            heapq.heapify(self._due)
