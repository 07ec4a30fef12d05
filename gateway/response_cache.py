"""Whole answers, given again to the very same request of the same tenant.

Only greedy requests for one answer are asked for here, since only they have one answer; and only
while every replica that could answer says that it serves the same thing (`system_fingerprint`),
which is part of the key: with other weights, another template or another engine nothing is found.
Knows bytes and keys; streams are kept as the bytes that they were.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

import orjson

from gateway.call import Call
from gateway.onlooker import Copy
from gateway.reply import Headers, Reply
from policies.trimming import ResponseCache
from runtime.wire import parse_object

# What a request says beside what it asks for: its answer does not depend on it.
BESIDE = frozenset(("metadata", "prompt_cache_key", "service_tier", "store", "user"))
ENTRY_SHARE = 0.25  # of max_bytes: a larger answer is not kept
ENTRY_OVERHEAD_BYTES = 512
HIT = (b"x-headgate-cache", b"hit")
_FINGERPRINT = re.compile(rb'"system_fingerprint": ?"([^"\\]{1,200})"')
_FINISHED = re.compile(rb'"finish_reason": ?"(?:stop|length|tool_calls)"')
_KEPT_HEADERS = frozenset((b"content-type", b"cache-control", b"x-accel-buffering"))


@dataclass(frozen=True, slots=True)
class Entry:
    """An answer as it went out, but for what belongs to one request alone."""

    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes = field(repr=False)
    until: float

    @property
    def size_bytes(self) -> int:
        return len(self.body) + ENTRY_OVERHEAD_BYTES


class Answers:
    """Answers of one gateway process, the longest unused ones forgotten first."""

    def __init__(self, settings: ResponseCache) -> None:
        self.settings = settings
        self.hits = 0
        self.misses = 0
        self.size_bytes = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

    def key(
        self, call: Call, tenant: str, tier: str, fingerprints: Iterable[str | None]
    ) -> bytes | None:
        """None for a request that may not be answered from here. `fingerprints`: of every replica
        that could answer it."""
        if tier not in self.settings.tiers or not _one_answer(call):
            return None
        named = {fingerprint or "" for fingerprint in fingerprints}
        if len(named) != 1 or "" in named:
            return None
        asked = parse_object(call.body)
        body = {name: value for name, value in asked.items() if name not in BESIDE}
        digest = blake2b(digest_size=32)
        parts = (tenant, call.authorization or "", *named, call.path)
        for part in (*(text.encode() for text in parts), orjson.dumps(body, None, _SORTED)):
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.digest()

    def recall(
        self,
        call: Call,
        tenant: str,
        tier: str,
        fingerprints: Collection[str | None],
        now: float,
    ) -> Recall | None:
        """None for a request that may not be answered from here."""
        key = self.key(call, tenant, tier, fingerprints)
        return Recall(self, key, next(iter(fingerprints)) or "", now) if key else None

    def get(self, key: bytes, now: float) -> Entry | None:
        entry = self._entries.get(key)
        if entry is not None and now >= entry.until:
            self._forget(key)
            entry = None
        if entry is None:
            self.misses += 1
            return None
        self._entries.move_to_end(key)
        self.hits += 1
        return entry

    def put(self, key: bytes, entry: Entry) -> None:
        if entry.size_bytes > self.settings.max_bytes * ENTRY_SHARE:
            return
        self._forget(key)
        self._entries[key] = entry
        self.size_bytes += entry.size_bytes
        while self.size_bytes > self.settings.max_bytes:
            self._forget(next(iter(self._entries)))

    def _forget(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.size_bytes -= entry.size_bytes

    def told(self) -> dict[str, int]:
        return {
            "hits": self.hits,
            "misses": self.misses,
            "entries": len(self._entries),
            "bytes": self.size_bytes,
        }


_SORTED = orjson.OPT_SORT_KEYS


def _one_answer(call: Call) -> bool:
    """Whether the request can only be answered in one way."""
    temperature, choices = call.data.get("temperature"), call.data.get("n")
    greedy = type(temperature) in (int, float) and temperature == 0
    return greedy and (choices is None or choices == 1)


class Recall:
    """One request that may be answered from what is kept, or whose answer may be kept."""

    def __init__(self, answers: Answers, key: bytes, fingerprint: str, now: float) -> None:
        self._answers = answers
        self._key = key
        self._fingerprint = fingerprint
        self._now = now
        self._copy: Copy | None = None

    async def give(self, reply: Reply, count: Callable[[], Awaitable[Headers]]) -> bool:
        """Answers, if it is known how; otherwise begins to copy the answer that will come. `count`
        is asked before an answer is given, and may raise Problem; its headers go with it."""
        entry = self._answers.get(self._key, self._now)
        if entry is None:
            most_bytes = int(self._answers.settings.max_bytes * ENTRY_SHARE)
            self._copy = reply.through(lambda send, outgoing: Copy(send, outgoing, most_bytes))
            return False
        reply.more += await count()
        await reply.whole(200, [*entry.headers, HIT], entry.body)
        return True

    def keep(self) -> None:
        """Keeps what was copied, if it is an answer that may be given again."""
        if self._copy is None:
            return
        body = self._copy.whole()
        if body is not None and _is_sure(body, self._fingerprint):
            headers = tuple(one for one in self._copy.headers if one[0] in _KEPT_HEADERS)
            until = self._now + self._answers.settings.ttl_s
            self._answers.put(self._key, Entry(headers, body, until))


def _is_sure(body: bytes, fingerprint: str) -> bool:
    """Whether an answer came to its natural end, made by what the key names, in one piece."""
    made_by = {found.group(1) for found in _FINGERPRINT.finditer(body)}
    finished = _FINISHED.search(body) is not None and b'"error":' not in body
    finished = finished and b'"headgate":{"resumed"' not in body
    return made_by == {fingerprint.encode()} and finished
