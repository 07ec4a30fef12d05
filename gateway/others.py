"""What other gateways have under way on each replica, and what they have sent where.

Knows boards and logs of the store; routing reads what it leaves on replicas and in the index. Told
and read behind the requests' backs, some times a second; a gateway that dies is forgotten soon.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import orjson

from cache.failover import FailoverStore
from cache.prefix_index import Mode, PrefixIndex
from cache.store import key
from gateway.replica import Elsewhere, Replica

log = logging.getLogger("headgate.gateway")

BUSY_S = 0.02  # between exchanges while anybody has anything under way
IDLE_S = 0.25
NOTE_S = 2.0  # a gateway that has posted nothing for so long has nothing under way
PEER_S = 10.0  # and is gone after this, when limits are shared without the store
LOG_S = 60.0  # placements are kept so long for gateways that were away
LOG_KEEP = 512  # entries, each the placements of one exchange
READ_MAX = 64  # entries in one exchange
PLACED_MAX = 4096  # blocks of one request; placements that wait for their exchange
PENDING, PLACED = key("pending"), key("placed")
REMEMBERED = 0.98  # of what is learned about news, from one hearing to the next
LITTLE = 1e-6  # nothing is learned yet
_HEAD = struct.Struct("<8sBH")  # of a placement: replica, bytes a hash, hashes


@dataclass(slots=True)
class Forecast:
    """What was heard, moved towards its mean as far as it has proved to be out of date when used.

    All gateways hear the same; if each believed it, all would send to the same replica, and the
    next news would send all to another. How far differences between replicas last from one hearing
    to the next (their autocorrelation at lag one) is how far they are believed.
    """

    _before: dict[str, float] = field(default_factory=dict)  # differences from the mean
    _products: float = 0.0
    _squares: float = 0.0

    @property
    def persistence(self) -> float:
        """From 0, differences are gone by the next hearing, to 1."""
        if self._squares < LITTLE:
            return 1.0
        return min(1.0, max(0.0, self._products / self._squares))

    def expect(self, heard: Mapping[str, float]) -> dict[str, float]:
        mean = sum(heard.values()) / len(heard) if heard else 0.0
        now = {name: value - mean for name, value in heard.items()}
        before = self._before
        self._products *= REMEMBERED
        self._squares *= REMEMBERED
        for name in now.keys() & before.keys():
            self._products += now[name] * before[name]
            self._squares += before[name] ** 2
        self._before = now
        believed = self.persistence
        return {name: mean + believed * difference for name, difference in now.items()}


@dataclass(slots=True)
class Others:
    """One gateway process among those that share a store."""

    store: FailoverStore
    process: str
    monotonic: Callable[[], float] = time.monotonic
    _seen: dict[str, float] = field(default_factory=dict)  # processes -> when last heard
    _placed: list[tuple[str, Sequence[bytes]]] = field(default_factory=list)
    _cursor: str = ""
    _names: dict[bytes, str] = field(default_factory=dict)  # a replica's digest -> its URL
    _running: Forecast = field(default_factory=Forecast)
    _tokens: Forecast = field(default_factory=Forecast)

    def placed(self, replica: str, hashes: Sequence[bytes], known: int = 0) -> None:
        """A request with these blocks went there; others will count on those after `known`, which
        this gateway's index had there already."""
        fresh = hashes[known : known + PLACED_MAX]
        if fresh and len(self._placed) < PLACED_MAX:
            self._placed.append((replica, fresh))

    async def under_way(self) -> tuple[dict[str, int], int]:
        """Requests of the other processes, by replica, and how many processes those are."""
        sums: dict[str, int] = {}
        notes = await self.store.notes(PENDING)
        others = [note for process, note in notes.items() if process != self.process]
        for note in others:
            for name, load in orjson.loads(note).items():
                url = self._names.get(bytes.fromhex(name))
                if url is not None:
                    sums[url] = sums.get(url, 0) + int(load[0])
        return sums, len(others)

    def _processes(self) -> int:
        """Gateways that share the store, this one included."""
        oldest = self.monotonic() - PEER_S
        self._seen = {name: at for name, at in self._seen.items() if at > oldest}
        return max(1, len(self._seen.keys() | {self.process}))

    @asynccontextmanager
    async def exchanging(
        self, replicas: Callable[[], Iterable[Replica]], index: PrefixIndex
    ) -> AsyncIterator[None]:
        """Exchanges with the others until the end, and then takes its note down."""
        task = asyncio.create_task(self._run(replicas, index))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.store.post(PENDING, self.process, b"", 0)

    async def _run(self, replicas: Callable[[], Iterable[Replica]], index: PrefixIndex) -> None:
        while True:
            try:
                busy = await self.exchange(tuple(replicas()), index)
            except (ValueError, struct.error) as error:  # a note of another version
                log.warning("what other gateways tell cannot be read: %s", error)
                busy = False
            await asyncio.sleep(BUSY_S if busy else IDLE_S)

    async def exchange(self, replicas: Sequence[Replica], index: PrefixIndex) -> bool:
        """Tells what is under way here, and learns what is elsewhere; False when nothing is."""
        self._names = {_digest(replica.url): replica.url for replica in replicas}
        mine = {replica.url: _load(replica) for replica in replicas if replica.in_flight}
        note = orjson.dumps({_digest(url).hex(): load for url, load in mine.items()})
        placed = self._pack(index)
        _, notes, entries, _ = await asyncio.gather(
            self.store.post(PENDING, self.process, note, NOTE_S),
            self.store.notes(PENDING),
            self.store.read(PLACED, self._cursor, READ_MAX),
            self.store.append(PLACED, placed, LOG_KEEP, LOG_S),
        )
        self._cursor = entries.cursor
        busy = self._hear(notes, replicas) or bool(mine)
        if self.store.up:
            self.store.peers = self._processes()
        now = asyncio.get_running_loop().time()  # the index's clock
        for entry in entries.entries:
            for url, hashes in self._unpack(entry):
                index.sent(url, hashes, now)
        return busy

    def _hear(self, notes: Mapping[str, bytes], replicas: Sequence[Replica]) -> bool:
        heard_at = self.monotonic()
        sums: dict[str, list[float]] = {}
        for process, note in notes.items():
            self._seen[process] = heard_at
            if process == self.process:
                continue
            for name, load in orjson.loads(note).items():
                known = sums.setdefault(name, [0, 0.0])
                known[0] += int(load[0])
                known[1] += float(load[1])
        loads = [sums.get(_digest(replica.url).hex(), (0, 0.0)) for replica in replicas]
        names = [replica.url for replica in replicas]
        running = self._running.expect(dict(zip(names, (load[0] for load in loads), strict=True)))
        tokens = self._tokens.expect(dict(zip(names, (load[1] for load in loads), strict=True)))
        for replica in replicas:
            replica.elsewhere = Elsewhere(running[replica.url], tokens[replica.url])
        return bool(sums)

    def _pack(self, index: PrefixIndex) -> list[bytes]:
        """What was placed since the last exchange, as one entry. Replicas that tell of their blocks
        themselves are left out: every gateway hears them."""
        told, self._placed = self._placed, []
        pieces = [self.process.encode()]
        for url, hashes in told:
            if index.mode(url) is not Mode.EXACT:
                pieces += (_HEAD.pack(_digest(url), len(hashes[0]), len(hashes)), *hashes)
        return [b"".join(pieces)] if len(pieces) > 1 else []

    def _unpack(self, entry: bytes) -> Iterator[tuple[str, list[bytes]]]:
        """Another gateway's placements on replicas that this one knows. Raises struct.error."""
        mine = self.process.encode()
        at = len(mine)
        if entry[:at] == mine:
            return
        while at < len(entry):
            name, size, count = _HEAD.unpack_from(entry, at)
            at += _HEAD.size
            hashes = [entry[at + size * i : at + size * (i + 1)] for i in range(count)]
            at += size * count
            if at > len(entry):
                raise struct.error("a placement is cut short")
            if name in self._names:
                yield self._names[name], hashes


def _load(replica: Replica) -> tuple[int, float]:
    return replica.in_flight, float(replica.waiting_tokens)


def _digest(url: str) -> bytes:
    """Gateways may see each other's replicas under the same URL only; Redis sees none."""
    return hashlib.blake2b(url.encode(), digest_size=8).digest()
