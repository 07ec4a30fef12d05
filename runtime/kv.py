"""Blocks of the KV pool: who holds which.

Knows counts and identities, nothing of tensors, models, requests or policy. A block is
`BLOCK_TOKENS` consecutive positions of one sequence in every layer. Invariant, checked by
`BlockPool.check`: free + cached + in use = total.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

BLOCK_TOKENS = 16


class OutOfBlocks(Exception):
    """The pool has fewer free blocks than were asked for; nothing was taken."""


@dataclass(frozen=True, slots=True)
class BlockCounts:
    total: int
    free: int
    cached: int
    in_use: int


class BlockPool:
    """Hands out block numbers 0..total-1. A block that nobody holds is free at once."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ValueError(f"a KV pool needs at least one block, got {total}")
        self._free = deque(range(total))
        self._held = bytearray(total)
        self.total = total

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free blocks. Raises OutOfBlocks when there are fewer."""
        if count > len(self._free):
            raise OutOfBlocks(f"asked for {count} blocks, {len(self._free)} are free")
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._held[block] = 1
        return blocks

    def give_back(self, blocks: list[int]) -> None:
        """Frees blocks that `take` handed out, each once."""
        for block in blocks:
            assert self._held[block], f"block {block} is given back but nobody holds it"
            self._held[block] = 0
        self._free.extend(blocks)

    def counts(self) -> BlockCounts:
        in_use = sum(self._held)  # read once: other threads ask for these counts in mid-change
        return BlockCounts(self.total, self.total - in_use, 0, in_use)

    def check(self) -> None:
        """Raises AssertionError when a block is lost or counted twice."""
        counts = self.counts()
        assert counts.free + counts.cached + counts.in_use == counts.total, counts
        assert len(self._free) == counts.free, "a block is neither held nor on the free list"
        assert len(set(self._free)) == counts.free, "a block is on the free list twice"


def blocks_for(tokens: int) -> int:
    """Blocks that `tokens` positions need."""
    return -(-tokens // BLOCK_TOKENS)
