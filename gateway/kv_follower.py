"""One publisher of KV-cache events over ZMQ: its live batches, its replays, its comings and goings.

Knows sockets; what batches mean is kv_source.py's. All of it runs on the gateway's loop, in pieces,
with pauses as long as the pieces: a publisher that floods us takes half of what is idle, no more.
What a socket may hold is bounded, and what does not fit is a gap.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import parse_monitor_message

from cache.prefix_index import Mode
from gateway.kv_events import Where
from gateway.kv_frames import Junk, number_and_payload
from gateway.kv_source import Broken, Source

LIVE_BYTES_MAX = 2**22  # of one batch; a larger one ends the connection, and comes by replay
LIVE_QUEUED = 512
REPLAYED_BYTES_MAX = 2**26
REPLAYED_QUEUED = 64
AT_ONCE = 64  # messages between two looks at everything else
PIECE_S = 0.004  # of work, after which others have as much time
READ_AGAIN_MAX_S = 3600.0
AGAIN_S = 0.1  # until a lost connection is tried again, doubled while none lasts for STEADY_S
STEADY_S = 10.0
REST_S = 30.0  # of a publisher that cannot be followed
END = -1
NO_NUMBER = -2

log = logging.getLogger("headgate.gateway")


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds. `silence_s`: a replay that brings nothing for so long has failed; `catch_up_s`: so
    long after the last batch it is asked whether there was another; `read_again_s`: a degraded
    publisher is read from the beginning again, later and later."""

    silence_s: float = 10.0
    catch_up_s: float = 10.0
    read_again_s: float = 60.0


PATIENCE = Patience()


class Follower:
    """Keeps one source up to date, until it is cancelled. `changed` is called after each turn."""

    def __init__(
        self,
        source: Source,
        where: Where,
        context: zmq.Context[zmq.Socket[bytes]],
        changed: Callable[[], None],
        patience: Patience = PATIENCE,
    ) -> None:
        self.source = source
        self.where = where
        self.connected = False
        self._gone = False
        self.error: str | None = None
        self._context = context
        self._changed = changed
        self._bell = asyncio.Event()
        self._worked_s = 0.0
        self._replay_until = 0.0
        self._heard_at = 0.0
        self._read_again_at = 0.0
        self._patience = patience
        self._read_again_s = patience.read_again_s
        self._asker: zmq.Socket[bytes] | None = None

    def facts(self) -> dict[str, object]:
        """For health answers."""
        where = {"endpoint": self.where.endpoint, "connected": self.connected}
        return {**where, **self.source.facts(), "error": self.error}

    def doubt(self) -> None:
        """What the publisher does is not what it told."""
        if self.connected:
            self.source.doubt()
            self._bell.set()

    async def run(self) -> None:
        """Never returns; what goes wrong is noted and tried again later."""
        pause_s = AGAIN_S
        while True:
            began = _now()
            try:
                with contextlib.ExitStack() as stack:
                    await self._follow(stack)
                pause_s = AGAIN_S if _now() - began > STEADY_S else min(2 * pause_s, REST_S)
            except (Broken, zmq.ZMQError) as error:
                pause_s = REST_S
                self.error = str(error)
                log.warning("KV events of %s: %s; resting", self.where.endpoint, error)
            self.connected = False
            self.source.lost()
            self._changed()
            await asyncio.sleep(pause_s)

    # ---- one connection after another ------------------------------------------------------------

    async def _follow(self, stack: contextlib.ExitStack) -> None:
        """Until the connection is lost: ZMQ itself does not come back to a peer that broke the
        protocol, and what it still queues is of a life that is over."""
        self._gone = False
        live = _socket(self._context, zmq.SUB, LIVE_QUEUED, LIVE_BYTES_MAX)
        stack.enter_context(_readable(live, self._bell))
        live.setsockopt(zmq.RECONNECT_IVL_MAX, 5000)
        monitor = live.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        stack.enter_context(_readable(monitor, self._bell))
        stack.callback(self._close_asker)
        live.setsockopt(zmq.SUBSCRIBE, self.where.topic.encode())
        if self.where.bind:
            live.bind(self.where.endpoint)
        else:
            live.connect(self.where.endpoint)
        while True:
            busy = self._look_at_connection(monitor)
            if self._gone:
                return
            busy |= await self._hear(live)
            busy |= await self._take_replay()
            self._look_at_clock()
            self._changed()
            if not busy:
                await self._rest(live, monitor)

    def _look_at_connection(self, monitor: zmq.Socket[bytes]) -> bool:
        busy = False
        while monitor.poll(0):
            busy = True
            event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))["event"]
            self._close_asker()
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.connected, self.error = True, None
                self.source.connected()
                self._heard_at = _now()
            elif self.where.bind:  # it is for the peer to come back
                self.connected = False
                self.source.lost()
            else:
                self._gone = True
        return busy

    async def _hear(self, live: zmq.Socket[bytes]) -> bool:
        busy = False
        for frames in _messages(live, AT_ONCE):
            busy = True
            self._heard_at = _now()
            await self._work(self.source.live(*self._read(frames)))
        return busy

    def _read(self, frames: list[bytes]) -> tuple[int, bytes]:
        """A message without a number is as good as one that cannot be read."""
        try:
            return number_and_payload(frames)
        except Junk:
            return NO_NUMBER, b""

    async def _take_replay(self) -> bool:
        if self.source.wants is not None:
            self._ask(self.source.wants)
        asker = self._asker
        if asker is None:
            return False
        busy = False
        for frames in _messages(asker, AT_ONCE):
            busy = True
            self._replay_until = _now() + self._patience.silence_s
            number, payload = self._read(frames)
            if number == END and not payload:
                self._close_asker()
                await self._work(self.source.replay_ended())
                return True
            await self._work(self.source.replayed(number, payload))
        if not busy and _now() >= self._replay_until:
            self._close_asker()
            self.error = f"no replay from {self.where.replay_endpoint}"
            await self._work(self.source.replay_failed())
        return busy

    def _ask(self, start: int) -> None:
        """By a socket of its own, so that nothing of an earlier replay is taken for this one."""
        self._close_asker()
        self.source.began()
        endpoint = self.where.replay_endpoint
        assert endpoint is not None, "a replay is wanted of a publisher that has none"
        asker = _socket(self._context, zmq.DEALER, REPLAYED_QUEUED, REPLAYED_BYTES_MAX)
        self._asker = asker
        asker.connect(endpoint)
        asker.send_multipart([b"", start.to_bytes(8, "big")], zmq.NOBLOCK)
        asyncio.get_running_loop().add_reader(asker.fileno(), self._bell.set)
        self._replay_until = _now() + self._patience.silence_s

    def _close_asker(self) -> None:
        if self._asker is not None:
            asyncio.get_running_loop().remove_reader(self._asker.fileno())
            self._asker.close()
            self._asker = None

    def _look_at_clock(self) -> None:
        if not self.connected or self.where.replay_endpoint is None or self._asker is not None:
            return
        now = _now()
        if self.source.mode is not Mode.DEGRADED:
            self._read_again_at, self._read_again_s = 0.0, self._patience.read_again_s
        elif not self._read_again_at:
            self._read_again_at = now + self._read_again_s
        elif now >= self._read_again_at:
            self._read_again_at = 0.0
            self._read_again_s = min(2 * self._read_again_s, READ_AGAIN_MAX_S)
            self.source.read_again()
        if now - self._heard_at >= self._patience.catch_up_s:
            self._heard_at = now
            self.source.catch_up()

    async def _work(self, pieces: Iterator[None]) -> None:
        """Takes a batch piece by piece, and gives others as much time as it took."""
        while True:
            began = _now()
            done = next(pieces, self) is self
            self._worked_s += _now() - began
            if self._worked_s >= PIECE_S:
                pause_s, self._worked_s = self._worked_s, 0.0
                await asyncio.sleep(pause_s)
            if done:
                return

    async def _rest(self, *sockets: zmq.Socket[bytes]) -> None:
        """Until a socket has something, or the clock may."""
        self._bell.clear()
        asker = () if self._asker is None else (self._asker,)
        if any(one.poll(0) for one in (*sockets, *asker)):
            await asyncio.sleep(0)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(1.0, self._patience.silence_s)):
                await self._bell.wait()


def _socket(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, queued: int, bytes_max: int
) -> zmq.Socket[bytes]:
    """One that holds at most `queued` messages, none above `bytes_max`."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.RCVHWM, queued)
    socket.setsockopt(zmq.MAXMSGSIZE, bytes_max)
    return socket


@contextlib.contextmanager
def _readable(socket: zmq.Socket[bytes], bell: asyncio.Event) -> Iterator[zmq.Socket[bytes]]:
    """Rings while a socket may have something to read."""
    loop = asyncio.get_running_loop()
    loop.add_reader(socket.fileno(), bell.set)
    try:
        yield socket
    finally:
        loop.remove_reader(socket.fileno())
        socket.close()


def _messages(socket: zmq.Socket[bytes], most: int) -> Iterator[list[bytes]]:
    """What is there, without waiting."""
    for _ in range(most):
        try:
            yield socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return


def _now() -> float:
    return asyncio.get_running_loop().time()
