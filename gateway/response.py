"""A replica's answer as bytes: read, or handed on the moment they come. Knows no HTTP framing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

BUFFER_MAX_BYTES = 2**17  # a replica is not read further while so much of its body lies here


class Broken(Exception):
    """What was to go between us and a replica did not."""


class Stale(Broken):
    """A kept-alive connection turned out to be closed before any byte of an answer."""


class Failed(Broken):
    """The replica got the request, and no answer came of it."""


class Cut(Broken):
    """The connection ended, or said what is no HTTP, inside an answer."""


class Response:
    """Status, headers and a body that is read, or flows, as it comes.

    Once it is complete it holds what is unread, and its connection is gone on.
    """

    __slots__ = (
        "_failure", "_held", "_leave", "_loop", "_paused", "_pieces", "_sink", "_size_bytes",
        "_transport", "_waiter", "begun", "complete", "raw_headers", "status",
    )  # fmt: skip

    def __init__(
        self,
        transport: asyncio.Transport,
        leave: Callable[[], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._transport: asyncio.Transport | None = transport  # None: it is not ours any more
        self._leave = leave
        self._loop = loop
        self.begun: asyncio.Future[None] = loop.create_future()
        self.status = 0
        self.raw_headers: list[tuple[bytes, bytes]] = []  # names in lower case
        self.complete = False
        self._pieces: list[bytes] = []
        self._size_bytes = 0
        self._held = False  # by whoever takes the bytes
        self._paused = False  # so that nothing more is read
        self._failure: str | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Callable[[bytes], bool] | None = None

    @property
    def ends_with_connection(self) -> bool:
        """Whether nothing but the end of the connection tells where the body ends."""
        coding = b""
        for name, value in self.raw_headers:
            if name == b"content-length":
                return False
            if name == b"transfer-encoding":
                coding = value
        return not coding.rstrip().lower().endswith(b"chunked")

    def headers(self) -> dict[str, str]:
        """By their names in lower case; the first of those that come twice."""
        return {name.decode("latin-1"): value.decode("latin-1")
                for name, value in reversed(self.raw_headers)}  # fmt: skip

    # ---- whoever reads --------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether `readany` waits for nothing."""
        return self._transport is None or bool(self._pieces)

    async def readany(self) -> bytes:
        """All that has come, or the next that comes; b"" at the end. Raises Cut."""
        while not self._pieces:
            if self._failure is not None:
                raise Cut(self._failure)
            if self._transport is None:
                return b""
            await self._wait()
        return self._take()

    async def flow(self, sink: Callable[[bytes], bool]) -> None:
        """Gives each read's bytes to `sink` in the moment they come, until it has enough (True) or
        the body ends. `sink` must not raise. Raises Cut."""
        if self._pieces and sink(self._take()):
            return
        self._sink = sink
        try:
            while self._sink is not None and self._transport is not None:
                await self._wait()
            if self._sink is not None and self._failure is not None:
                raise Cut(self._failure)
        finally:
            self._sink = None

    def at_eof(self) -> bool:
        return self.complete and not self._pieces

    def pause(self) -> None:
        """Reads nothing more from the replica until `resume`."""
        self._held = True
        self._regulate()

    def resume(self) -> None:
        self._held = False
        self._regulate()

    def close(self) -> None:
        """Leaves the replica, which stops its work; nothing where the answer is complete."""
        if self._transport is not None:
            self._transport = None
            self._leave()

    def _take(self) -> bytes:
        pieces = self._pieces
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._size_bytes = 0
        if self._paused:
            self._regulate()
        return body

    def _regulate(self) -> None:
        """Reads on, or not, by who takes the bytes and how many lie here."""
        pause = self._held or self._size_bytes > BUFFER_MAX_BYTES
        if self._transport is not None and pause is not self._paused:
            self._paused = pause
            if pause:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---- its connection -------------------------------------------------------------------------

    def feed(self, body: bytes) -> None:
        if self._sink is not None:
            if self._sink(body):
                self._sink = None
                self._wake()
            return
        self._pieces.append(body)
        self._size_bytes += len(body)
        if self._size_bytes > BUFFER_MAX_BYTES:
            self._regulate()
        self._wake()

    def finish(self) -> None:
        """The body is complete."""
        if self._paused and self._transport is not None:
            self._transport.resume_reading()
        self._transport = None
        self.complete = True
        self._wake()

    def fail(self, reason: str) -> None:
        self._transport = None
        self._failure = reason
        self._wake()
