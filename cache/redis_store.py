"""The store of many gateways: Redis, with Lua where several steps must be one.

Every entry carries its own end by the caller's clock; Redis forgets it only some time after, so
that what is read depends on one clock. All keys share a hash tag and so one slot of a cluster.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cache.redis_lane import Lane, Refusal, Word
from cache.redis_scripts import APPEND, COUNT, LIMITS, POST, SWAP, Script
from cache.store import ENTRY_BYTES_MAX, Entries, Quota, StoreDown, Taken, Want

DATE_BYTES = 8  # before each entry, when it ends
SLACK_S = 60.0  # Redis forgets an entry so long after its end: clocks differ


class RedisStore:
    """`cache.store.Store` in one Redis (7 or later), over one connection."""

    def __init__(
        self,
        url: str,
        *,
        password: str | None = None,
        ca_file: str | None = None,
        namespace: str = "headgate",
        timeout_s: float = 0.02,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`timeout_s` bounds the wait for one answer, once connected."""
        self._lane = Lane(url, password=password, ca_file=ca_file, timeout_s=timeout_s)
        self._prefix = "{" + namespace + "}:"
        self._clock = clock

    # ---- limits ---------------------------------------------------------------------------------

    async def take(self, wants: Sequence[Want]) -> Taken:
        said = await self._limits("take", wants)
        if not said or said[0] == 1:
            return Taken(allowed=True, left=tuple(map(float, said[1:])))
        return Taken(
            allowed=False,
            left=tuple(map(float, said[2::2])),
            retry_after_s=float(said[1]),
            short=tuple(index for index, is_short in enumerate(said[3::2]) if is_short),
        )

    async def settle(self, changes: Sequence[Want]) -> None:
        await self._limits("settle", changes)

    async def restore(self, left: Sequence[Want]) -> None:
        await self._limits("restore", left)

    async def _limits(self, what: str, wants: Sequence[Want]) -> list[Any]:
        if not wants:
            return []
        words: list[Word] = [self._clock(), what]
        for want in wants:
            rule = want.rule
            ends_at = rule.ends_at if isinstance(rule, Quota) else -1
            words += (rule.capacity, rule.per_s, ends_at, want.amount)
        keys = [want.key for want in wants]
        said: list[Any] = await self._run(LIMITS, keys, words)
        return said

    # ---- values, counters -----------------------------------------------------------------------

    async def get(self, key: str) -> bytes | None:
        return self._fresh(await self._ask("GET", self._prefix + key))

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        await self._ask("SET", self._prefix + key, self._dated(value, ttl_s), "PX", _ms(ttl_s))

    async def swap(self, key: str, old: bytes | None, new: bytes | None, ttl_s: float) -> bool:
        dated = self._dated(new, ttl_s) if new is not None else b""
        words = (
            self._clock(), int(old is not None), old or b"", int(new is not None), dated, _ms(ttl_s)
        )  # fmt: skip
        swapped: int = await self._run(SWAP, (key,), words)
        return swapped == 1

    async def count(self, key: str, amount: float, ttl_s: float) -> float:
        now = self._clock()
        return float(await self._run(COUNT, (key,), (now, amount, now + ttl_s, _ms(ttl_s))))

    # ---- logs, boards ---------------------------------------------------------------------------

    async def append(self, key: str, entries: Sequence[bytes], keep: int, ttl_s: float) -> None:
        if entries:
            dated = [self._dated(entry, ttl_s) for entry in entries]
            await self._run(APPEND, (key,), (keep, _ms(ttl_s), *dated))

    async def read(self, key: str, after: str, limit: int) -> Entries:
        begin = f"({after}" if after else "-"
        found = await self._ask("XRANGE", self._prefix + key, begin, "+", "COUNT", limit)
        entries = (self._fresh(fields[1]) for _, fields in found)
        fresh = tuple(entry for entry in entries if entry is not None)
        return Entries(fresh, found[-1][0].decode() if found else after)

    async def post(self, board: str, owner: str, note: bytes, ttl_s: float) -> None:
        if ttl_s > 0:
            await self._run(POST, (board,), (owner, self._dated(note, ttl_s), _ms(ttl_s)))
        else:
            await self._ask("HDEL", self._prefix + board, owner)

    async def notes(self, board: str) -> Mapping[str, bytes]:
        name = self._prefix + board
        flat = await self._ask("HGETALL", name)
        now = self._clock()
        notes: dict[str, bytes] = {}
        gone: list[bytes] = []
        for owner, dated in zip(flat[::2], flat[1::2], strict=True):
            ends_at = _end_of(dated)
            if ends_at is None:
                continue
            if now < ends_at:
                notes[owner.decode()] = dated[DATE_BYTES:]
            elif now > ends_at + SLACK_S:
                gone.append(owner)
        if gone:
            await self._ask("HDEL", name, *gone)
        return notes

    async def aclose(self) -> None:
        await self._lane.aclose()

    # ---- words ----------------------------------------------------------------------------------

    def _dated(self, value: bytes, ttl_s: float) -> bytes:
        if len(value) > ENTRY_BYTES_MAX:
            raise ValueError(f"{len(value)} bytes; the store takes {ENTRY_BYTES_MAX} at most")
        return struct.pack("<d", self._clock() + ttl_s) + value

    def _fresh(self, dated: bytes | None) -> bytes | None:
        ends_at = None if dated is None else _end_of(dated)
        if dated is None or ends_at is None or ends_at <= self._clock():
            return None
        return dated[DATE_BYTES:]

    async def _ask(self, *words: Word) -> Any:
        try:
            return await self._lane.ask(*words)
        except Refusal as error:  # READONLY after a failover, OOM, MISCONF, ...
            raise StoreDown(f"Redis: {error}") from None

    async def _run(self, script: Script, keys: Sequence[str], words: Sequence[Word]) -> Any:
        rest = (len(keys), *(self._prefix + key for key in keys), *words)
        try:
            return await self._lane.ask("EVALSHA", script.sha, *rest)
        except Refusal as error:
            if not str(error).startswith("NOSCRIPT"):
                raise StoreDown(f"Redis: {error}") from None
        return await self._ask("EVAL", script.text, *rest)  # a new Redis, or one restarted


def _end_of(dated: bytes) -> float | None:
    """None of what is too short to be ours."""
    return struct.unpack_from("<d", dated)[0] if len(dated) >= DATE_BYTES else None


def _ms(ttl_s: float) -> int:
    """When Redis may forget it, in milliseconds from now."""
    return math.ceil(1000 * (ttl_s + SLACK_S))
