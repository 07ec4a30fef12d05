"""Changes on their way to a store: added up by key, bounded, kept until they have arrived."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cache.store import Store, StoreDown, Want

KEYS_MAX = 100_000  # of each kind; what is new beyond it is dropped and counted
TOGETHER = 64  # of one kind, told to the store at once


@dataclass(slots=True)
class Outbox:
    """What a store is still to be told. A change that may have arrived is sent again: rather a
    limit too low than too high."""

    changes: dict[str, Want] = field(default_factory=dict)
    values: dict[str, tuple[bytes | None, float]] = field(default_factory=dict)
    counts: dict[str, tuple[float, float]] = field(default_factory=dict)
    logs: dict[str, tuple[deque[bytes], float]] = field(default_factory=dict)
    dropped: int = 0

    def __bool__(self) -> bool:
        return bool(self.changes or self.values or self.counts or self.logs)

    def rounds(self) -> int:
        """How often `send` must be called for what is in it now."""
        together = max(len(self.changes), len(self.values)) // TOGETHER + 1
        return max(together, len(self.counts), len(self.logs))

    def settle(self, change: Want) -> None:
        known = self.changes.get(change.key)
        if known is not None:
            change = change._replace(amount=known.amount + change.amount)
        if self._has_room(self.changes, change.key):
            self.changes[change.key] = change

    def put(self, key: str, value: bytes | None, ttl_s: float) -> None:
        """None takes the value away."""
        if self._has_room(self.values, key):
            self.values[key] = value, ttl_s

    def count(self, key: str, amount: float, ttl_s: float) -> None:
        if self._has_room(self.counts, key):
            self.counts[key] = self.counts.get(key, (0.0, 0.0))[0] + amount, ttl_s

    def append(self, key: str, entries: Sequence[bytes], keep: int, ttl_s: float) -> None:
        """Of more than `keep` entries the last ones stay."""
        if self._has_room(self.logs, key):
            waiting, _ = self.logs.setdefault(key, (deque(maxlen=keep), ttl_s))
            waiting.extend(entries)

    async def send(self, store: Store, arrived: Callable[[Want], None]) -> None:
        """Some of each kind; `arrived` is told of every change of a rule. Raises StoreDown; what
        had not arrived stays."""
        if self.changes:
            await self._send_changes(store, arrived)
        if self.values:
            await self._send_values(store)
        if self.counts:
            await self._send_counts(store)
        if self.logs:
            await self._send_logs(store)

    async def _send_changes(self, store: Store, arrived: Callable[[Want], None]) -> None:
        part = [self.changes.popitem()[1] for _ in range(min(TOGETHER, len(self.changes)))]
        try:
            await store.settle(part)
        except StoreDown:
            for change in part:
                self.settle(change)
            raise
        for change in part:
            arrived(change)

    async def _send_values(self, store: Store) -> None:
        """They stay in the box until they have arrived, for readers nearby."""
        part = list(self.values.items())[:TOGETHER]
        await asyncio.gather(*(_set(store, key, *value) for key, value in part))
        for key, sent in part:
            if self.values.get(key) is sent:
                del self.values[key]

    async def _send_counts(self, store: Store) -> None:
        key, (amount, ttl_s) = self.counts.popitem()
        try:
            await store.count(key, amount, ttl_s)
        except StoreDown:
            self.count(key, amount, ttl_s)
            raise

    async def _send_logs(self, store: Store) -> None:
        key, (waiting, ttl_s) = self.logs.popitem()
        keep = waiting.maxlen or 0
        try:
            await store.append(key, tuple(waiting), keep, ttl_s)
        except StoreDown:
            since, _ = self.logs.get(key, (waiting, ttl_s))
            merged = deque(waiting, keep)
            merged.extend(since if since is not waiting else ())
            self.logs[key] = merged, ttl_s
            raise

    def _has_room(self, kind: Mapping[str, object], key: str) -> bool:
        if key in kind or len(kind) < KEYS_MAX:
            return True
        self.dropped += 1
        return False


async def _set(store: Store, key: str, value: bytes | None, ttl_s: float) -> None:
    if value is not None:
        await store.put(key, value, ttl_s)
        return
    known = await store.get(key)
    if known is not None:
        await store.swap(key, known, None, ttl_s)
