"""Blocks that the pool has given up and that come back to a sequence: asked for, filled, counted.

Knows sequences and the pool; what lies below it is behind a protocol. A long run is filled over
several steps, so that no step copies for longer than running answers allow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cache.tiers import Data
from runtime.kv import BLOCK_TOKENS, BlockPool
from runtime.sequence import Sequence


class Below(Protocol):
    """What the pool once had and may have again: see `runtime.swap`."""

    def begin_step(self, allowed_s: float) -> None: ...
    def ready(self, sequence: Sequence, first: int, end: int) -> int | None: ...
    def fetch(self, sequence: Sequence, first: int, count: int) -> list[Data] | None: ...
    def load(self, blocks: list[int], data: list[Data]) -> None: ...
    def admitted(self, sequence: Sequence, held: int, found: int, loaded: int) -> int: ...
    def leave(self, key: int) -> None: ...
    def distrust(self, hashes: list[bytes]) -> None: ...


@dataclass(frozen=True, slots=True)
class Coming:
    """What an admitted sequence finds, in blocks: those it `held`, those `found` in the pool, and
    those from below, up to block `end` of it."""

    held: int
    found: int
    end: int
    first: bool  # it is admitted for the first time


class Loads:
    """What comes to whom from below, and where prompts were found. Without anything below, too."""

    def __init__(self, pool: BlockPool, below: Below | None) -> None:
        self.asked_tokens = 0  # of the prompts of all that were admitted
        self.hit_tokens = {"pool": 0, "host": 0, "disk": 0}  # of these, by where they were found
        self._pool = pool
        self._below = below
        self._coming: dict[int, Coming] = {}  # key of a running sequence -> what it waits for

    def begin_step(self, allowed_s: float) -> None:
        """`allowed_s` is what the step may take in all."""
        if self._below is not None:
            self._below.begin_step(allowed_s)

    def ready(self, sequence: Sequence, first: int, end: int) -> int | None:
        """Of the blocks `first` to `end`, how many can be had; None: it is worth waiting."""
        return 0 if self._below is None else self._below.ready(sequence, first, end)

    def fetch(self, sequence: Sequence, coming: Coming) -> list[Data] | None:
        """The next blocks as far as this step has time for them: none when they are gone, None
        when it is up. To be called before room is made: they may have to go for that."""
        count = coming.end - sequence.sealed
        if self._below is None or count <= 0 or sequence.sealed < coming.held + coming.found:
            return []
        return self._below.fetch(sequence, sequence.sealed, count)

    def fill(self, sequence: Sequence, coming: Coming, data: list[Data] | None) -> None:
        """Fills blocks of a sequence and lets others find them; the rest follows in later steps."""
        if data and self._below is not None:
            first, end = sequence.sealed, sequence.sealed + len(data)
            blocks = sequence.blocks[first:end]
            self._below.load(blocks, data)
            self._pool.seal(blocks, sequence.keys(first, end))
            sequence.sealed = end
            sequence.computed = min(end * BLOCK_TOKENS, sequence.needed_from)
        self._coming[sequence.key] = coming
        if data == [] or sequence.sealed >= coming.end:
            self.end(sequence)

    def more(self, sequence: Sequence) -> bool:
        """Goes on filling. False once there is nothing more to come."""
        coming = self._coming.get(sequence.key)
        if coming is not None:
            self.fill(sequence, coming, self.fetch(sequence, coming))
        return sequence.key in self._coming

    def end(self, sequence: Sequence) -> None:
        """Nothing more comes to a sequence: it has all, or has to give way."""
        coming = self._coming.pop(sequence.key, None)
        if coming is None:
            return
        near, loaded = 0, max(0, sequence.sealed - coming.held - coming.found)
        if self._below is not None:
            near = self._below.admitted(sequence, coming.held, coming.found, loaded)
        if coming.first:
            sequence.cached = sequence.computed
            self._count(sequence, coming.found, near)

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended or was cancelled, perhaps before it was admitted."""
        self.end(sequence)
        if self._below is not None:
            self._below.leave(sequence.key)

    def distrust(self, hashes: list[bytes]) -> None:
        """Values that went wrong are not to come back."""
        if self._below is not None:
            self._below.distrust(hashes)

    def _count(self, sequence: Sequence, found: int, near: int) -> None:
        """Where the prompt's tokens were found: the last one is computed in any case."""
        self.asked_tokens += sequence.prompt_tokens
        left = sequence.cached
        for tier, blocks in (("pool", found), ("host", near)):
            here = min(left, blocks * BLOCK_TOKENS)
            self.hit_tokens[tier] += here
            left -= here
        self.hit_tokens["disk"] += left
