"""What one publisher of KV-cache events has told, and whether that is all: numbers, gaps, restarts.

Knows batches in the order in which they come; knows no sockets and no tasks. Whoever drives it asks
`wants` for the replay that it needs, and hands it live and replayed batches. At any time the index
has what the publisher had told by its last batch, or `mode` is not EXACT.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from cache.prefix_index import Mode, PrefixIndex, TooManyBlocks
from gateway.kv_frames import Batch, Cleared, Junk, read_batch
from gateway.kv_names import Blocks, Root

WAITING_BATCHES_MAX = 4096  # live ones kept while a replay runs
WAITING_BYTES_MAX = 32 * 2**20
REPLAYED_BATCHES_MAX = 10**6  # of one replay
REPLAYS_MAX = 3  # in a row for the same hole
JUNK_MAX = 16  # messages that cannot be read, in a row, from which on it is not listened to
EVENTS_AT_ONCE = 64  # then others may have a turn


class Broken(Exception):
    """A publisher that cannot be followed: why."""


@dataclass(slots=True)
class Told:
    """Of one publisher since the gateway began to follow it."""

    batches: int = 0
    gaps: int = 0
    replays: int = 0
    restarts: int = 0
    holes: int = 0  # gaps that no replay could fill
    orphans: int = 0  # blocks whose beginning is not known
    junk: int = 0


class Source:
    """One publisher. `replays` tells whether it can be asked for what was missed."""

    def __init__(
        self,
        index: PrefixIndex,
        replica: str,
        rank: int,
        root: Root,
        *,
        replays: bool,
        clock: Callable[[], float],
    ) -> None:
        self.counts = Told()
        self.last = -1  # number of the last batch that was taken
        self.wants: int | None = None  # the replay that is needed, by its first number
        self._blocks = Blocks(index, replica, rank, root)
        self._replays = replays
        self._clock = clock
        self._whole = False  # nothing before `last` was missed
        self._behind = False  # a replay has to bring something
        self._newest = (-1, 0.0)  # number and time of the latest batch that was heard live
        self._last_at = 0.0
        self._replaying = False
        self._replayed = 0  # batches of this replay
        self._asked = 0  # replays for this hole
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._waiting_bytes = 0
        self._junk = 0  # in a row

    @property
    def blocks(self) -> int:
        """The publisher's own blocks in its pool."""
        return len(self._blocks)

    @property
    def mode(self) -> Mode:
        if self._whole and not self._behind:
            return Mode.EXACT
        return Mode.APPROXIMATE if self.last < 0 else Mode.DEGRADED

    def facts(self) -> dict[str, object]:
        """For health answers."""
        mode = self.mode.value
        return {"mode": mode, "last": self.last, "blocks": self.blocks, **asdict(self.counts)}

    # ---- what happens to it ----------------------------------------------------------------------

    def connected(self) -> None:
        """A connection stands: what is behind it has to be told from the beginning."""
        self._start_over()

    def lost(self) -> None:
        """The connection is gone, and with it what changed meanwhile."""
        self._blocks.demote(self._clock())
        self._start_over()
        self.wants, self._replaying = None, False

    def doubt(self) -> None:
        """What it does is not what it told: it is asked again, from the beginning."""
        self.counts.holes += 1
        self.read_again()

    def read_again(self) -> None:
        """What it told is for now no better than what was sent."""
        self._blocks.demote(self._clock())
        if self._replays:
            self._start_over()
        else:
            self._whole = False

    def catch_up(self) -> None:
        """Asks whether there was anything behind the last batch: a lost last one shows no gap."""
        if self._replays and not self._replaying:
            self._ask(self.last + 1)

    def began(self) -> None:
        """The replay that was wanted is asked for."""
        self.wants = None
        self._replayed = 0
        self.counts.replays += 1

    # ---- live batches ----------------------------------------------------------------------------

    def live(self, number: int, payload: bytes) -> Iterator[None]:
        """Takes a batch piece by piece. Raises Broken."""
        yield from self._guarded(self._live(number, payload))

    def _live(self, number: int, payload: bytes) -> Iterator[None]:
        batch = self._read(number, payload)
        newest = self._newest
        if number <= newest[0]:
            if batch.at < newest[1] or (number, batch.at) == newest:
                return  # late, and replayed already
            yield from self._restarted(number, payload, batch)
            return
        if number <= self.last and batch.at > self._last_at:
            yield from self._restarted(number, payload, batch)
            return
        self._newest = (number, batch.at)
        if self._replaying:
            self._wait(number, payload)
        elif number == self.last + 1:
            yield from self._take(number, batch)
        elif number > self.last:
            yield from self._gap(number, payload, batch)

    def _restarted(self, number: int, payload: bytes, batch: Batch) -> Iterator[None]:
        """Lower numbers at a later time: another life of the publisher."""
        self.counts.restarts += 1
        self._blocks.clear()
        self._start_over()
        self._newest = (number, batch.at)
        if self._replays:
            self._wait(number, payload)
        elif number == 0:
            yield from self._take(number, batch)
        else:
            yield from self._gap(number, payload, batch)

    def _gap(self, number: int, payload: bytes, batch: Batch) -> Iterator[None]:
        if self.last >= 0:
            self.counts.gaps += 1
        if self._replays:
            self._wait(number, payload)
            self._behind = True
            self._ask(self.last + 1)
            return
        self._look_for_hole(number, batch)
        yield from self._take(number, batch)

    def _wait(self, number: int, payload: bytes) -> None:
        """For the end of the replay. What has no room shows as a gap then."""
        if (
            len(self._waiting) < WAITING_BATCHES_MAX
            and self._waiting_bytes + len(payload) <= WAITING_BYTES_MAX
        ):
            self._waiting.append((number, payload))
            self._waiting_bytes += len(payload)

    # ---- replayed batches ------------------------------------------------------------------------

    def replayed(self, number: int, payload: bytes) -> Iterator[None]:
        """Takes one of a replay. Raises Broken."""
        yield from self._guarded(self._replay(number, payload))

    def _replay(self, number: int, payload: bytes) -> Iterator[None]:
        self._replayed += 1
        if self._replayed > REPLAYED_BATCHES_MAX:
            raise Broken(f"a replay of more than {REPLAYED_BATCHES_MAX} batches")
        if number <= self.last:
            return
        batch = self._read(number, payload)
        self._look_for_hole(number, batch)
        yield from self._take(number, batch)

    def replay_ended(self) -> Iterator[None]:
        """Takes what came live meanwhile. Raises Broken."""
        if self.last < 0 and not self._waiting:
            self._whole = True  # a publisher that has told nothing has nothing
        yield from self._guarded(self._ended())

    def replay_failed(self) -> Iterator[None]:
        """Nobody answered: what is missing stays missing. Raises Broken."""
        self._asked = REPLAYS_MAX
        yield from self._guarded(self._ended())

    def _ended(self) -> Iterator[None]:
        self._replaying = False
        while self._waiting:
            number, payload = self._waiting[0]
            if number > self.last + 1 and self._asked < REPLAYS_MAX:
                self._behind = True
                self._ask(self.last + 1)
                return
            self._waiting.popleft()
            self._waiting_bytes -= len(payload)
            if number > self.last:
                batch = self._read(number, payload)
                self._look_for_hole(number, batch)
                yield from self._take(number, batch)
        if self._newest[0] > self.last:  # it was heard, and there was no room for it
            if self._asked < REPLAYS_MAX:
                self._behind = True
                self._ask(self.last + 1)
                return
            self._hole()
            self.last = self._newest[0]
        self._asked, self._behind = 0, False

    # ---- common ----------------------------------------------------------------------------------

    def _take(self, number: int, batch: Batch) -> Iterator[None]:
        first = self.last < 0 and number == 0
        self.last, self._last_at = number, batch.at
        self.counts.batches += 1
        if first:
            self._whole = True
        before = self._blocks.orphans
        for at, event in enumerate(batch.events(), start=1):
            if isinstance(event, Cleared):
                before = 0
                self._whole = True  # whatever was missed, it is gone
            yield from self._blocks.take(event)
            if at % EVENTS_AT_ONCE == 0:
                yield
        if self._blocks.orphans > before:
            self.counts.orphans += self._blocks.orphans - before
            if self._whole:
                self._hole()

    def _look_for_hole(self, number: int, batch: Batch) -> None:
        """A batch that begins with a clearing, as our runtime's snapshots do, needs none before."""
        if number > self.last + 1 and not batch.clears():
            self._hole()

    def _hole(self) -> None:
        """Something was missed for good."""
        self.counts.holes += 1
        self._whole = False
        self._blocks.demote(self._clock())

    def _start_over(self) -> None:
        """Reads from the beginning."""
        self._blocks.restart()
        self._waiting.clear()
        self._waiting_bytes = self._asked = 0
        self.last, self._newest, self._last_at = -1, (-1, 0.0), 0.0
        self._whole = False
        self._behind = self._replays
        if self._replays:
            self._ask(0)

    def _ask(self, start: int) -> None:
        self.wants = start
        self._replaying = True
        self._asked += 1

    def _read(self, number: int, payload: bytes) -> Batch:
        if number < 0:
            raise Junk(f"a batch's number is {number}")
        return read_batch(payload)

    def _guarded(self, work: Iterator[None]) -> Iterator[None]:
        """One batch that cannot be read is a hole; many in a row are not listened to."""
        try:
            yield from work
            self._junk = 0
        except Junk as junk:
            self.counts.junk += 1
            self._junk += 1
            self._hole()
            if self._junk >= JUNK_MAX:
                raise Broken(str(junk)) from None
        except TooManyBlocks as error:
            raise Broken(str(error)) from None
