"""The store of many gateways: Redis, with Lua where several steps must be one.

Every entry carries its own end by the caller's clock; Redis forgets it only some time after, so
that what is read depends on one clock. All keys share a hash tag and so one slot of a cluster.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Connection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, ResponseError

from cache.redis_lane import Lane, Word
from cache.store import (
    BUCKET_KEPT_S,
    ENTRY_BYTES_MAX,
    QUOTA_KEPT_S,
    Bucket,
    Entries,
    StoreDown,
    Taken,
    Want,
)

SLACK_S = 60.0  # Redis forgets an entry so long after its end: clocks differ

# Rules: KEYS one each; ARGV now, what to do, then each one's full, refill a second, end (-1: none)
# and amount.
# The same arithmetic as cache.memory_store.Level; `left` and `at` are kept as two doubles.
_LIMITS = """
local now, what = tonumber(ARGV[1]), ARGV[2]
local lefts, ats, waits, longest = {}, {}, {}, 0
local function rule(i)
  local a = 4 * i - 1
  return tonumber(ARGV[a]), tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
end
for i, key in ipairs(KEYS) do
  local full, per_s, ends_at, amount = rule(i)
  local kept = redis.call('GET', key)
  local left, at = full, now
  if kept then
    left, at = struct.unpack('<dd', kept)
    local later = math.max(at, now)
    left = math.min(full, left + (later - at) * per_s)
    at = later
  end
  local wait = 0
  if ends_at < 0 then
    local lacking = math.min(amount, full) - left
    if lacking > 0 then wait = per_s > 0 and lacking / per_s or math.huge end
  elseif amount > left then
    wait = amount <= full and math.max(1, ends_at - now) or math.huge
  end
  lefts[i], ats[i], waits[i] = left, at, wait
  longest = math.max(longest, wait)
end
if what == 'take' and longest > 0 then
  local said = {0, string.format('%.17g', longest)}
  for i = 1, #KEYS do
    said[2 * i + 1] = string.format('%.17g', lefts[i])
    said[2 * i + 2] = waits[i] > 0 and 1 or 0
  end
  return said
end
local said = {1}
for i, key in ipairs(KEYS) do
  local full, per_s, ends_at, amount = rule(i)
  local left = lefts[i]
  if what == 'take' then left = left - amount
  elseif what == 'settle' then left = math.min(full, left + amount)
  else left = math.min(left, amount) end
  local kept_s
  if ends_at >= 0 then kept_s = ends_at + QUOTA_KEPT_S - now
  else kept_s = (per_s > 0 and (full - left) / per_s or QUOTA_KEPT_S) + BUCKET_KEPT_S end
  local kept_ms = math.min(math.max(1, math.ceil(1000 * kept_s)), 1e12)
  redis.call('SET', key, struct.pack('<dd', left, ats[i]), 'PX', string.format('%.0f', kept_ms))
  said[i + 1] = string.format('%.17g', left)
end
return said
""".replace("QUOTA_KEPT_S", str(QUOTA_KEPT_S)).replace("BUCKET_KEPT_S", str(BUCKET_KEPT_S))

# KEYS one; ARGV now, has old, old, has new, new with its end, milliseconds.
_SWAP = """
local now = tonumber(ARGV[1])
local kept = redis.call('GET', KEYS[1])
if kept and struct.unpack('<d', kept) <= now then kept = false end
local same
if ARGV[2] == '0' then same = not kept else same = kept and string.sub(kept, 9) == ARGV[3] end
if not same then return 0 end
if ARGV[4] == '0' then redis.call('DEL', KEYS[1])
else redis.call('SET', KEYS[1], ARGV[5], 'PX', ARGV[6]) end
return 1
"""

# KEYS one; ARGV now, amount, end, milliseconds.
_COUNT = """
local kept = redis.call('GET', KEYS[1])
local ends, sum = tonumber(ARGV[3]), 0
if kept then
  local kept_ends, kept_sum = struct.unpack('<dd', kept)
  if tonumber(ARGV[1]) < kept_ends then ends, sum = kept_ends, kept_sum else kept = nil end
end
sum = sum + tonumber(ARGV[2])
local packed = struct.pack('<dd', ends, sum)
if kept then redis.call('SET', KEYS[1], packed, 'KEEPTTL')
else redis.call('SET', KEYS[1], packed, 'PX', ARGV[4]) end
return string.format('%.17g', sum)
"""

# KEYS one; ARGV keep, milliseconds, then entries with their end.
_APPEND = """
for i = 3, #ARGV do
  redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[1], '*', 'e', ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""


@dataclass(frozen=True, slots=True)
class Script:
    """Lua that Redis knows by its digest once it has seen it."""

    text: str
    sha: str

    @classmethod
    def of(cls, text: str) -> Script:
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


LIMITS, SWAP, COUNT, APPEND = map(Script.of, (_LIMITS, _SWAP, _COUNT, _APPEND))


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
        """`timeout_s` bounds one journey to Redis and back, once connected."""
        pool = ConnectionPool.from_url(url, **_options(url, password, ca_file))

        def connect() -> Connection:
            made: Connection = pool.make_connection()  # type: ignore[no-untyped-call]  # redis's
            return made

        self._lane = Lane(connect, timeout_s)
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
            if isinstance(rule, Bucket):
                words += (rule.capacity, rule.per_s, -1, want.amount)
            else:
                words += (rule.limit, 0, rule.ends_at, want.amount)
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
        name = self._prefix + board
        if ttl_s > 0:
            dated = self._dated(note, ttl_s)
            setting = self._ask("HSET", name, owner, dated)
            await asyncio.gather(setting, self._ask("PEXPIRE", name, _ms(ttl_s)))
        else:
            await self._ask("HDEL", name, owner)

    async def notes(self, board: str) -> Mapping[str, bytes]:
        name = self._prefix + board
        flat = await self._ask("HGETALL", name)
        now = self._clock()
        notes: dict[str, bytes] = {}
        gone: list[bytes] = []
        for owner, dated in zip(flat[::2], flat[1::2], strict=True):
            (ends_at,) = struct.unpack_from("<d", dated)
            if now < ends_at:
                notes[owner.decode()] = dated[8:]
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
        if dated is None or struct.unpack_from("<d", dated)[0] <= self._clock():
            return None
        return dated[8:]

    async def _ask(self, *words: Word) -> Any:
        try:
            return await self._lane.ask(*words)
        except ResponseError as error:  # READONLY after a failover, OOM, MISCONF, ...
            raise StoreDown(f"Redis: {error}") from None

    async def _run(self, script: Script, keys: Sequence[str], words: Sequence[Word]) -> Any:
        rest = (len(keys), *(self._prefix + key for key in keys), *words)
        try:
            return await self._lane.ask("EVALSHA", script.sha, *rest)
        except NoScriptError:  # a new Redis, or one that was restarted
            return await self._ask("EVAL", script.text, *rest)
        except ResponseError as error:
            raise StoreDown(f"Redis: {error}") from None


def _options(url: str, password: str | None, ca_file: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"protocol": 2, "retry": Retry(NoBackoff(), 0)}
    if password is not None:
        options["password"] = password
    if ca_file is not None and url.startswith("rediss://"):
        options["ssl_ca_certs"] = ca_file
    return options


def _ms(ttl_s: float) -> int:
    """When Redis may forget it, in milliseconds from now."""
    return math.ceil(1000 * (ttl_s + SLACK_S))
