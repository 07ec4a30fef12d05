"""What one client has been sent so far, and what may follow. Knows SSE's lines, not its JSON."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from starlette.types import Send

from gateway.phases import SERVER_TIMING, server_timing
from gateway.pulse import Pulse
from runtime.wire import DONE, KEEP_ALIVE, Problem, event
from telemetry.phases import cut

if TYPE_CHECKING:
    from gateway.trail import Trail

# At the start of a line only: inside a JSON string a line end is escaped, so text cannot fake it.
TERMINATOR = re.compile(rb"[\r\n]data: ?\[DONE\]")
RECENT_CHUNKS = 3  # the usage event, the terminator, and a piece that was cut
RECENT_BYTES = 4096  # of a whole body, whose usage stands near its end
TAIL_BYTES = 16  # more than the terminator with its line end
EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")

STREAM_HEADERS = {b"cache-control": b"no-cache", b"x-accel-buffering": b"no"}

Headers = list[tuple[bytes, bytes]]


Direct = Callable[[int, Headers, bytes], None]  # sends status, headers and the whole body


class Outgoing(Protocol):
    """The client's connection as a stream's bytes go to it, past ASGI's message for each."""

    @property
    def asked(self) -> bool:
        """Whether the whole request has come."""

    def stream(self, chunk: bytes) -> bool:
        """Sends a piece of a body that has begun; False when the client lags behind."""

    def when_writable(self, go_on: Callable[[], None]) -> None:
        """Calls this once when the client has caught up, or gone."""

    def when_gone(self, leave: Callable[[], None] | None) -> bool:
        """Calls this when the client goes before its answer is complete, None: nothing any more.
        False when it has gone already."""


class Client(Outgoing, Protocol):
    """The connection itself, which knows what lies there because its client lags."""

    @property
    def lags(self) -> bool:
        """Whether something does."""

    async def sent(self) -> None:
        """Until nothing does. Raises ClientGone where the client goes before."""

    def cut(self) -> None:
        """Ends the connection, and what lies there with it."""


class Way(Outgoing, Protocol):
    """Both ways out of an answer, ASGI's and the stream's, for what sits on them."""

    async def __call__(self, message: MutableMapping[str, Any]) -> None: ...


W = TypeVar("W", bound=Way)


class Reply:
    """One answer. `started`: headers are out; `streaming`: as SSE; `terminated`: after `[DONE]`.

    `more`: headers of the gateway's own, sent with whatever the answer is. `status`: 0 while none
    is out. Only with `outgoing` can it be a stream."""

    __slots__ = (
        "_kept", "_most_bytes", "_note", "_outgoing", "_recent", "_send", "_tail", "complete",
        "direct", "more", "pulse", "request_id", "started", "status", "streaming",
        "terminated", "trail",
    )  # fmt: skip

    def __init__(self, send: Send, request_id: str, outgoing: Outgoing | None = None) -> None:
        self._send = send
        self._outgoing = outgoing
        self._tail = b"\n\n"
        self.request_id = request_id
        self.more: Headers = []
        self.status = 0
        self._recent: deque[bytes] = deque(maxlen=RECENT_CHUNKS)
        self._note: Callable[[bytes], object] = self._recent.append
        self._kept: BytesIO | None = None
        self._most_bytes = 0
        self.pulse = Pulse()
        self.direct: Direct | None = None  # past ASGI, while nothing sits on the ways out
        self.trail: Trail | None = None  # of a request for a completion
        self.started = False
        self.streaming = False
        self.terminated = False
        self.complete = False

    # ---- what an answer was ---------------------------------------------------------------------

    def keep(self, most_bytes: int) -> None:
        """From now on all of the answer is kept, and not its end alone, if it is so large at most.

        A piece costs what it cost before: somebody has to ask for what is `kept` now and then."""
        self._kept = BytesIO()
        self._most_bytes = most_bytes
        self._note = self._kept.write

    @property
    def keeps(self) -> bool:
        """Whether all of the answer is being kept."""
        return self._kept is not None

    def kept(self) -> BytesIO | None:
        """What came of the answer so far; None, for good, where it was too large."""
        if self._kept is not None and self._kept.tell() > self._most_bytes:
            self._recent.extend(self.recent)
            self._note, self._kept = self._recent.append, None
        return self._kept

    @property
    def recent(self) -> Sequence[bytes]:
        """The answer's last bytes, in which it says what it took."""
        if self._kept is None:
            return self._recent
        return (bytes(self._kept.getbuffer()[-RECENT_BYTES:]),)

    def through(self, make: Callable[[Send, Outgoing | None], W]) -> W:
        """From now on everything goes through what is made of the ways out."""
        self._send = self._outgoing = way = make(self._send, self._outgoing)
        self.direct = None
        return way

    # ---- whole answers --------------------------------------------------------------------------

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Status, headers and the complete body."""
        if self._kept is not None and len(body) <= self._most_bytes:
            self._kept.write(body)
        else:
            self._kept = None
            self._recent.append(body[-RECENT_BYTES:])
        if self.trail is not None:
            self.trail.whole(body)
        headers = [*headers, (b"content-length", b"%d" % len(body))]
        if self.direct is None:
            await self._start(status, headers)
            await self._finish(body)
        else:
            self.complete = True
            self.direct(status, self._begun(status, headers), body)

    async def in_pieces(self, status: int, headers: Headers, pieces: Sequence[bytes]) -> None:
        """The same for a body of which a slow client gets a piece at a time."""
        size = b"%d" % sum(map(len, pieces))
        await self._start(status, [*headers, (b"content-length", size)])
        for piece in pieces:
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        await self._finish(b"")

    async def fail(self, problem: Problem) -> None:
        """The problem as this answer's status and body, or in band once a stream has begun."""
        if self.streaming:
            await self.fail_in_band(problem.payload())
        elif not self.started:
            self.direct = None  # it may end the connection
            headers = [(name.encode(), value.encode()) for name, value in problem.headers.items()]
            headers.append((b"content-type", b"application/json"))
            await self.whole(problem.status, headers, problem.body())

    # ---- streams --------------------------------------------------------------------------------

    async def begin_stream(self, headers: Headers) -> None:
        """200 and SSE headers; nothing when they are out already."""
        if self.started:
            return
        self.streaming = True
        headers = [entry for entry in headers if entry[0] not in STREAM_HEADERS]
        if not any(name == b"content-type" for name, _ in headers):
            headers.append((b"content-type", b"text/event-stream; charset=utf-8"))
        await self._start(200, [*headers, *STREAM_HEADERS.items()])

    def write(self, chunk: bytes) -> bool:
        """A replica's bytes as they came; False when the client reads too slowly."""
        window = self._tail + chunk
        self._tail = window[-TAIL_BYTES:]
        if not self.terminated and b"[DONE]" in window and TERMINATOR.search(window):
            self.terminated = True
            chunk = self._replica_ended(chunk)
        self._note(chunk)
        assert self._outgoing is not None, "a stream was begun without an outgoing connection"
        return self._outgoing.stream(chunk)

    def _replica_ended(self, chunk: bytes) -> bytes:
        """The last piece without what the replica told us alone."""
        if self.trail is None:
            return chunk
        chunk, told = cut(chunk)
        self.trail.said(told)
        return chunk

    def when_writable(self, go_on: Callable[[], None]) -> None:
        assert self._outgoing is not None
        self._outgoing.when_writable(go_on)

    async def comment(self) -> None:
        """A keep-alive comment, unless it would fall into the middle of an event."""
        if self.complete or self.terminated or not self._between_events():
            return
        await self.begin_stream([])
        if self.streaming and not self.complete:
            message = {"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True}
            await self._send(message)

    async def end_stream(self) -> None:
        """Ends a terminated stream; a last event that lacks its blank line gets it."""
        await self._finish(self._gap())

    async def fail_in_band(self, payload: Mapping[str, Any]) -> None:
        """An error event and the terminator; a half-sent line is closed first."""
        if self.complete:
            return
        if self.terminated:
            await self.end_stream()
            return
        await self._finish(self._gap() + event(payload) + DONE)

    def _gap(self) -> bytes:
        """What the last event lacks of its blank line."""
        if self._between_events():
            return b""
        return b"\n" if self._tail.endswith(b"\n") else b"\n\n"

    def _between_events(self) -> bool:
        return self._tail.endswith(EVENT_ENDS)

    # ---- ASGI -----------------------------------------------------------------------------------

    async def _start(self, status: int, headers: Headers) -> None:
        headers = self._begun(status, headers)
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    def _begun(self, status: int, headers: Headers) -> Headers:
        """The head is about to go, with these and our own."""
        self.started = True
        self.status = status
        headers += (*self.more, (b"x-request-id", self.request_id.encode()))
        if self.trail is not None:
            headers.append((SERVER_TIMING, server_timing(self.trail)))
        return headers

    async def _finish(self, body: bytes) -> None:
        self.complete = True
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
