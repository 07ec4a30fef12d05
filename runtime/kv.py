"""Blocks of the KV pool: who holds which, and what they are known by.

Knows counts and identities, nothing of tensors, models or requests. A block is `BLOCK_TOKENS`
consecutive positions of one sequence in every layer. Several sequences can hold one block: a full,
computed block is sealed under its chained hash, is never written again, and stays findable after
its last holder has left, until the room is needed. Invariant, checked by `BlockPool.check`:
free + cached + in use = total.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence as Many
from dataclasses import dataclass
from typing import Protocol

from cache.blocks import BLOCK_TOKENS

__all__ = ["BLOCK_TOKENS", "BlockCounts", "BlockKey", "BlockPool", "OutOfBlocks", "PoolWatcher"]


class OutOfBlocks(Exception):
    """The pool has fewer blocks to spare than were asked for; nothing was taken."""


@dataclass(frozen=True, slots=True)
class BlockCounts:
    total: int
    free: int
    cached: int
    in_use: int


@dataclass(frozen=True, slots=True)
class BlockKey:
    """What a sealed block is known by. `parent` is None for the first block of a prompt."""

    hash: bytes
    parent: bytes | None
    tokens: tuple[int, ...]
    adapter: str | None = None
    salt: str | None = None


class PoolWatcher(Protocol):
    """Hears of every change of what the pool can find. Called in the engine's thread."""

    def stored(self, keys: Many[BlockKey]) -> None:
        """These blocks can be found from now on; consecutive ones of one sequence."""

    def evicting(self, blocks: Many[tuple[int, bytes]]) -> None:
        """(block, hash): still whole, overwritten after this call returns."""

    def removed(self, hashes: Many[bytes]) -> None:
        """These can no longer be found."""

    def cleared(self) -> None:
        """Nothing can be found any more."""


class BlockPool:
    """Hands out block numbers 0..total-1, each to any number of holders."""

    def __init__(self, total: int, watchers: Many[PoolWatcher] = ()) -> None:
        if total < 1:
            raise ValueError(f"a KV pool needs at least one block, got {total}")
        self._free = deque(range(total))
        self._holders = [0] * total
        self._hashes: list[bytes | None] = [None] * total
        self._by_hash: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # sealed, held by nobody; next out first
        self.watchers = list(watchers)
        self.total = total
        self.evictions = 0

    @property
    def available(self) -> int:
        """Blocks that `take` can hand out: the free ones, and the cached ones that nobody holds."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int]:
        """`count` blocks with unknown content, held once. The least recently used cached ones are
        given up when the free ones do not suffice. Raises OutOfBlocks."""
        if count > self.available:
            raise OutOfBlocks(f"asked for {count} blocks, {self.available} are available")
        self._evict(count - len(self._free))
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known run of `hashes`, from the first on; holds none."""
        found = []
        for one in hashes:
            block = self._by_hash.get(one)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder for each of these sealed or held blocks."""
        for block in blocks:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1

    def give_back(self, blocks: Many[int]) -> None:
        """One holder less for each, in the order of the sequence: its tail is given up first."""
        for block in reversed(blocks):
            assert self._holders[block], f"block {block} is given back but nobody holds it"
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._hashes[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None

    def seal(self, blocks: Many[int], keys: Many[BlockKey]) -> None:
        """Full, computed blocks: others may find them, nobody may write to them any more.

        A block whose content is known by another block already stays private to its holder.
        """
        stored = []
        for block, key in zip(blocks, keys, strict=True):
            assert self._holders[block], f"block {block} is sealed but nobody holds it"
            if key.hash not in self._by_hash and self._hashes[block] is None:
                self._by_hash[key.hash] = block
                self._hashes[block] = key.hash
                stored.append(key)
        if stored:
            for watcher in self.watchers:
                watcher.stored(stored)

    def knows(self, one: bytes) -> bool:
        return one in self._by_hash

    def hash_of(self, block: int) -> bytes | None:
        """What a sealed block is known by; None for any other."""
        return self._hashes[block]

    def shared(self, block: int) -> bool:
        """True while more than one sequence holds the block."""
        return self._holders[block] > 1

    def unseal(self, blocks: Iterable[int]) -> None:
        """Makes blocks unfindable: their content is not to be trusted."""
        removed = []
        for block in blocks:
            one = self._hashes[block]
            if one is None:
                continue
            removed.append(one)
            del self._by_hash[one]
            self._hashes[block] = None
            if block in self._idle:
                del self._idle[block]
                self._free.append(block)
        if removed:
            for watcher in self.watchers:
                watcher.removed(removed)

    def clear(self) -> int:
        """Forgets everything that could be found, and gives the count; holders keep theirs."""
        count = len(self._by_hash)
        self._free.extend(self._idle)
        self._idle.clear()
        self._by_hash.clear()
        self._hashes = [None] * self.total
        for watcher in self.watchers:
            watcher.cleared()
        return count

    def counts(self) -> BlockCounts:
        cached, free = len(self._idle), len(self._free)
        return BlockCounts(self.total, free, cached, self.total - free - cached)

    def check(self) -> None:
        """Raises AssertionError when a block is lost, counted twice, or findable but wrong."""
        free, idle = set(self._free), set(self._idle)
        held = {block for block, holders in enumerate(self._holders) if holders}
        assert len(free) == len(self._free), "a block is on the free list twice"
        assert len(free) + len(idle) + len(held) == self.total, self.counts()
        assert not (free & idle or free & held or idle & held), "a block is in two places"
        assert all(self._hashes[block] for block in idle), "a cached block has no hash"
        assert not any(self._hashes[block] for block in free), "a free block can be found"
        for one, block in self._by_hash.items():
            assert self._hashes[block] == one, f"block {block} is found under another's hash"

    def _evict(self, count: int) -> None:
        """Empties the `count` cached blocks that nobody has held for longest."""
        if count <= 0:
            return
        victims = []
        for _ in range(count):
            block, _ = self._idle.popitem(last=False)
            one = self._hashes[block]
            assert one is not None
            victims.append((block, one))
        for watcher in self.watchers:
            watcher.evicting(victims)
        for block, one in victims:
            del self._by_hash[one]
            self._hashes[block] = None
            self._free.append(block)
        self.evictions += count
        hashes = [one for _, one in victims]
        for watcher in self.watchers:
            watcher.removed(hashes)


def blocks_for(tokens: int) -> int:
    """Blocks that `tokens` positions need."""
    return -(-tokens // BLOCK_TOKENS)
