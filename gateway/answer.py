"""A replica's answer from its headers on: judged by its beginning, then read to its end or left.

Knows how bytes are read from a replica; knows neither the client nor what follows from a failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import TypeVar

from gateway.replica import Replica
from gateway.response import Cut, Response
from gateway.retries import Meaning, error_in_band, meaning
from gateway.routing import Booking
from gateway.trail import Hop
from runtime.wire import Problem
from telemetry.phases import TIMING, Phases, cut, of_header

ERROR_MAX_BYTES = 2**16  # of an error's body that are read before it is judged
ERROR_END_S = 0.5  # within which a stream that began with an error may end
T = TypeVar("T")

NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Attempt:
    """One request sent to one replica: its place there, and what its end says of the replica."""

    __slots__ = ("_clock", "began", "booking", "ended", "hop", "replica", "trial")

    def __init__(
        self,
        replica: Replica,
        clock: asyncio.AbstractEventLoop,
        booking: Booking,
        hop: Hop | None = None,
    ) -> None:
        self._clock = clock
        self.hop = hop
        self.booking = booking
        self.replica = replica
        self.began = clock.time()
        self.ended = False
        self.trial = replica.circuit.begin(self.began)
        replica.in_flight += 1

    def answered(self, told: Phases | None = None, head: bytes = b"", *, first: bool) -> None:
        """The answer has begun: a trial has succeeded, however long it goes on. `told`: by the
        replica, of its time so far; `head`: the first of its bytes, where some have come; `first`:
        these are of a stream's first token."""
        now = self._clock.time()
        if self.hop is not None:
            self.hop.answered(told, head)
        if first:
            self.replica.saw_ttft(now - self.began)
        if self.trial:
            self.replica.circuit.succeeded(now, trial=True)
            self.trial = False

    def end(self, well: bool | None) -> None:
        """Gives the place back, once. `well` is None for an end that says nothing of the replica:
        the client left, or another replica was quicker."""
        if self.ended:
            return
        self.ended = True
        if self.hop is not None:
            self.hop.end(failed=well is False)
        self.booking.end()
        self.replica.in_flight -= 1
        circuit, now = self.replica.circuit, self._clock.time()
        if well is None:
            circuit.ended(now, trial=self.trial)
        elif well:
            circuit.succeeded(now, trial=self.trial)
        else:
            circuit.failed(now, trial=self.trial)


class Answer:
    """Status and headers, and a body of which the beginning has been read already."""

    resumes = 0  # it is of one replica
    told_tokens: int | None = None  # of its stream: nobody has counted
    told_guesses: tuple[int, int] | None = None

    __slots__ = ("_ended", "_interrupted", "_read", "_response", "_task", "attempt", "headers",
                 "meaning", "raw_headers", "refused", "status", "told")  # fmt: skip

    def __init__(self, response: Response, attempt: Attempt) -> None:
        self.attempt = attempt
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers()
        self.raw_headers = response.raw_headers
        self.meaning = Meaning.ANSWER
        self.refused = self.status != 200  # or by a stream's first event: nothing was computed
        self._response = response
        self._read: list[bytes] = []  # ahead of whoever reads
        self._ended = False  # all that will ever come is in there
        self._task: asyncio.Task[object] | None = None  # that waits for bytes
        self._interrupted: Problem | None = None
        self.told: Phases | None = None  # by a worker of ours, of its time so far

    @property
    def head(self) -> bytes:
        """What has been read and not been given on yet."""
        return self._read[0] if self._read else b""

    @property
    def is_stream(self) -> bool:
        kind = self.headers.get("content-type", "text/event-stream")
        return kind.lower().startswith("text/event-stream")

    @property
    def encoding(self) -> str:
        return self.headers.get("content-encoding", "identity").lower()

    async def look(self, *, stream: bool) -> None:
        """Reads as much as shows what the answer is worth: of a stream its first event, of an error
        its body. Raises Cut for one that ends before."""
        if self.status == 200 and stream and self.is_stream and self.encoding == "identity":
            if error := error_in_band(await self._first_event()):
                self.refused = True
                self.meaning = meaning(error[0], NO_HEADERS, error[1])
                with suppress(TimeoutError):
                    async with asyncio.timeout(ERROR_END_S):
                        await self._collect()
        elif self.status >= 400:
            await self._collect()
            self.meaning = meaning(self.status, self.headers, b"".join(self._read))
            self.told = of_header(self.headers.get("server-timing", ""))
        elif timing := self.headers.get("server-timing"):
            self.told = of_header(timing)

    async def _first_event(self) -> bytes:
        """A comment is no event: servers send some while they do something else."""
        while piece := await self._next():
            piece, told = cut(piece) if piece.startswith(TIMING) else (piece, None)
            self.told = told or self.told
            self._read.append(piece)
            begun = piece.lstrip()
            if (begun and not begun.startswith(b":")) or b"\ndata:" in piece:
                return begun
        raise Cut("it ended before its first event")

    async def _collect(self) -> None:
        size_bytes = 0
        while size_bytes < ERROR_MAX_BYTES:
            piece = await self._next()
            if not piece:
                self._ended = True
                break
            self._read.append(piece)
            size_bytes += len(piece)

    async def readany(self) -> bytes:
        """The next bytes, b"" at the end. Raises Cut, and the Problem of `interrupt`."""
        if self._read:
            return self._read.pop(0)
        if self._ended:
            return b""
        return await (self._response.readany() if self._response.ready else self._next())

    async def flow(self, sink: Callable[[bytes], bool]) -> None:
        """Gives what comes to `sink` in the moment it comes, until it has enough (True) or the end.
        Raises Cut, and the Problem of `interrupt`."""
        while self._read:
            if sink(self._read.pop(0)):
                return
        if not self._ended:
            await self._interruptible(self._response.flow(sink))

    def pause(self) -> None:
        """Holds the replica back: nothing more is read until `resume`."""
        self._response.pause()

    def resume(self) -> None:
        self._response.resume()

    def interrupt(self, problem: Problem) -> None:
        """Makes the read that waits raise this problem."""
        if self._task is not None and self._interrupted is None:
            self._interrupted = problem
            self._task.cancel()

    def at_eof(self) -> bool:
        return not self._read and (self._ended or self._response.at_eof())

    def close(self, *, well: bool | None) -> None:
        """Leaves the replica, which stops its work; `well` as in `Attempt.end`."""
        self.drop()
        self.attempt.end(well)

    def drop(self) -> None:
        """Closes the connection, unless it can serve again; the place is given back elsewhere."""
        self._ended = True
        self._response.close()

    def leave(self) -> None:
        """Closes an error that another attempt follows; what was read of it can still be given."""
        self.close(well=self.well)

    @property
    def well(self) -> bool | None:
        """What the answer says of the replica, if it was read to its end."""
        if self.meaning is Meaning.BUSY:
            return None
        return self.meaning is Meaning.ANSWER

    async def _next(self) -> bytes:
        return await self._interruptible(self._response.readany())

    async def _interruptible(self, wait: Awaitable[T]) -> T:
        self._task = asyncio.current_task()
        try:
            return await wait
        except asyncio.CancelledError:
            problem = self._interrupted
            assert self._task is not None
            if problem is None or self._task.uncancel() > 0:
                raise
            raise problem from None
        finally:
            self._task = None
