"""What several gateways share, as a few atomic operations: the protocol, and its words.

Knows amounts, keys, moments and bytes; no tenant, no prompt, no policy. A store keeps nothing for
ever: every entry has a time to live. Moments are seconds since the epoch, by the caller's clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Protocol

QUOTA_KEPT_S = 3600.0  # a quota's sum outlives its end this long, for settlements that come late
BUCKET_KEPT_S = 60.0  # a bucket is forgotten so long after it is full again
ENTRY_BYTES_MAX = 2**20  # of a value, a note or an entry of a log


class StoreDown(Exception):
    """The store did not answer in time, or not at all: what was asked may or may not have happened.

    MemoryStore never raises it."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Requests or tokens per time: holds `capacity` at most and refills by `per_s` a second.

    It starts full. More than `capacity` at once passes when the bucket is full and leaves it in
    debt, so that a large request waits its turn instead of for ever.
    """

    capacity: float
    per_s: float

    def share(self, among: int) -> Bucket:
        """What one of `among` gateways may give when they cannot ask each other."""
        return Bucket(self.capacity / among, self.per_s / among)


@dataclass(frozen=True, slots=True)
class Quota:
    """A budget until a moment, such as tokens a day: `capacity` in all, nothing comes back before.

    The period belongs into the key (`key("budget", tenant, "2026-11-26")`).
    """

    capacity: float
    ends_at: float
    per_s: ClassVar[float] = 0.0

    def share(self, among: int) -> Quota:
        return replace(self, capacity=self.capacity / among)


Rule = Bucket | Quota


class Want(NamedTuple):
    """An amount of what the key's rule limits."""

    key: str
    rule: Rule
    amount: float = 1.0


class Taken(NamedTuple):
    """The answer to a `take`: all wants or none.

    `left` is what each want's rule has left, after the taking or without it; a bucket in debt has
    less than 0. When refused, `short` are the indexes of the wants that did not fit, and after
    `retry_after_s` all would, if nobody else took meanwhile; infinite where a quota is too small.
    A store that cannot ask the others answers by its share of each rule, `among` so many.
    """

    allowed: bool
    left: tuple[float, ...]
    retry_after_s: float = 0.0
    short: tuple[int, ...] = ()
    among: int = 1


@dataclass(frozen=True, slots=True)
class Entries:
    """What a log said since a cursor; `cursor` is where to go on."""

    entries: tuple[bytes, ...]
    cursor: str


class Store(Protocol):
    """Each operation is atomic. Keys are `key(...)`, one kind of use for each key.

    Raises StoreDown where the store is elsewhere and does not answer.
    """

    async def take(self, wants: Sequence[Want]) -> Taken:
        """Takes all wants, or none when one of them does not fit. Keys are distinct."""

    async def settle(self, changes: Sequence[Want]) -> None:
        """Gives `amount` back, or takes it where it is negative, without asking: the difference
        between what was taken before a request and what it used. May leave a debt."""

    async def restore(self, left: Sequence[Want]) -> None:
        """Makes sure that no more than `amount` is left of each: what is remembered of a store that
        has forgotten. Never raises what is left."""

    async def get(self, key: str) -> bytes | None:
        """The value, None when there is none or its time is over."""

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Sets the value."""

    async def swap(self, key: str, old: bytes | None, new: bytes | None, ttl_s: float) -> bool:
        """Sets `new` where the value is still `old`; None is no value. False: it has changed."""

    async def count(self, key: str, amount: float, ttl_s: float) -> float:
        """Adds to a counter and returns its sum; the first to add sets its time to live."""

    async def append(self, key: str, entries: Sequence[bytes], keep: int, ttl_s: float) -> None:
        """Adds to a log, which keeps its last `keep` entries, each for `ttl_s`."""

    async def read(self, key: str, after: str, limit: int) -> Entries:
        """At most `limit` entries after a cursor; `""` is the beginning."""

    async def post(self, board: str, owner: str, note: bytes, ttl_s: float) -> None:
        """Puts up a note in place of the owner's last; with 0 seconds takes it down."""

    async def notes(self, board: str) -> Mapping[str, bytes]:
        """The owners' notes; those whose owner has stopped posting are gone by themselves."""

    async def aclose(self) -> None:
        """Ends connections."""


def key(kind: str, *parts: str) -> str:
    """`budget:1f0e…`: what it is for, and of whom as a digest, so that no name leaves a gateway."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return f"{kind}:{digest.hexdigest()}"
