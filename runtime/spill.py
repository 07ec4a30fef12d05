"""What the KV pool gives up goes down: a watcher that copies evicted blocks to the tiers.

Knows the pool's blocks and their parents; knows no sequences. Runs in the engine's thread, so that
what it copies in one go is bounded.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

from cache.tiers import Data, Rate, Tier, Tiers
from runtime.kv import BlockKey, BlockPool
from runtime.model import Model

if TYPE_CHECKING:
    from runtime.swap import SwapCounts

COPY_S_MAX = 0.1  # of a step, for copying out of the pool; what it has no time for is dropped
_TOGETHER = 8  # blocks that are copied at once in any case
_SAVE_S = 3.0  # at most this long for what the pool holds at the end


class Spill:
    """Stores what is evicted, and what it would be of no use without."""

    def __init__(self, model: Model, tiers: Tiers, counts: SwapCounts) -> None:
        self.tiers = tiers
        self._counts = counts
        self._model = model
        self._block_bytes = model.block_bytes
        self._pool: BlockPool | None = None
        self._rate = Rate()
        self._parents: dict[bytes, bytes | None] = {}  # of the blocks that the pool can find
        self._ancestors: deque[bytes] = deque()  # to be kept below
        self._seen: set[bytes] = set()  # ancestors that were kept a short while ago
        self._young = 0  # evictions since then

    def attach(self, pool: BlockPool) -> None:
        """The pool that is watched."""
        self._pool = pool

    def read(self, blocks: Many[int]) -> list[Data]:
        """Copies of blocks of the pool."""
        began = time.perf_counter()
        data: list[Data] = [memoryview(one.numpy()) for one in self._model.read_blocks(blocks)]  # type: ignore[arg-type]  # numpy's arrays are buffers
        seconds = time.perf_counter() - began
        self._counts.read_s += seconds
        if blocks:
            self._rate.saw(len(blocks) * self._block_bytes, seconds)
        return data

    def stored(self, keys: Many[BlockKey]) -> None:
        for key in keys:
            self._parents[key.hash] = key.parent

    def evicting(self, blocks: Many[tuple[int, bytes]]) -> None:
        """The blocks that go first are the ends of runs: where time is short, beginnings stay."""
        wanted = self.tiers.wants([key for _, key in blocks])
        down = [one for one, missing in zip(blocks, wanted, strict=True) if missing]
        most = self._affordable()
        self.tiers.memory.counts.dropped += max(0, len(down) - most)
        down = down[-most:]
        data = self.read([block for block, _ in down])
        for (_, key), one in zip(down, data, strict=True):
            self.tiers.put(key, one)
        if self.tiers.lower is not None:
            self._keep_ancestors(self.tiers.lower, [key for _, key in blocks])

    def removed(self, hashes: Many[bytes]) -> None:
        for key in hashes:
            self._parents.pop(key, None)

    def cleared(self) -> None:
        self._parents.clear()
        self.tiers.forget()

    def save(self) -> None:
        """Stores what the pool can still find below memory, so that a restart finds it."""
        lower, until = self.tiers.lower, time.monotonic() + _SAVE_S
        keys = [] if lower is None else [key for key in self._parents if not lower.holds(key)]
        for at in range(0, len(keys), _TOGETHER):
            if lower is None or time.monotonic() > until or not lower.counts.on:
                return
            some = keys[at : at + _TOGETHER]
            blocks = [block for key in some for block in self._find(key)]
            for key, data in zip(some, self.read(blocks), strict=True):
                lower.offer(key, data)
            lower.drain(until - time.monotonic())

    def _affordable(self) -> int:
        """How many blocks one eviction may copy."""
        rate = self._rate.bytes_per_s
        copied = 0 if rate is None else int(COPY_S_MAX * rate / self._block_bytes)
        return max(_TOGETHER, copied)

    def _find(self, key: bytes) -> list[int]:
        return [] if self._pool is None else self._pool.match([key])

    def _keep_ancestors(self, lower: Tier, keys: Many[bytes]) -> None:
        """Below memory a block is of use only with all before it, and what is used most never
        leaves the pool: so a process that is killed would lose the beginnings of everything.

        They are copied down while they are in use, a few at a time, and kept from growing old.
        """
        self._young += len(keys)
        if self._young > lower.counts.limit_bytes // self._block_bytes // 4:
            self._young = 0
            self._seen.clear()
        for key in keys:
            run = []
            at = self._parents.get(key)
            while at is not None and at in self._parents and at not in self._seen:
                self._seen.add(at)
                run.append(at)
                at = self._parents[at]
            self._ancestors.extend(reversed(run))
        for _ in range(min(2 * len(keys), _TOGETHER, len(self._ancestors))):
            key = self._ancestors.popleft()
            if lower.holds(key):
                lower.touch(key)
            elif block := self._find(key):
                lower.offer(key, *self.read(block))
