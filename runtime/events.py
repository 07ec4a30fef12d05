"""Tells subscribers over ZMQ which blocks the pool can find: live, and again from any batch on.

Knows the pool's changes and sockets; the bytes are event_frames.py's. The engine's thread only
notes changes; a thread of its own encodes, sends and answers replays. Nothing that a subscriber
does, or does not do, holds the engine up: what one is too slow for it misses, sees the gap in the
numbers, and asks for it again.
"""

from __future__ import annotations

import logging
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence as Many
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq

from policies.schema import KvEvents
from runtime.event_frames import END_OF_REPLAY, sequence_number
from runtime.event_log import History, Outbox
from runtime.residence import Residence

if TYPE_CHECKING:
    from cache.tiers import Tiers
    from runtime.account import StepRecord
    from runtime.kv import BlockKey
    from runtime.sequence import Sequence

log = logging.getLogger(__name__)

_OWED_MAX = 100_000  # batches of replays that one client asked for and has not read
_OWED_POLL_MS = 20  # between looks whether a client took of its replay
_GOODBYE_MS = 200  # how long the last batches may take to leave


class EventsRefused(Exception):
    """A socket for block events cannot be opened: which, why, what to do."""


@dataclass(slots=True)
class EventCounts:
    """Of one publisher since its start."""

    batches: int = 0
    blocks: int = 0  # stored or removed
    overflows: int = 0  # times that a subscriber's queue became full, so that it missed batches
    replays: int = 0
    failures: int = 0


class BlockEvents:
    """Watches the pool and listens to the engine's steps; publishes each step's changes as a batch.

    Raises EventsRefused when its sockets cannot be opened. `close` sends what is left.
    """

    def __init__(
        self, settings: KvEvents, rank: int = 0, now: Callable[[], float] = time.time
    ) -> None:
        self.counts = EventCounts()
        self._now = now
        self._outbox = Outbox()
        self._below: Residence | None = None
        self._closing = False
        self._rank = rank
        self._topic = settings.topic.encode()
        self._history = History(rank, settings.buffer_steps)
        self._owed: dict[tuple[bytes, ...], deque[list[bytes]]] = {}  # rest of replays, by client
        self._context = zmq.Context()
        self._open(settings, rank)
        self._thread = threading.Thread(target=self._run, name="block-events", daemon=True)
        self._thread.start()

    def _open(self, settings: KvEvents, rank: int) -> None:
        self._publisher = self._context.socket(zmq.PUB)
        self._publisher.set_hwm(settings.hwm)
        self._replayer = self._context.socket(zmq.ROUTER)
        self._replayer.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a full or gone client is told to us
        self._bell = self._context.socket(zmq.PAIR)
        self._wake = self._context.socket(zmq.PAIR)
        self._bell.bind("inproc://wake")
        self._wake.connect("inproc://wake")
        try:
            self.endpoint = _bind(self._publisher, settings.endpoint, rank)
            self.replay_endpoint = None
            if settings.replay_endpoint is not None:
                self.replay_endpoint = _bind(self._replayer, settings.replay_endpoint, rank)
        except EventsRefused:
            self._context.destroy(linger=0)
            raise

    def follow(self, tiers: Tiers) -> None:
        """Tells what these tiers below the pool hold, too. To be called before there is work."""
        self._below = Residence(tiers)

    def facts(self) -> dict[str, Any]:
        """Where to subscribe and what was sent so far, for health answers."""
        return {
            "endpoint": self.endpoint,
            "replay_endpoint": self.replay_endpoint,
            "topic": self._topic.decode(),
            "rank": self._rank,
            **self.numbers(),
        }

    def numbers(self) -> dict[str, int]:
        """What was sent and what went wrong so far."""
        return asdict(self.counts) | {"merged_steps": self._outbox.merged_steps}

    # ---- the engine's thread: PoolWatcher and Listener -------------------------------------------

    def stored(self, keys: Many[BlockKey]) -> None:
        self._outbox.changes.store(keys)
        if self._below is not None:
            self._below.stored(keys)

    def evicting(self, blocks: Many[tuple[int, bytes]]) -> None:
        """Nothing to tell yet: the blocks can still be found."""

    def removed(self, hashes: Many[bytes]) -> None:
        self._outbox.changes.remove(hashes)
        if self._below is not None:
            self._below.removed(hashes)

    def cleared(self) -> None:
        self._outbox.changes.clear()
        if self._below is not None:
            self._below.cleared()
        self._flush()  # nobody may step for a long time

    def sampled(self, sequences: Many[Sequence], now: float) -> None:
        """Tokens are told once their block is full."""

    def guessed(self, guessed: int, accepted: int, said: int) -> None:
        """Only its blocks count here."""

    def stepped(self, record: StepRecord) -> None:  # noqa: ARG002 - only that it ended counts here
        self._flush()

    def ended(self, sequence: Sequence, reason: str, now: float) -> None:  # noqa: ARG002 - its blocks tell
        if reason == "error":  # the step is not told as one, and nobody may step for a long time
            self._flush()

    def _flush(self) -> None:
        if self._below is not None:
            self._below.tell(self._outbox.changes)
        if self._outbox.flush(self._now()):
            self._ring()

    def _ring(self) -> None:
        try:
            self._wake.send(b"", zmq.NOBLOCK)
        except zmq.Again:  # it has been told a thousand times already
            return

    def close(self) -> None:
        """Sends what is left and ends the thread. Only the engine's thread, or after its end."""
        self._outbox.flush(self._now(), at_once=True)
        self._closing = True
        self._ring()
        self._thread.join()
        self._context.destroy(linger=_GOODBYE_MS)

    # ---- its own thread --------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._bell, zmq.POLLIN)
        poller.register(self._replayer, zmq.POLLIN)
        while not self._closing:
            readable = dict(poller.poll(_OWED_POLL_MS if self._owed else None))
            try:
                self._drain(self._bell if self._bell in readable else None)
                if self._replayer in readable:
                    self._take_request(self._replayer.recv_multipart())
                for client in list(self._owed):
                    self._pay(client)
            except Exception:  # whatever went wrong, the next batch is told
                self.counts.failures += 1
                log.exception("block events: one batch or replay failed")
        self._drain(None)

    def _drain(self, bell: zmq.Socket[bytes] | None) -> None:
        """Publishes what the engine has noted."""
        while bell is not None and bell.poll(0):
            bell.recv(zmq.NOBLOCK)
        for changes, at in self._outbox.take():
            seq, payload = self._history.add(changes, at)
            self._publish([self._topic, sequence_number(seq), payload])
            self.counts.batches += 1
            self.counts.blocks += len(changes) - changes.cleared

    def _publish(self, frames: list[bytes]) -> None:
        """Never waits. A subscriber whose queue is full misses the batch."""
        try:
            self._publisher.setsockopt(zmq.XPUB_NODROP, 1)  # says so instead of dropping silently
            self._publisher.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            self.counts.overflows += 1
            self._publisher.setsockopt(zmq.XPUB_NODROP, 0)
            self._publisher.send_multipart(frames, zmq.NOBLOCK)

    def _take_request(self, request: list[bytes]) -> None:
        """Takes `[client, "", number]` of a REQ or DEALER socket, without the "" where it is."""
        *front, start = request
        client = tuple(front)
        if len(client) not in (1, 2) or any(client[1:]) or len(start) != len(END_OF_REPLAY):
            log.warning("block events: a replay request is not 8 bytes of a number; ignored")
            return
        owed = self._owed.setdefault(client, deque())
        if len(owed) > _OWED_MAX:
            log.warning("block events: a subscriber asks for more replays than it reads; ignored")
            return
        self.counts.replays += 1
        for seq, payload in self._history.since(int.from_bytes(start, "big")):
            owed.append([self._topic, sequence_number(seq), payload])
        owed.append([b"", END_OF_REPLAY, b""])

    def _pay(self, client: tuple[bytes, ...]) -> None:
        """Sends of a client's replay what it takes now; the rest has to wait for it, not we."""
        owed = self._owed[client]
        try:
            while owed:
                self._replayer.send_multipart([*client, *owed[0]], zmq.NOBLOCK)
                owed.popleft()
        except zmq.Again:
            return
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            log.info("block events: a subscriber left in the middle of its replay")
        del self._owed[client]


def _bind(socket: zmq.Socket[bytes], endpoint: str, rank: int) -> str:
    """The endpoint that was bound: worker `rank` takes the port that many above, as in vLLM."""
    mine = endpoint_of(endpoint, rank)
    try:
        socket.bind(mine)
    except zmq.ZMQError as error:
        raise EventsRefused(
            f"block events cannot be sent from {mine}: {error}; free it, or change "
            "runtime.kv_events in the policy"
        ) from None
    bound = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    if bound.startswith("ipc://"):
        _let_the_group_in(Path(bound.removeprefix("ipc://")))
    return bound


def _let_the_group_in(path: Path) -> None:
    """Only who may write to a socket can connect. In a folder that its group shares (setgid, as
    /run/headgate of the images) that is the group: who judges is not the user who serves.
    """
    if path.is_socket() and path.parent.stat().st_mode & stat.S_ISGID:
        path.chmod(0o660)


def endpoint_of(endpoint: str, rank: int) -> str:
    """The endpoint of worker `rank`; 0 as a port stays 0, which takes a free one."""
    head, _, port = endpoint.rpartition(":")
    if endpoint.startswith("tcp:"):
        return f"{head}:{int(port) + rank if int(port) else '*'}"
    return f"{endpoint}_dp{rank}" if rank else endpoint
