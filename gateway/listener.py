"""The listening side: HTTP/1.1 connections with deadlines, and a server that drains.

uvicorn limits neither how long a request's headers may take and how large they may be, nor how long
a client may leave its answer unread; and its own errors are plain text.
"""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import time
from collections.abc import Callable
from http import HTTPStatus
from types import FrameType
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway import problems
from gateway.arrival import Arrivals, Coming, Reader, note_arrivals
from gateway.call import request_id
from gateway.edge import Live
from gateway.phases import SERVER_TIMING, whole_time
from gateway.sending import Sending, untaken_bytes
from policies.schema import Gateway
from runtime.wire import Problem

HEADERS_MAX_BYTES = 2**16
IDLE_CONNECTION_S = 60  # a kept-alive connection without a request is closed after this long
BACKLOG = 2048
OUTGOING = "headgate.outgoing"  # an extension of the scope: reply.Outgoing
COMING = "headgate.coming"  # another: arrival.Coming
REFUSED_LINGER_S = 0.5  # likewise for what comes behind a request that cannot be read
UNREAD_LOOKS = 4  # in gateway.idle_timeout_s, at whether a client that lags has taken anything
LINGER_S = 2.0  # the rest of a refused body is read away for so long before its connection closes


class ClientConnection(HttpToolsProtocol):
    """One client's connection. `settings` is bound by `bind`."""

    settings: Gateway
    arrivals: Arrivals

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_headers = False
        self._in_body = False
        self._header_bytes = 0  # of headers that are not complete, without the read that goes on
        self._read_bytes = 0  # in the read that goes on
        self._amid = False  # a request has begun, and is not all here
        self.arrived = 0.0
        self.wrote = 0.0  # when the last bytes so far of its latest answer went, monotonic seconds
        self._coming = Coming(0.0, 0.0)  # of the latest request
        self._deadline: asyncio.TimerHandle | None = None
        self._lingering: asyncio.TimerHandle | None = None
        self._refused = False  # answered below ASGI; whatever comes now is read away
        self._last: Problem | None = None  # likewise, to be told once all before it is answered
        self._unread: asyncio.TimerHandle | None = None
        self.lost = False
        self.go_on: Callable[[], None] | None = None  # of a stream that waits for its client
        self.attended: dict[Sending, Callable[[], None]] = {}  # what to call when the client goes

    # ---- headers in time ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
        super().connection_made(transport)
        if self.scheme == "http":  # of what is encrypted, it is not the requests that lie there
            transport.set_protocol(Reader(self, self.arrivals, transport))
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._disarm()
        if self._lingering is not None:
            self._lingering.cancel()
        self.resume_writing()
        super().connection_lost(exc)
        for outgoing, leave in list(self.attended.items()):
            if not outgoing.complete:
                leave()

    def data_received(self, data: bytes | memoryview) -> None:
        if self._refused:
            return
        self._read_bytes = len(data)
        if self._amid:
            self._coming.more(self.arrived, time.monotonic())
        self._unset_keepalive_if_required()
        try:  # as uvicorn does, which has a line in its log for each that is no HTTP
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            """A client that offers h2c is not worth a line in the log: it gets HTTP/1.1."""
        except httptools.HttpParserError:
            self._refuse(problems.malformed_http())
        if self._refused or self.transport.is_closing():
            self._disarm()
        elif self._in_headers:
            self._header_bytes += len(data)
            if self._header_bytes > HEADERS_MAX_BYTES:
                self._refuse(problems.headers_too_large(HEADERS_MAX_BYTES))
            else:
                self._arm()
        elif self._answering():
            self._disarm()
        else:  # the rest of a body that was refused, or nothing that begins a request
            self._arm()

    def on_message_begin(self) -> None:
        self._amid = self._in_headers = True
        self._header_bytes = 0
        read = time.monotonic()
        self._coming = Coming(max(min(self.arrived or read, read), self.wrote), read)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._header_bytes + self._read_bytes > HEADERS_MAX_BYTES:
            self._weigh_headers()
        self._in_headers = False
        super().on_headers_complete()
        outgoing = Sending(self, self.cycle)
        # None of ASGI's.
        extensions = {OUTGOING: outgoing, COMING: self._coming}
        self.cycle.scope["extensions"] = extensions  # type: ignore[typeddict-item]
        if self.parser.should_upgrade():
            # No upgrade is offered, and after such a request the parser reads nothing more.
            self.cycle.keep_alive = False
            self._amid = False
            self._coming.whole = True
        else:
            self._in_body = True
            self.cycle.transport = outgoing  # type: ignore[assignment]  # what a cycle uses of one

    def _weigh_headers(self) -> None:
        """What was read with them may be a body, or another request: they are counted for
        themselves. Raises what the parser then stops at."""
        size_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size_bytes > HEADERS_MAX_BYTES:
            problem = problems.headers_too_large(HEADERS_MAX_BYTES)
            self._refuse(problem)
            raise problem

    def on_message_complete(self) -> None:
        self._amid = self._in_body = False
        self._coming.whole = True
        super().on_message_complete()
        if self._lingering is not None:
            self.transport.close()

    def on_response_complete(self) -> None:
        """What its client has sent meanwhile (pipelining) begins now: it was no answer's turn."""
        if self.pipeline:
            following: Any = self.pipeline[-1][0].scope
            following["extensions"][COMING].no_sooner(self.wrote)
        elif self._amid:
            self._coming.no_sooner(self.wrote)
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last and self._last is not None:
            self._unset_keepalive_if_required()
            # Behind a head that waits for this turn's end.
            self.loop.call_soon(self._refuse_now, self._last)
            self._last = None

    def close_after(self, cycle: RequestResponseCycle) -> None:
        """Closes behind an answer, once its request is read or has had its time.

        Were it closed with a body still coming, the client would get a reset instead of the answer
        (RFC 9112, section 9.6).
        """
        if not (self._in_body and cycle is self.cycle and cycle.response_complete):
            self.transport.close()
        elif self._lingering is None:
            self._lingering = self.loop.call_later(LINGER_S, self.transport.close)

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _arm(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.settings.body_timeout_s, self._give_up)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self._answering():  # a pipelined request's headers wait behind an answer under way
            self._arm()
        elif self._in_headers:
            self._refuse(problems.headers_too_slow(self.settings.body_timeout_s))
        else:
            self.transport.close()

    # ---- errors below ASGI ----------------------------------------------------------------------

    def _refuse(self, problem: Problem) -> None:
        """Answers and closes, once what came before it is answered; inside the answer to the same
        request it only closes, for that would corrupt it."""
        if not self._refused and not self.transport.is_closing():
            if self._broken_body():
                self.cycle.disconnected = True  # what is at work on it may stop, and say nothing
                self.cycle.message_event.set()
                self._answer_last(plain_answer(problem, self._coming.began))
            elif not self._answering():
                self._refuse_now(problem)
            elif self._in_body and not self.pipeline:
                self.cycle.disconnected = True
                self.transport.close()
            else:
                if self._in_body:
                    self.pipeline.popleft()  # it has not been begun, and will not be
                self._refused = True
                self._last = problem
        self._disarm()

    def _refuse_now(self, problem: Problem) -> None:
        began = self._coming.began if self._amid else time.monotonic()
        self._answer_last(plain_answer(problem, began))

    def _answer_last(self, answer: bytes) -> None:
        """Says it, and closes once the client has heard it or had its time: a byte that comes at
        the same moment would make a reset of it."""
        self._refused = True
        if self.transport.is_closing():
            return
        self.transport.write(answer)
        self.transport.write_eof()
        if self._lingering is None:
            self._lingering = self.loop.call_later(REFUSED_LINGER_S, self.transport.close)

    def _broken_body(self) -> bool:
        """Whether what came last belongs to a request that nothing has been answered yet."""
        unanswered = self._answering() and not self.cycle.response_started
        return unanswered and self._in_body and not self.pipeline

    # ---- answers that nobody reads --------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._wait_for_reader(untaken_bytes(self.transport), UNREAD_LOOKS)

    def _wait_for_reader(self, left_bytes: int, looks: int) -> None:
        wait_s = self.settings.idle_timeout_s / UNREAD_LOOKS
        self._unread = self.loop.call_later(wait_s, self._look_at_reader, left_bytes, looks)

    def _look_at_reader(self, before_bytes: int, looks: int) -> None:
        """A client may take as long as it likes, while it takes something."""
        left_bytes = untaken_bytes(self.transport)
        looks = looks - 1 if left_bytes == before_bytes else UNREAD_LOOKS
        if looks:
            self._wait_for_reader(left_bytes, looks)
        else:
            self.transport.abort()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.go_on is not None:
            go_on, self.go_on = self.go_on, None
            go_on()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


def plain_answer(problem: Problem, began: float) -> bytes:
    """A problem as a complete HTTP/1.1 answer that ends its connection; `began`: the request."""
    body = problem.body()
    head = (
        f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\n"
        "content-type: application/json\r\n"
        f"x-request-id: {request_id(())}\r\n"
        f"{SERVER_TIMING.decode()}: {whole_time(began).decode()}\r\n"
        f"content-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body


def bind(settings: Gateway) -> type[ClientConnection]:
    """The connection class with this policy's deadlines, for one loop; uvicorn makes the
    instances."""
    bound = {"settings": settings, "arrivals": Arrivals()}
    return type("ClientConnection", (ClientConnection,), bound)


def adopt(config: uvicorn.Config, settings: Gateway) -> None:
    """Connections go by these settings from now on, those that stand too."""
    assert issubclass(config.http_protocol_class, ClientConnection), "`bind` made it"
    config.http_protocol_class.settings = settings


def configure(app: ASGIApp, settings: Gateway, *, host: str, port: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="auto",  # uvloop where there is one
        http=bind(settings),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_CONNECTION_S,
        timeout_graceful_shutdown=math.ceil(settings.drain_s),
    )


class Server(uvicorn.Server):
    """Drains on SIGTERM and SIGINT: nothing new, running streams get drain_s.

    A second SIGINT ends it at once.
    """

    def __init__(self, config: uvicorn.Config, live: Live) -> None:
        super().__init__(config)
        self._live = live

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            note_arrivals(server.sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  # uvicorn's
        """Without uvicorn's replay of the signal: a drained gateway exits with 0."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self._live.edge.pool.draining = True
        self.should_exit = True
