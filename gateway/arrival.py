"""When what a connection reads had come to its socket, by the kernel's own note of it.

A loop that is busy, or waits for a core, lets bytes lie in the socket's receive queue. Linux notes
when each packet came (SO_TIMESTAMPNS); elsewhere nothing is known but when it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import sys
import time
from collections.abc import Callable, Iterable
from struct import Struct
from typing import Any, Protocol

TIMESTAMPS = 35  # SO_TIMESTAMPNS, for which the socket module has no name
READ_BYTES = 2**18  # each read is taken out of them before the next
NOTES_BYTES = 64  # more than one time
CLOCK_SET_S = 0.001  # the wall clock moved against the monotonic one: somebody has set it
_PEEK = int(socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0))
_timespec = Struct("ll").unpack


class Connection(Protocol):
    """What reads are for: an asyncio.Protocol, but that it gets a view of bytes which is good for
    the call alone."""

    arrived: float  # when the first of the bytes that are being read came; 0: not known

    def data_received(self, data: memoryview, /) -> None: ...
    def eof_received(self) -> None: ...
    def connection_lost(self, exc: Exception | None, /) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


def moments(
    now: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
) -> Callable[[bytes], float]:
    """A function that tells in monotonic seconds what the kernel has noted, which is never later
    than now; 0 where it is not known, since the wall clock, by which the kernel notes, was set.

    Of what came before that and is read after, however many they are, nothing is known."""
    apart = min(wall() - now() for _ in range(3))
    known_since = -math.inf  # the clock was found to have been set

    def moment(note: bytes) -> float:
        nonlocal apart, known_since
        seconds, ns = _timespec(note)
        at = now()
        before, apart = apart, wall() - at
        if not -CLOCK_SET_S < apart - before < CLOCK_SET_S:
            at = now()  # or the core was lost between one clock and the other
            apart = wall() - at
            if not -CLOCK_SET_S < apart - before < CLOCK_SET_S:
                known_since = at
        noted = seconds - apart + 1e-9 * ns
        return noted if known_since <= noted <= at + CLOCK_SET_S else 0.0

    return moment


class Coming:
    """Of one request: when it began to come, and who waited for whom until it was read. Moments are
    monotonic seconds."""

    __slots__ = ("began", "read", "upload_s", "whole")

    def __init__(self, began: float, read: float) -> None:
        self.began = began  # its first byte came to its socket
        self.read = read  # what came last was read
        self.upload_s = 0.0  # so long its client was waited for, with all read that had come
        self.whole = False  # nothing of it is missing

    @property
    def due(self) -> float:
        """Since when an answer is due: the client's own time is not the gateway's."""
        return self.began + self.upload_s

    def more(self, arrived: float, now: float) -> None:
        """Another piece is read, which came then; 0 where nobody knows."""
        came = min(max(arrived, self.read), now) if arrived else now
        self.upload_s += came - self.read
        self.read = now

    def stopped(self) -> None:
        """Nobody waits for it any longer."""
        if not self.whole:
            self.more(0.0, time.monotonic())

    def no_sooner(self, moment: float) -> None:
        """Until then its client had another answer to get on this connection."""
        self.began = max(self.began, moment)
        self.read = max(self.read, moment)
        self.upload_s = min(self.upload_s, self.read - self.began)


class Arrivals:
    """Of all connections of one event loop: the clock, and the buffer into which they read."""

    def __init__(self) -> None:
        self.moment = moments()
        self.buffer = memoryview(bytearray(READ_BYTES))


class Borrowed(socket.socket):
    """A socket that its transport will close."""

    __slots__ = ()

    def __del__(self) -> None:
        self.detach()


class Reader(asyncio.BufferedProtocol):
    """Reads for a connection. Loops ask a buffered protocol for its buffer right before they read,
    which is when the kernel can still be asked for its only note. Every request pays for it: it is
    written for few calls."""

    def __init__(
        self, connection: Connection, arrivals: Arrivals, transport: asyncio.Transport
    ) -> None:
        self._connection = connection
        self._moment = arrivals.moment
        self._buffer = arrivals.buffer
        one = transport.get_extra_info("socket")
        self._sock = Borrowed(one.family, one.type, one.proto, one.fileno())
        self._look = self._sock.recvmsg

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  # the loop's wish
        try:
            notes = self._look(1, NOTES_BYTES, _PEEK)[1]
            self._connection.arrived = self._moment(notes[0][2]) if notes else 0.0
        except OSError:  # nothing is there, or nobody any more
            self._connection.arrived = 0.0
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._connection.data_received(self._buffer[:nbytes])

    def eof_received(self) -> None:
        self._connection.eof_received()

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._sock.detach()
        self._connection.connection_lost(exc)


def note_arrivals(listening: Iterable[Any]) -> None:
    """Of what these sockets accept from now on the kernel notes when it comes, where it does."""
    if sys.platform == "linux":
        for one in listening:
            with contextlib.suppress(OSError):  # a kernel that knows no such option
                one.setsockopt(socket.SOL_SOCKET, TIMESTAMPS, 1)
