"""Changes on their way to subscribers: a bounded queue that loses nothing, a history to replay.

Knows batches and their numbers; knows no sockets and no threads, except that the queue is filled by
one and emptied by another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from runtime.event_frames import MEDIUM, Changes, encode

if TYPE_CHECKING:
    from runtime.kv import BlockKey

QUEUED_BATCHES_MAX = 1024
REPLAYED_BLOCKS_MAX = 100_000  # about 50 MB


class Outbox:
    """Steps' changes for another thread. While too many wait, steps are merged to one batch."""

    def __init__(self, batches_max: int = QUEUED_BATCHES_MAX) -> None:
        self.changes = Changes()  # of the step that runs; only the filling thread touches them
        self.merged_steps = 0
        self._batches_max = batches_max
        self._ready: deque[tuple[Changes, float]] = deque()

    def flush(self, at: float, *, at_once: bool = False) -> bool:
        """Ends a step; True when it made a batch. `at_once`: also where too many wait."""
        if not self.changes:
            return False
        if len(self._ready) >= self._batches_max and not at_once:
            self.merged_steps += 1
            return False
        self._ready.append((self.changes, at))
        self.changes = Changes()
        return True

    def take(self) -> Iterator[tuple[Changes, float]]:
        """What is ready, oldest first, until nothing is."""
        while self._ready:
            yield self._ready.popleft()


class History:
    """What was sent, for those who missed it: the last batches, and what was known before them.

    Batches that fall out of the buffer are folded into a snapshot, so that a replay from far back
    is short of nothing: it begins with one batch that clears and stores all that was known then.
    """

    def __init__(self, rank: int, batches_max: int, blocks_max: int = REPLAYED_BLOCKS_MAX) -> None:
        self.next_seq = 0
        self._rank = rank
        self._batches_max = batches_max
        self._blocks_max = blocks_max
        self._batches: deque[tuple[bytes, Changes, float]] = deque()
        self._blocks = 0
        self._before: dict[str, dict[bytes, BlockKey]] = {MEDIUM: {}}  # by medium
        self._before_at = 0.0

    def add(self, changes: Changes, at: float) -> tuple[int, bytes]:
        """The number and the payload of a new batch."""
        payload = encode(changes, at, self._rank)
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        self._batches.append((payload, changes, at))
        self._blocks += len(changes)
        while len(self._batches) > self._batches_max or (
            self._blocks > self._blocks_max and len(self._batches) > 1
        ):
            _, oldest, self._before_at = self._batches.popleft()
            self._fold(oldest)
            self._blocks -= len(oldest)
        return seq, payload

    def since(self, start: int) -> list[tuple[int, bytes]]:
        """Numbered payloads from `start` on; first a snapshot, where the buffer begins later."""
        oldest = self.next_seq - len(self._batches)
        found = [(oldest + at, payload) for at, (payload, *_) in enumerate(self._batches)]
        if start < oldest:
            snapshot = Changes(cleared=True, stored=dict(self._before[MEDIUM]))
            for medium, blocks in self._before.items():
                if medium != MEDIUM:
                    snapshot.part(medium).stored.update(blocks)
            return [(oldest - 1, encode(snapshot, self._before_at, self._rank)), *found]
        return found[start - oldest :]

    def _fold(self, changes: Changes) -> None:
        """Brings what was known before the buffer up to date."""
        if changes.cleared:
            for blocks in self._before.values():
                blocks.clear()
        for medium, part in changes.parts():
            part.apply_to(self._before.setdefault(medium, {}))
