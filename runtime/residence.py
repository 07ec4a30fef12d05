"""Which blocks lie in the tiers below the pool, as events tell it: each tier is its own medium.

Knows the pool's changes and what tiers say of themselves; knows no wire. Tiers know hashes alone:
a block is told of them once it has a name, which it gets when the pool holds it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence as Many
from typing import TYPE_CHECKING

from cache.tiers import Tiers
from runtime.event_frames import Changes

if TYPE_CHECKING:
    from runtime.kv import BlockKey

# A tier's name -> what vLLM calls its medium.
MEDIA = {"host": "CPU", "disk": "STORAGE"}


class Residence:
    """The engine's thread calls; only `tiers` report from other threads.

    What they report is that a block came or went, which may be over by the time it is looked at:
    told is what holds then, against what was told before.
    """

    def __init__(self, tiers: Tiers) -> None:
        self._keeps = {MEDIA[name]: keeps for name, keeps in tiers.keepers().items()}
        self._told: dict[str, set[bytes]] = {medium: set() for medium in self._keeps}
        self._reported: deque[bytes] = deque()
        self._look: set[bytes] = set()
        self._pool: set[bytes] = set()
        self._named: dict[bytes, BlockKey] = {}
        tiers.watch(self._reported.append)

    def stored(self, keys: Many[BlockKey]) -> None:
        """The pool has these: from here on they have a name, and a tier may have them already."""
        for key in keys:
            self._named[key.hash] = key
            self._pool.add(key.hash)
            self._look.add(key.hash)

    def removed(self, hashes: Iterable[bytes]) -> None:
        for one in hashes:
            self._pool.discard(one)
            self._look.add(one)

    def cleared(self) -> None:
        """Of the pool, and so of the tiers: what they report of it says nothing more."""
        for told in self._told.values():
            told.clear()
        self._pool.clear()
        self._named.clear()
        self._look.clear()

    def tell(self, changes: Changes) -> None:
        """Adds what has changed since the last time."""
        while self._reported:
            self._look.add(self._reported.popleft())
        for one in self._look:
            key = self._named.get(one)
            if key is None:
                continue
            for medium, keeps in self._keeps.items():
                self._compare(one, key, keeps(one), medium, changes)
            if one not in self._pool and not any(one in told for told in self._told.values()):
                del self._named[one]
        self._look.clear()

    def _compare(
        self, one: bytes, key: BlockKey, held: bool, medium: str, changes: Changes
    ) -> None:
        told = self._told[medium]
        if held and one not in told:
            told.add(one)
            changes.part(medium).store([key])
        elif not held and one in told:
            told.discard(one)
            changes.part(medium).remove([one])
