"""A store far away, and what is known near by for when it does not answer.

A request waits for the far store within its patience, once; then it goes on with what this process
knows. What needs no answer is sent behind the request's back. When the far store is away, limits
are given as `when_down` says, changes are kept, and all of it is told to the far store when it is
back, also when it has forgotten everything meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from cache.memory_store import Expiring, MemoryStore
from cache.outbox import TOGETHER, Outbox
from cache.remembered import Remembered
from cache.store import Entries, Store, StoreDown, Taken, Want, key

log = logging.getLogger("headgate.store")

KNOWN_MAX = 100_000  # rules, and values, that are remembered here
MIRROR_S = 3600.0  # a value that was read is remembered so long
CHECK_S = 0.3  # between looks whether the far store is there and has forgotten nothing
PROBE_FIRST_S, PROBE_LAST_S = 0.1, 2.0  # between looks while it is away: doubling
EPOCH_S = 10 * 365 * 86400.0
EPOCH = key("epoch")

WhenDown = Literal["open", "local", "closed"]
T = TypeVar("T")


@dataclass(slots=True)
class _Patience:
    """What one request may still wait for the store, in seconds."""

    left_s: float


_patience: ContextVar[_Patience | None] = ContextVar("store_patience", default=None)


class FailoverStore:
    """`cache.store.Store` that answers always, except `take` where `when_down` is `closed`."""

    def __init__(
        self,
        far: Store,
        *,
        when_down: WhenDown,
        patience_s: float,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self.peers = 1  # processes that share the far store, this one included, as last heard
        self.up = True
        self.error: str | None = None
        self.outages = 0
        self._far = far
        self._when_down = when_down
        self._patience_s = patience_s
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311  # of pauses, no secret
        self._rules = Remembered(clock, KNOWN_MAX)
        self._values: Expiring[bytes] = Expiring(KNOWN_MAX)
        self._near: MemoryStore | None = None  # of one outage
        self._outbox = Outbox()
        self._epoch: bytes | None = None
        self._sender: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    def begin(self) -> None:
        """A request begins: all that it asks of the store has `patience_s` together."""
        _patience.set(_Patience(self._patience_s))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Looks after the far store meanwhile; sends what is still to be sent at the end."""
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            if self._sender is not None:
                await self._sender
            await self._far.aclose()

    async def aclose(self) -> None:
        """Nothing: `running` ends it."""

    # ---- limits ---------------------------------------------------------------------------------

    async def take(self, wants: Sequence[Want]) -> Taken:
        taken = await self._ask(lambda: self._far.take(wants))
        if taken is not None:
            self._rules.learn(wants, taken)
            return taken
        if self._when_down == "closed":
            raise StoreDown(self.error or "the store did not answer in time")
        if self._when_down == "open":
            taken = Taken(allowed=True, left=tuple(self._left(want) for want in wants))
        else:
            near = self._nearby()
            await near.restore([self._remembered(want) for want in wants])
            taken = await near.take(wants)
        if taken.allowed:
            self._owe([want._replace(amount=-want.amount) for want in wants])
        return taken

    async def settle(self, changes: Sequence[Want]) -> None:
        """Does not wait."""
        if self._near is not None:
            await self._near.settle(changes)
        self._owe(changes)

    async def restore(self, left: Sequence[Want]) -> None:
        if self._near is not None:
            await self._near.restore(left)
        await self._ask(lambda: self._far.restore(left))

    def _nearby(self) -> MemoryStore:
        if self._near is None:
            self._near = MemoryStore(self._clock, among=self.peers)
        return self._near

    def _owe(self, changes: Sequence[Want]) -> None:
        for change in changes:
            self._outbox.settle(change)
        self._send()

    def _left(self, want: Want) -> float:
        """Of what is known of the far store, without what it is still to be told."""
        owed = self._outbox.changes.get(want.key)
        return self._rules.left(want) + (owed.amount if owed is not None else 0.0)

    def _remembered(self, want: Want) -> Want:
        """What one of the peers may still give of a rule: its share of what was left."""
        return want._replace(amount=self._left(want) / self.peers)

    # ---- values, counters -----------------------------------------------------------------------

    async def get(self, key: str) -> bytes | None:
        if key in self._outbox.values:  # not there yet
            return self._outbox.values[key][0]
        asked = await self._ask(lambda: _whether(self._far.get(key)))
        if asked is None:
            return self._values.get(key, self._clock())
        (value,) = asked
        self._mirror(key, value, MIRROR_S)
        return value

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Does not wait."""
        self._mirror(key, value, ttl_s)
        self._outbox.put(key, value, ttl_s)
        self._send()

    async def swap(self, key: str, old: bytes | None, new: bytes | None, ttl_s: float) -> bool:
        if key not in self._outbox.values:
            swapped = await self._ask(lambda: self._far.swap(key, old, new, ttl_s))
            if swapped is not None:
                if swapped:
                    self._mirror(key, new, ttl_s)
                return swapped
        if self._values.get(key, self._clock()) != old:
            return False
        self._mirror(key, new, ttl_s)
        self._outbox.put(key, new, ttl_s)
        self._send()
        return True

    async def count(self, key: str, amount: float, ttl_s: float) -> float:
        total = await self._ask(lambda: self._far.count(key, amount, ttl_s))
        if total is None:
            total = await self._nearby().count(key, amount, ttl_s)
            self._outbox.count(key, amount, ttl_s)
        return total

    def _mirror(self, key: str, value: bytes | None, ttl_s: float) -> None:
        now = self._clock()
        if value is None:
            self._values.pop(key)
        else:
            self._values.set(key, value, now + ttl_s, now)

    # ---- logs, boards ---------------------------------------------------------------------------

    async def append(self, key: str, entries: Sequence[bytes], keep: int, ttl_s: float) -> None:
        """Does not wait."""
        self._outbox.append(key, entries, keep, ttl_s)
        self._send()

    async def read(self, key: str, after: str, limit: int) -> Entries:
        return await self._ask(lambda: self._far.read(key, after, limit)) or Entries((), after)

    async def post(self, board: str, owner: str, note: bytes, ttl_s: float) -> None:
        """A note that does not arrive is lost: its owner will post the next one."""
        await self._ask(lambda: self._far.post(board, owner, note, ttl_s))

    async def notes(self, board: str) -> Mapping[str, bytes]:
        return await self._ask(lambda: self._far.notes(board)) or {}

    # ---- the far store, up and down -------------------------------------------------------------

    async def _ask(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        """What the far store says; None when it is away, or not within the request's patience."""
        if not self.up:
            return None
        patience = _patience.get()
        allowed_s = patience.left_s if patience is not None else self._patience_s
        if allowed_s <= 0:
            return None
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            async with asyncio.timeout(allowed_s):
                return await operation()
        except TimeoutError:  # whether it is away, its own deadline and the watch will tell
            return None
        except StoreDown as error:
            self._lose(str(error))
            return None
        finally:
            if patience is not None:
                patience.left_s -= loop.time() - begun

    def _lose(self, error: str) -> None:
        self.error = error
        if self.up:
            self.up = False
            self.outages += 1
            self._near = None
            self._rules.believe(self._rules.heard())
            self._news.set()
            log.warning("the shared store is away, limits are %s: %s", self._when_down, error)

    async def _watch(self) -> None:
        pause_s = PROBE_FIRST_S
        while True:
            try:
                await self._look()
                pause_s = PROBE_FIRST_S
            except StoreDown as error:
                self._lose(str(error))
            self._news.clear()
            wait_s = CHECK_S if self.up else pause_s * self._rng.uniform(0.5, 1.0)
            try:
                async with asyncio.timeout(wait_s):
                    await self._news.wait()  # lost meanwhile
            except TimeoutError:
                pause_s = PROBE_FIRST_S if self.up else min(PROBE_LAST_S, 2 * pause_s)

    async def _look(self) -> None:
        """Whether the far store answers; what it has forgotten it is told again. StoreDown."""
        heard = self._rules.heard()
        try:
            epoch = await self._far.get(EPOCH)
        except StoreDown:
            self._rules.believe(heard)
            raise
        if epoch == self._epoch:
            self._rules.believe(heard)
        if epoch is None:
            mine = secrets.token_bytes(16)
            begun = await self._far.swap(EPOCH, None, mine, EPOCH_S)
            epoch = mine if begun else await self._far.get(EPOCH)
        if self._epoch not in (None, epoch):
            log.warning("the shared store has forgotten; it is told what is remembered here")
            await self._tell_again()
        self._epoch = epoch
        if not self.up:
            # After what is remembered, so that the order in which gateways come back is all the
            # same. Not until nothing is left: under load there is always more.
            for _ in range(self._outbox.rounds()):
                await self._outbox.send(self._far, self._rules.changed)
            log.warning("the shared store is back")
            self.up, self.error, self._near = True, None, None
        self._send()

    async def _tell_again(self) -> None:
        left = self._rules.all_left()
        for begin in range(0, len(left), TOGETHER):
            await self._far.restore(left[begin : begin + TOGETHER])
        now = self._clock()
        for name, value in self._values.items_at(now).items():
            await self._far.swap(name, None, value, self._values.ends_at(name) - now)

    def _send(self) -> None:
        if self.up and self._sender is None and self._outbox:
            self._sender = asyncio.create_task(self._send_all())

    async def _send_all(self) -> None:
        try:
            while self._outbox and self.up:
                await self._outbox.send(self._far, self._rules.changed)
        except StoreDown as error:
            self._lose(str(error))
        finally:
            self._sender = None


async def _whether(operation: Coroutine[Any, Any, T]) -> tuple[T]:
    """A result that may be None, told apart from no answer."""
    return (await operation,)
