"""Streams at a reader's speed: what a replica says in a burst goes on event by event.

Knows where SSE events end, and which of them no reader waits through; not what they say. Only
streams of a tier that asks for it come through here.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

from starlette.types import Send

from gateway.relay import Silence
from gateway.reply import Outgoing, Reply

HELD_MAX_BYTES = 2**17  # a thousand chunks or so; with more the replica is held back
FIRST = 2  # events that are never held: the role, and the first token
EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
LONGEST_END = 4
ERROR = re.compile(rb'(?:^|[\r\n])data: ?\{\s*"error"')
END = re.compile(rb"data: ?\[DONE\]")
UNTIMED = re.compile(rb":|data: ?\[DONE\]")  # comments and the end go with what is before them


class Pace:
    """The events of one stream that are not due yet, and when they are."""

    __slots__ = ("_due", "_first", "_held", "_interval_s", "_rest", "failed", "over", "size_bytes")

    def __init__(self, per_s: float) -> None:
        self._interval_s = 1 / per_s
        self._due = 0.0
        self._first = FIRST
        self._held: deque[bytes] = deque()
        self._rest = b""  # of an event whose end has not come
        self.size_bytes = 0
        self.failed = False  # an error has come: nobody is to wait for it
        self.over = False  # so has an error or the terminator

    @property
    def holds(self) -> bool:
        """Whether a whole event waits for its time."""
        return bool(self._held)

    def add(self, piece: bytes, now: float) -> None:
        """Bytes as they came."""
        if not self._held:  # a pause earns no burst
            self._due = max(self._due, now)
        self.size_bytes += len(piece)
        window, begin = self._rest + piece, 0
        for end in EVENT_END.finditer(window, max(0, len(self._rest) - LONGEST_END + 1)):
            self._held.append(window[begin : end.end()])
            begin = end.end()
            self.failed = self.failed or ERROR.search(self._held[-1]) is not None
            self.over = self.over or self.failed or END.match(self._held[-1]) is not None
        self._rest = window[begin:]
        if len(self._rest) > HELD_MAX_BYTES:  # no event of a token; it may not grow for ever
            self._held.append(self._rest)
            self._rest = b""

    def ready(self, now: float) -> bytes:
        """What is due, to be passed on at once: whole events. All of it behind an error."""
        out = []
        while self._held:
            event = self._held[0]
            if not self.failed and not UNTIMED.match(event):
                if self._first:
                    self._first -= 1
                    self._due = now
                elif now < self._due:
                    break
                self._due += self._interval_s
            out.append(self._held.popleft())
        ready = b"".join(out)
        self.size_bytes -= len(ready)
        return ready

    def wait_s(self, now: float) -> float:
        """Until something is due."""
        return max(self._due - now, 0.0)

    def not_before(self, now: float) -> None:
        """For a reader that was away: what it missed does not come at once."""
        self._due = max(self._due, now)

    def rest(self) -> bytes:
        """Everything, due or not, the piece of an event too."""
        rest = b"".join((*self._held, self._rest))
        self._held.clear()
        self._rest = b""
        self.size_bytes = 0
        return rest


class Paced:
    """Sits on the ways out of an answer and lets events through when they are due."""

    def __init__(
        self,
        send: Send,
        outgoing: Outgoing | None,
        pace: Pace,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        assert outgoing is not None, "only a stream is paced"
        self._send = send
        self._outgoing = outgoing
        self._pace = pace
        self._loop = loop
        self._writable = True
        self._timer: asyncio.Handle | None = None
        self._go_on: Callable[[], None] | None = None  # of the replica, once there is room
        self._out: asyncio.Future[None] | None = None  # of the end, which waits for the rest
        self._last: MutableMapping[str, Any] | None = None

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """ASGI's way: heads, keep-alive comments and the end, which comes behind what is held."""
        if message["type"] == "http.response.body" and self._pace.size_bytes:
            if not message.get("more_body", False):
                self._last = message
            return  # a comment says that there is life; what is held is about to say it
        await self._send(message)

    @property
    def asked(self) -> bool:
        return self._outgoing.asked

    def stream(self, chunk: bytes) -> bool:
        """False when so much is held, or the client so slow, that the replica has to wait."""
        self._pace.add(chunk, self._loop.time())
        if self._writable and (self._timer is None or self._pace.failed):
            self._pass_on()
        full = self._pace.size_bytes > HELD_MAX_BYTES
        return self._pace.over or (self._writable and not full)

    def when_writable(self, go_on: Callable[[], None]) -> None:
        self._go_on = go_on

    def when_gone(self, leave: Callable[[], None] | None) -> bool:
        return self._outgoing.when_gone(leave)

    async def drained(self) -> None:
        """Waits until everything that is held was due. Cancelled, `end` still has the rest."""
        self._go_on = None
        if self._pace.holds:
            self._out = self._loop.create_future()
            await self._out

    async def end(self) -> None:
        """Passes on what is left, at once, and the end where it has come."""
        if self._timer is not None:
            self._timer.cancel()
        self._go_on = None
        if rest := self._pace.rest():
            self._outgoing.stream(rest)
        if self._last is not None:
            await self._send(self._last)

    def _pass_on(self) -> None:
        now = self._loop.time()
        ready = self._pace.ready(now)
        if ready and not self._outgoing.stream(ready):
            self._writable = False
            self._outgoing.when_writable(self._caught_up)
        elif self._pace.holds:
            self._timer = self._loop.call_later(self._pace.wait_s(now), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._pass_on()
        if not self._pace.holds and self._out is not None and not self._out.done():
            self._out.set_result(None)
        room = self._writable and self._pace.size_bytes <= HELD_MAX_BYTES // 2
        if room and self._go_on is not None:
            go_on, self._go_on = self._go_on, None
            go_on()

    def _caught_up(self) -> None:
        """In a turn of its own: this is also called for a client that is just going."""
        self._writable = True
        self._pace.not_before(self._loop.time())
        self._timer = self._loop.call_soon(self._tick)


def paced(reply: Reply, per_s: float | None, silence: Silence) -> AbstractAsyncContextManager[None]:
    """Inside, what `reply` streams is held to so many events a second; leaving waits for the rest.
    The replica's place is best left inside: it has said everything by then."""
    return UNPACED if per_s is None else _paced(reply, per_s, silence)


UNPACED = nullcontext()


@asynccontextmanager
async def _paced(reply: Reply, per_s: float, silence: Silence) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    pace = Pace(per_s)
    way = reply.through(lambda send, outgoing: Paced(send, outgoing, pace, loop))
    try:
        yield
        silence.over()
        await way.drained()
    finally:
        await way.end()
