"""Where evicted KV blocks go: host memory, then a lower tier, and back by the same way.

A block is bytes under its chained hash; what they mean is the runtime's business. Only memory
stands beside the pool: what lies lower is staged into memory first, in a thread of its own, and is
kept from eviction until its reader has it. A block is worth loading when that takes less time than
computing it again, so every tier measures what it gives in bytes a second.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from time import perf_counter
from typing import Protocol

# Whoever gives a block away does not change it any more.
Data = bytes | memoryview

# Blocks on their way up at the same time, beyond what memory may hold; one run may exceed it.
STAGING_BLOCKS = 1024
# How much the newest measurement counts: a tier's speed changes with what else the machine does.
NEWEST = 0.2


@dataclass(slots=True)
class TierCounts:
    """One tier since its start, in blocks where no unit is named. Any thread may read it."""

    limit_bytes: int
    blocks: int = 0  # held now
    bytes: int = 0  # held now
    stored: int = 0
    stored_bytes: int = 0
    loaded: int = 0  # handed on upwards: from memory to the pool, from below to memory
    loaded_bytes: int = 0
    evicted: int = 0
    dropped: int = 0  # not stored: the tier was switched off, or its queue was full
    forgotten: int = 0  # on demand
    corrupt: int = 0  # found, but not what was stored: forgotten, to be computed again
    failed: int = 0  # reads and writes that the operating system refused
    on: bool = True


class Rate:
    """Seconds that bytes take, from a measurement at the start and every one since."""

    def __init__(self, bytes_per_s: float | None = None) -> None:
        self._s_per_byte = None if bytes_per_s is None else 1 / bytes_per_s

    @property
    def bytes_per_s(self) -> float | None:
        """None while nothing has been measured."""
        return None if self._s_per_byte is None else 1 / self._s_per_byte

    def saw(self, size: int, seconds: float) -> None:
        now = max(seconds, 1e-9) / size
        old = self._s_per_byte
        self._s_per_byte = now if old is None else old + NEWEST * (now - old)

    def seconds(self, size: int) -> float:
        """Infinite while nothing has been measured."""
        return float("inf") if self._s_per_byte is None else size * self._s_per_byte


class Tier(Protocol):
    """Below memory: slower, larger, perhaps shared. Raises nothing: what fails is counted."""

    name: str
    counts: TierCounts
    rate: Rate

    def holds(self, key: bytes) -> bool:
        """From what is known in memory, at once. A later `read` may still find nothing."""

    def keeps(self, key: bytes) -> bool:
        """Whether this process has put it here itself, and it is not gone."""

    def watch(self, changed: Callable[[bytes], None]) -> None:
        """`changed` is called, in any thread, with each block that this process stores here or
        that goes; it returns at once."""

    def offer(self, key: bytes, data: Data) -> bool:
        """Takes a block to be stored soon, at once; False when it was dropped."""

    def touch(self, key: bytes) -> None:
        """Counts as a use."""

    def drain(self, seconds: float) -> bool:
        """Waits until nothing is on its way down; False when that takes longer."""

    def read(self, keys: Sequence[bytes]) -> Iterator[Data | None]:
        """Each block as it comes, None for one that is gone or not whole. May block for long."""

    def forget(self, keys: Iterable[bytes] | None) -> None:
        """These blocks, or all of its own, are not given out any more."""

    def close(self) -> None:
        """Stores what is still on its way down, within bounds, and ends."""


def _nobody_asks(_: bytes) -> None:
    """What is told of changes where nobody watches."""


class MemoryTier:
    """Blocks in host memory, the least recently used ones out first. One thread at a time.

    `limit_bytes` bounds what nobody needs right now: pinned blocks stay whatever the limit.
    """

    name = "host"

    def __init__(self, limit_bytes: int) -> None:
        self.counts = TierCounts(limit_bytes)
        self.rate = Rate()  # of copying to where the blocks are used: whoever does it measures it
        self.changed: Callable[[bytes], None] = _nobody_asks
        self._blocks: OrderedDict[bytes, Data] = OrderedDict()  # next out first
        self._pins: Counter[bytes] = Counter()

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def put(self, key: bytes, data: Data) -> list[tuple[bytes, Data]]:
        """Keeps a block as the newest; those that had to go for it, which may be itself."""
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return []
        self._blocks[key] = data
        counts = self.counts
        counts.stored += 1
        counts.stored_bytes += len(data)
        counts.blocks += 1
        counts.bytes += len(data)
        self.changed(key)
        return self._shrink()

    def get(self, key: bytes) -> Data:
        data = self._blocks[key]
        self.counts.loaded += 1
        self.counts.loaded_bytes += len(data)
        return data

    def touch(self, keys: Sequence[bytes]) -> None:
        """Makes the blocks of a run the newest, its tail to go before its head."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def pin(self, keys: Iterable[bytes]) -> None:
        self._pins.update(keys)

    def unpin(self, keys: Iterable[bytes]) -> list[tuple[bytes, Data]]:
        """Lets go what `pin` held, each once; those that have to go now."""
        for key in keys:
            self._pins[key] -= 1
            assert self._pins[key] >= 0, "a block is unpinned more often than it was pinned"
            if not self._pins[key]:
                del self._pins[key]
        return self._shrink()

    def forget(self, keys: Iterable[bytes] | None) -> None:
        """Removes blocks, or all, whoever pins them."""
        for key in list(self._blocks) if keys is None else keys:
            data = self._blocks.pop(key, None)
            if data is not None:
                self.counts.forgotten += 1
                self.counts.blocks -= 1
                self.counts.bytes -= len(data)
                self.changed(key)

    @property
    def pinned(self) -> int:
        return len(self._pins)

    def _shrink(self) -> list[tuple[bytes, Data]]:
        counts = self.counts
        if counts.bytes <= counts.limit_bytes:
            return []
        gone = []
        for key in self._blocks:
            if key not in self._pins:
                gone.append((key, self._blocks[key]))
                counts.bytes -= len(self._blocks[key])
                if counts.bytes <= counts.limit_bytes:
                    break
        for key, _ in gone:
            del self._blocks[key]
            self.changed(key)
        counts.blocks -= len(gone)
        counts.evicted += len(gone)
        return gone


@dataclass(slots=True, eq=False)
class Promotion:
    """A run of blocks on its way to memory. `arrived` of them are there, pinned, from the first on.

    `Tiers.release` ends it, whether it is done or not.
    """

    keys: Sequence[bytes]
    wake: Callable[[Promotion], None]
    epoch: int  # of forgetting: what was read before must not arrive behind it
    arrived: int = 0
    done: bool = False
    released: bool = False
    service_s: float = 0.0  # of the reading itself, once it is done


class Tiers:
    """Memory and what lies below it. Only `close` waits for a disk, and not for long."""

    def __init__(
        self, memory: MemoryTier, lower: Tier | None = None, *, staging_blocks: int = STAGING_BLOCKS
    ) -> None:
        self.memory = memory
        self.lower = lower
        self._staging_blocks = staging_blocks
        self._lock = threading.Lock()
        self._queued = threading.Condition(self._lock)
        self._queue: deque[Promotion] = deque()
        self._staged = 0
        self._epoch = 0
        self._open = True
        self._thread: threading.Thread | None = None
        if lower is not None:
            self._thread = threading.Thread(target=self._promote, name="tiers-up", daemon=True)
            self._thread.start()

    def watch(self, changed: Callable[[bytes], None]) -> None:
        """`changed` is called, in any thread, with each block that comes to a tier or goes."""
        self.memory.changed = changed
        if self.lower is not None:
            self.lower.watch(changed)

    def keepers(self) -> dict[str, Callable[[bytes], bool]]:
        """By a tier's name, what tells whether it keeps a block now; any thread may ask."""
        lower = {} if self.lower is None else {self.lower.name: self.lower.keeps}
        return {self.memory.name: self.memory.__contains__, **lower}

    def put(self, key: bytes, data: Data) -> None:
        """Stores a block in memory, and on its way down."""
        with self._lock:
            gone = self.memory.put(key, data)
        if self.lower is None:
            return
        if not self.lower.holds(key):
            self.lower.offer(key, data)
        self._sink([one for one in gone if one[0] != key])

    def _sink(self, gone: list[tuple[bytes, Data]]) -> None:
        """A last chance for what leaves memory and was dropped on its first way down."""
        if self.lower is not None:
            for key, data in gone:
                if not self.lower.holds(key):
                    self.lower.offer(key, data)

    def wants(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of these are worth a `put`; those that are here already become the newest."""
        lower, limit = self.lower, self.memory.counts.limit_bytes
        with self._lock:
            missing = [key not in self.memory for key in keys]
            self.memory.touch(keys)
        if limit:
            return missing
        return [
            one and lower is not None and not lower.holds(key)
            for one, key in zip(missing, keys, strict=True)
        ]

    def find(self, keys: Sequence[bytes]) -> tuple[int, int]:
        """How many of `keys`, from the first on, are in memory, and how many in any tier."""
        with self._lock:
            here = [key in self.memory for key in keys]
        near = sum(takewhile(bool, here))
        lower = self.lower
        if lower is None:
            return near, near
        far = near
        while far < len(keys) and (here[far] or lower.holds(keys[far])):
            far += 1
        return near, far

    def load(self, keys: Sequence[bytes]) -> list[Data]:
        """The longest run of `keys`, from the first on, that memory holds."""
        with self._lock:
            found = list(takewhile(self.memory.__contains__, keys))
            self.memory.touch(found)
            return [self.memory.get(key) for key in found]

    def promote(self, keys: Sequence[bytes], wake: Callable[[Promotion], None]) -> Promotion | None:
        """Starts to bring a run up; `wake` is called in another thread when it is done.

        None when so much is on its way already that waiting for it is no good.
        """
        with self._lock:
            staged = self._staged + len(keys)
            if not self._open or (self._staged and staged > self._staging_blocks):
                return None
            self._staged = staged
            promotion = Promotion(keys, wake, self._epoch)
            self._queue.append(promotion)
            self._queued.notify()
        return promotion

    def release(self, promotion: Promotion) -> None:
        """What it brought may go again, what it has not brought yet stays below."""
        with self._lock:
            if promotion.released:
                return
            promotion.released = True
            self._staged -= len(promotion.keys)
            arrived = promotion.keys[: promotion.arrived]
            gone = self.memory.unpin(arrived)
        self._sink(gone)

    def forget(self, keys: Iterable[bytes] | None = None) -> None:
        """These blocks, or all, do not come back from here: they are not to be trusted."""
        keys = None if keys is None else list(keys)
        with self._lock:
            self._epoch += 1
            self.memory.forget(keys)
        if self.lower is not None:
            self.lower.forget(keys)

    def counts(self) -> dict[str, TierCounts]:
        """By the tier's name; plain numbers that go on changing."""
        lower = {} if self.lower is None else {self.lower.name: self.lower.counts}
        return {self.memory.name: self.memory.counts, **lower}

    def close(self) -> None:
        """Ends the threads; what is on its way down is stored, within bounds."""
        with self._lock:
            self._open = False
            self._queued.notify()
        if self._thread is not None:
            self._thread.join()
        if self.lower is not None:
            self.lower.close()

    # ---- the thread that reads from below --------------------------------------------------------

    def _promote(self) -> None:
        while True:
            with self._lock:
                while self._open and not self._queue:
                    self._queued.wait()
                if not self._open:
                    return
                promotion = self._queue.popleft()
            if not promotion.released:
                self._bring_up(promotion)
            promotion.done = True
            promotion.wake(promotion)

    def _bring_up(self, promotion: Promotion) -> None:
        """Reads what memory lacks, in order; the first block that cannot be had ends the run."""
        assert self.lower is not None
        with self._lock:
            missing = [key for key in promotion.keys if key not in self.memory]
        began = perf_counter()
        size = 0
        fresh = self.lower.read(missing)
        wanted = set(missing)
        for key in promotion.keys:
            data = next(fresh) if key in wanted else b""
            if data is None or not self._arrive(promotion, key, data):
                break
            size += len(data)
        promotion.service_s = perf_counter() - began
        if size:
            self.lower.rate.saw(size, promotion.service_s)

    def _arrive(self, promotion: Promotion, key: bytes, data: Data) -> bool:
        """Pins the next block of a run in memory. False when the run is at its end."""
        with self._lock:
            if promotion.released or promotion.epoch != self._epoch or not self._open:
                return False
            if not data and key not in self.memory:
                return False  # evicted since the run began
            self.memory.pin([key])
            gone = self.memory.put(key, data)
            promotion.arrived += 1
        self._sink(gone)
        return True
