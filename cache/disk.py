"""The disk tier: blocks that outlive the process, written in a thread, read in another's.

Knows failures and rates; `cache.disk_folder` knows whose folder is which, `cache.slot_file` how a
block lies in a file. Whatever the operating system refuses is counted, told once and tried again
later: serving never waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache.disk_folder import claim, layout_of, neighbours, read_rate, remove_unused
from cache.slot_file import Damaged, SlotFile, SlotView
from cache.tiers import Data, Rate, TierCounts

log = logging.getLogger(__name__)

QUEUE_BYTES = 64 * 2**20  # on the way to the disk; what comes when it is full is dropped
_REFRESH_S = 5.0  # between two looks at what other processes store
_CLOSE_S = 3.0  # at most this long for what is still on its way at the end
_PAUSE_S, _PAUSE_MAX_S = 60.0, 600.0
_PROBE_BYTES = 8 * 2**20


class _Pause:
    """How long something that failed is left alone: longer each time, told only the first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until = 0.0
        self._pause_s = _PAUSE_S
        self.failing = False

    @property
    def active(self) -> bool:
        return self.failing and self._clock() < self._until

    def failed(self) -> float | None:
        """Begins or prolongs the pause; its seconds when it is the first one."""
        first = None if self.failing else self._pause_s
        self.failing = True
        self._until = self._clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _PAUSE_MAX_S)
        return first

    def succeeded(self) -> bool:
        """True when that ends a failure."""
        was, self.failing, self._pause_s = self.failing, False, _PAUSE_S
        return was


class DiskTier:
    """`limit_bytes` of blocks in a folder. `holds` and `offer` return at once."""

    name = "disk"

    def __init__(
        self,
        path: Path,
        *,
        limit_bytes: int,
        block_bytes: int,
        identity: Mapping[str, Any],
        queue_bytes: int = QUEUE_BYTES,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.block_bytes = block_bytes
        self.counts = TierCounts(limit_bytes)
        self.rate = Rate()
        name, self._about = layout_of(identity, block_bytes)
        self._layout = path / name
        self._queue_bytes = queue_bytes
        self._wall = wall
        self._queue: OrderedDict[bytes, Data] = OrderedDict()
        self._ready = threading.Condition()
        self._forgotten: set[bytes] = set()  # not yet on the disk
        self._forget_all = False
        self._going_on = True
        self._writes, self._reads = _Pause(clock), _Pause(clock)
        self._changed: Callable[[bytes], None] | None = None
        self._own: SlotFile | None = None
        self._others: list[SlotView] = []
        self._open_folder()
        self.refresh()
        self._thread = threading.Thread(target=self._work, name="tiers-down", daemon=True)
        self._thread.start()

    # ---- any thread ------------------------------------------------------------------------------

    def holds(self, key: bytes) -> bool:
        own = self._own
        if key in self._queue:
            return True
        if self._reads.active or self._is_forgotten(key):
            return False
        return (own is not None and key in own) or any(key in view for view in self._others)

    def keeps(self, key: bytes) -> bool:
        own = self._own
        return key in self._queue or (
            own is not None and key in own and not self._is_forgotten(key)
        )

    def watch(self, changed: Callable[[bytes], None]) -> None:
        self._changed = changed
        if self._own is not None:
            self._own.gone = changed

    def offer(self, key: bytes, data: Data) -> bool:
        with self._ready:
            waiting = len(self._queue) * self.block_bytes
            if self._writes.active or waiting + len(data) > self._queue_bytes:
                self.counts.dropped += 1
                return False
            self._queue[key] = data
            self._ready.notify()
        self._tell([key])
        return True

    def read(self, keys: Sequence[bytes]) -> Iterator[Data | None]:
        """One thread at a time."""
        own = self._own
        if own is not None:
            own.expect(keys)
        for key in keys:
            data = self._queue.get(key) or self._read(key)
            if data is not None:
                self.counts.loaded += 1
                self.counts.loaded_bytes += len(data)
            yield data

    def forget(self, keys: Iterable[bytes] | None) -> None:
        """Takes effect at once here, on the disk soon; other processes' folders are theirs."""
        with self._ready:
            if keys is None:
                self._queue.clear()
                self._forget_all = True
            else:
                keys = list(keys)
                for key in keys:
                    self._queue.pop(key, None)
                    self._forgotten.add(key)
            self._ready.notify()
        self._tell(keys or ())  # of all, whoever wants that knows

    def touch(self, key: bytes) -> None:
        if self._own is not None:
            self._own.touch(key)

    def drain(self, seconds: float) -> bool:
        with self._ready:
            return self._ready.wait_for(
                lambda: not (self._queue or self._forgotten or self._forget_all), max(0, seconds)
            )

    def close(self) -> None:
        with self._ready:
            self._going_on = False
            self._ready.notify_all()
        self._thread.join()
        if self._own is not None:
            self._own.close()
            self._own = None

    # ---- reading ---------------------------------------------------------------------------------

    def _read(self, key: bytes) -> bytes | None:
        if self._reads.active or self._is_forgotten(key):
            return None
        try:
            data = None if self._own is None else self._own.read(key)
            for view in self._others:
                data = view.read(key) if data is None else data
        except Damaged as error:
            self.counts.corrupt += 1
            self._count_held()
            log.warning("%s is damaged and is not used; its block is computed again", error)
            return None
        except OSError as error:
            self._fail(self._reads, error, "read")
            return None
        self._succeed(self._reads)
        return data

    # ---- the thread that writes ------------------------------------------------------------------

    def _work(self) -> None:
        self._measure()
        remove_unused(self.path, self._wall())
        look = 0.0
        while True:
            with self._ready:
                if self._going_on and not (self._queue or self._forgotten or self._forget_all):
                    self._ready.wait(_REFRESH_S)
                if not self._going_on:
                    break
            self._forget_now()
            self._write_queued(until=None)
            now = time.monotonic()
            if now >= look:
                self.refresh()
                took = time.monotonic() - now
                look = now + max(_REFRESH_S, 100 * took)  # never more than a hundredth of the time
        self._forget_now()
        self._write_queued(until=time.monotonic() + _CLOSE_S)

    def _is_forgotten(self, key: bytes) -> bool:
        return self._forget_all or key in self._forgotten

    def _forget_now(self) -> None:
        with self._ready:
            keys = None if self._forget_all else list(self._forgotten)
        if self._own is not None and keys != []:
            try:
                self.counts.forgotten += self._own.forget(keys)
            except OSError as error:
                self._fail(self._writes, error, "forget")
            self._count_held()
        with self._ready:
            if keys is None:
                self._forget_all = False
            else:
                self._forgotten.difference_update(keys)
            self._ready.notify_all()

    def _write_queued(self, *, until: float | None) -> None:
        """Empties the queue; a block stays findable in it until it is on the disk."""
        while until is None or time.monotonic() < until:
            with self._ready:
                if not self._queue or self._forgotten or self._forget_all:
                    return
                key, data = next(iter(self._queue.items()))
            done = self._write(key, data)
            with self._ready:
                dropped = [] if done else list(self._queue)
                if done:
                    self._queue.pop(key, None)  # it may have been forgotten meanwhile
                else:
                    self.counts.dropped += len(dropped)
                    self._queue.clear()
                self._ready.notify_all()
            self._tell(dropped)

    def _write(self, key: bytes, data: Data) -> bool:
        try:
            if self._own is None or not self._own.in_place:
                self._open_folder()
            if self._own is None:
                return False
            self.counts.evicted += self._own.write(key, data)
        except OSError as error:
            self._fail(self._writes, error, "write")
            return False
        self._succeed(self._writes)
        self.counts.stored += 1
        self.counts.stored_bytes += len(data)
        self._count_held()
        return True

    def _open_folder(self) -> None:
        """Takes the first folder that no other process writes to; what is in it is found again."""
        own, self._own = self._own, None
        if own is not None:
            own.close()
        try:
            self._own = claim(self._layout, self._about, self.block_bytes, self.counts.limit_bytes)
            if self._own is not None:
                self._own.gone = self._changed
        except OSError as error:
            self._fail(self._writes, error, "open")
        self._tell([] if own is None else own.keys())  # they may be here again, or gone
        self._count_held()

    def refresh(self) -> None:
        """Looks at what other processes have stored in this layout since the last time."""
        own = None if self._own is None else self._own.folder
        self._others = neighbours(self._layout, own, self._others, self.block_bytes)

    def _measure(self) -> None:
        """Bytes a second, read from the device as far as the operating system allows it."""
        if self._own is None:
            return
        probe = self._own.folder / "probe"
        try:
            size = min(_PROBE_BYTES, self.counts.limit_bytes // 4)
            self.rate = Rate(read_rate(probe, self.block_bytes, size))
        except OSError as error:
            self._fail(self._writes, error, "measure")

    # ---- what fails ------------------------------------------------------------------------------

    def _fail(self, pause: _Pause, error: OSError, what: str) -> None:
        self.counts.failed += 1
        self.counts.on = False
        seconds = pause.failed()
        if seconds is not None:
            log.warning(
                "the disk tier in %s cannot %s: %s. It rests for %d s at a time, its blocks are "
                "computed again; make room there, or change runtime.tiers.disk",
                self.path,
                what,
                error,
                seconds,
            )

    def _succeed(self, pause: _Pause) -> None:
        if pause.succeeded():
            log.info("the disk tier in %s works again", self.path)
            self.counts.on = not (self._writes.failing or self._reads.failing)

    def _tell(self, keys: Iterable[bytes]) -> None:
        if self._changed is not None:
            for key in keys:
                self._changed(key)

    def _count_held(self) -> None:
        self.counts.blocks = 0 if self._own is None else len(self._own)
        self.counts.bytes = self.counts.blocks * self.block_bytes
