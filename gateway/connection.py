"""One HTTP/1.1 connection to a replica, and the answers that come over it, one after the other.

Knows framing and its limits (RFC 9112); knows neither the pool that it lies in nor what an answer
means.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from functools import cached_property
from typing import cast

import httptools

from gateway.response import Failed, Response, Stale

FRAMING_MAX_BYTES = 2**16  # of headers, trailers or chunk sizes without a byte of the body
INFORMATIONAL_MAX = 16  # 1xx answers before the final one
STATUS_MAX = 599
PIECE_BYTES = 2**18  # of a request's body, written between two looks at whether it is still wanted
RACE_S = 1.0  # a server that closes an idle connection does so within a round trip of our request


class Connection(asyncio.Protocol):
    """Carries one request after the other.

    `released` is called when it is free for the next one, `lost` when it is gone.
    """

    def __init__(
        self, released: Callable[[Connection], None], lost: Callable[[Connection], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._released = released
        self._lost = lost
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []  # of the body, in the bytes that are just being parsed
        self._response: Response | None = None
        self._blocked: asyncio.Future[None] | None = None  # until written bytes have gone out
        self.transport: asyncio.Transport | None = None
        self.requests = 0
        self.idle_since = 0.0
        self._reset()

    def _reset(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._informational = 0
        self._framing_bytes = 0
        self._began = False  # the final answer's headers are there
        self._done = False  # and its last byte
        self._excess = False  # something came behind it
        self._heard = False  # any byte
        self._sent = False  # the whole request
        self._keeps_alive = False
        self._problem: str | None = None

    # ---- one request ----------------------------------------------------------------------------

    async def ask(self, head: bytes, body: bytes) -> Response:
        """Sends a request and waits for the headers of its answer. Raises Stale and Failed.

        Whatever it raises, the connection is closed then.
        """
        self._reset()
        self.requests += 1
        self._asked_at = self._loop.time()
        assert self.transport is not None, "a connection is used before it is made"
        response = self._response = Response(self.transport, self.abort, self._loop)
        try:
            await self._write(head, body, response.begun)
            await response.begun
        except BaseException:
            self.abort()
            raise
        return response

    async def _write(self, head: bytes, body: bytes, begun: asyncio.Future[None]) -> None:
        """Stops where an answer comes, or the connection goes, before all is written."""
        assert self.transport is not None
        if self.transport.is_closing():
            raise Failed("the connection was closed as soon as it was made")
        if len(body) <= PIECE_BYTES:
            self.transport.write(head + body)
            self._sent = True
            return
        self.transport.write(head)
        view = memoryview(body)
        for at in range(0, len(body), PIECE_BYTES):
            if begun.done():
                return
            self.transport.write(view[at : at + PIECE_BYTES])
            if self._blocked is not None:
                await asyncio.wait((self._blocked, begun), return_when=asyncio.FIRST_COMPLETED)
        self._sent = True

    @cached_property
    def _poll(self) -> select.poll:
        assert self.transport is not None
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return poll

    def is_quiet(self) -> bool:
        """Whether the connection is open with nothing to read: neither its end nor excess bytes.

        Asks the kernel, for the loop may not have come to what arrived since.
        """
        assert self.transport is not None
        return not self.transport.is_closing() and not self._poll.poll(0)

    def abort(self) -> None:
        """Closes at once. What is under way is given up: nobody waits for it any more."""
        self._response = None
        if self.transport is not None:
            self.transport.abort()

    # ---- what the transport says ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def pause_writing(self) -> None:
        self._blocked = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._blocked is not None and not self._blocked.done():
            self._blocked.set_result(None)
        self._blocked = None

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:  # nothing was asked
            self.abort()
            return
        self._heard = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._problem = "it changed the protocol"
        except httptools.HttpParserError as error:
            self._problem = f"it is no HTTP/1.1: {error}"
        pieces = self._pieces
        if pieces:
            self._framing_bytes = 0
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            response.feed(body)
        else:
            self._framing_bytes += len(data)
            if self._framing_bytes > FRAMING_MAX_BYTES and self._problem is None:
                self._problem = f"more than {FRAMING_MAX_BYTES} bytes of headers or framing"
        if self._began and not response.begun.done():
            response.begun.set_result(None)
        if self._done:
            self._finish(response)
        elif self._problem is not None:
            self._lose(response, self._problem)
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.resume_writing()
        self._lost(self)
        response = self._response
        if response is None:
            return
        self._response = None
        if self._began and response.ends_with_connection and exc is None:
            response.finish()
        else:
            self._lose(response, str(exc or "the connection was closed"))

    def _finish(self, response: Response) -> None:
        """The answer is complete: the connection is free, or closed where it cannot serve again."""
        assert self.transport is not None
        self._response = None
        clean = self._keeps_alive and self._sent and not self._excess and self._problem is None
        response.finish()
        if clean and not self.transport.is_closing():
            self._released(self)
        else:
            self.transport.abort()

    def _lose(self, response: Response, reason: str) -> None:
        if response.begun.done():
            response.fail(reason)
            return
        raced = self._loop.time() - self._asked_at < RACE_S
        stale = self.requests > 1 and not self._heard and raced
        response.begun.set_exception(Stale(reason) if stale else Failed(reason))

    # ---- what the parser says; it must not be raised at -----------------------------------------

    def on_message_begin(self) -> None:
        self._excess = self._excess or self._done

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._began:  # trailers are nobody's
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._began:
            return
        response, status = self._response, self._parser.get_status_code()
        assert response is not None
        if self._parser.get_http_version() not in ("1.1", "1.0"):
            self._problem = "it is no HTTP/1.1"
        elif status > STATUS_MAX:  # by RFC 9110, section 15, none
            self._problem = f"its status is {status}, where at most {STATUS_MAX} can be"
        elif status < 200:
            self._informational += 1
            self._headers.clear()
            if self._informational > INFORMATIONAL_MAX:
                self._problem = f"more than {INFORMATIONAL_MAX} informational answers"
        else:
            self._began = True
            self._keeps_alive = self._parser.should_keep_alive()
            response.status, response.raw_headers = status, self._headers

    def on_body(self, piece: bytes) -> None:
        if not self._done:
            self._pieces.append(piece)

    def on_message_complete(self) -> None:
        self._done = self._began
