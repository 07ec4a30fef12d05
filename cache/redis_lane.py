"""One connection to Redis on which commands follow each other without waiting for answers.

Knows words, answers and deadlines, not what the commands mean. Commands of one turn of the event
loop go out in one write. Its own protocol around hiredis's parser: through redis-py's client the
shortest call takes five times the processor's time.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import Any
from urllib.parse import unquote, urlsplit

import hiredis

from cache.store import StoreDown

CONNECT_S = 1.0  # TCP, TLS, AUTH and SELECT
BUSY_S = 0.005  # a timer that comes so late says that the event loop was held up
WAITING_MAX = 4096  # commands without an answer; more are refused at once

Word = bytes | str | int | float


class Refusal(Exception):
    """Redis's own error in answer to a command; the connection is well."""


class Lane:
    """Connects when it is first used, and again after an error."""

    def __init__(
        self,
        url: str,
        *,
        password: str | None = None,
        ca_file: str | None = None,
        timeout_s: float,
    ) -> None:
        """`redis://user@host:port/database`, `rediss://` for TLS. `timeout_s`: of one answer."""
        parts = urlsplit(url)
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or 6379
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "rediss":
            self._tls = ssl.create_default_context(cafile=ca_file)
        self._hello: list[tuple[Word, ...]] = []
        if password is not None:
            user = (unquote(parts.username),) if parts.username else ()
            self._hello.append(("AUTH", *user, password))
        if database := parts.path.removeprefix("/"):
            self._hello.append(("SELECT", database))
        self._timeout_s = timeout_s
        self._wire: _Wire | None = None
        self._connecting: asyncio.Task[_Wire] | None = None

    async def ask(self, *words: Word) -> Any:
        """The answer to one command. Raises Refusal where Redis refuses it, else StoreDown."""
        wire = self._wire
        if wire is None or wire.lost:
            wire = await self._connected()
        return await wire.ask(words, self._timeout_s)

    async def aclose(self) -> None:
        """Ends the connection; what waits fails."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        if self._wire is not None:
            self._wire.hang_up("the store is closed")

    async def _connected(self) -> _Wire:
        """All that ask meanwhile wait for the same connection."""
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(self._arrived)
        return await asyncio.shield(self._connecting)

    def _arrived(self, task: asyncio.Task[_Wire]) -> None:
        self._connecting = None
        if not task.cancelled() and task.exception() is None:
            self._wire = task.result()

    async def _connect(self) -> _Wire:
        loop = asyncio.get_running_loop()
        wire = _Wire(loop)
        try:
            async with asyncio.timeout(CONNECT_S):
                await loop.create_connection(lambda: wire, self._host, self._port, ssl=self._tls)
                for words in self._hello:
                    await wire.ask(words, CONNECT_S)
        except (OSError, TimeoutError) as error:
            wire.hang_up("given up")
            why = str(error) or f"no connection within {CONNECT_S:g} s"
            raise StoreDown(f"Redis: {self._host}:{self._port}: {why}") from None
        except Refusal as error:
            wire.hang_up("given up")
            raise StoreDown(f"Redis: {self._host}:{self._port}: {error}") from None
        return wire


class _Wire(asyncio.Protocol):
    """A connection while it lasts."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.lost = False
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader(replyError=Refusal)
        self._out: list[bytes] = []
        self._answers: deque[tuple[asyncio.Future[Any], float]] = deque()  # and when each is due
        self._timer: asyncio.TimerHandle | None = None

    async def ask(self, words: tuple[Word, ...], timeout_s: float) -> Any:
        if self.lost:
            raise StoreDown("Redis: the connection was lost")
        if len(self._answers) >= WAITING_MAX:
            raise StoreDown(f"Redis: {WAITING_MAX} commands wait for it already")
        answer: asyncio.Future[Any] = self._loop.create_future()
        due_at = self._loop.time() + timeout_s
        self._answers.append((answer, due_at))
        if not self._out:
            self._loop.call_soon(self._flush)
        # As text: hiredis would cut numbers to six digits.
        self._out.append(
            hiredis.pack_command(tuple(repr(w) if isinstance(w, float) else w for w in words))  # type: ignore[arg-type]  # it takes any number
        )
        if self._timer is None:
            self._timer = self._loop.call_at(due_at, self._look, due_at)
        return await answer

    def hang_up(self, why: str) -> None:
        """Ends it; whoever waits gets StoreDown."""
        self.lost = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort()
        while self._answers:
            answer, _ = self._answers.popleft()
            if not answer.done():
                answer.set_exception(StoreDown(f"Redis: {why}"))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a stream
        self._transport = transport
        if self.lost:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if not self._answers:
            self.hang_up("what answers speaks without being asked: no Redis")
            return
        self._reader.feed(data)
        try:
            while self._answers and (said := self._reader.gets()) is not False:
                # An answer whose caller has given up is read all the same.
                answer, _ = self._answers.popleft()
                if answer.done():
                    continue
                if isinstance(said, Refusal):
                    answer.set_exception(said)
                else:
                    answer.set_result(said)
        except hiredis.HiredisError as error:
            self.hang_up(f"it is no Redis that answers: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.hang_up(str(error) if error else "the connection was closed")

    def _flush(self) -> None:
        packed, self._out = self._out, []
        if self._transport is not None and not self.lost:
            self._transport.write(b"".join(packed))

    def _look(self, due_at: float) -> None:
        """When the oldest answer was due, as seen when the timer was set."""
        now = self._loop.time()
        self._timer = None
        if not self._answers:
            return
        oldest = self._answers[0][1]
        if oldest > now:
            self._timer = self._loop.call_at(oldest, self._look, oldest)
        elif now - due_at > BUSY_S:
            # This process was held up: the answer may lie there unread.
            again = now + BUSY_S
            self._timer = self._loop.call_at(again, self._look, again)
        else:
            self.hang_up("no answer in time")
