"""One request's answer on its client's connection, through ASGI or past it.

Knows when the client has taken it; knows nothing of what is sent.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from gateway.call import ClientGone
from gateway.reply import Headers
from gateway.trail import NEVER, Interval

if TYPE_CHECKING:
    from gateway.listener import ClientConnection


class Sending:
    """A connection's transport as one request's answer uses it, through ASGI or past it.

    The first write, which is the head, waits for what follows in the same turn of the loop: one
    packet and one call of the system instead of two.
    """

    __slots__ = (
        "_begun", "_connection", "_cycle", "_head", "_held", "_write", "is_closing", "lagged",
        "wrote",
    )  # fmt: skip

    def __init__(self, connection: ClientConnection, cycle: RequestResponseCycle) -> None:
        self._connection = connection
        self._cycle = cycle
        self._head = b""
        self._begun = False
        self._held = False  # a whole answer, which lies here while its client lags
        self.lagged = NEVER  # when it was waited for its client, at the end of the answer
        self.wrote: float | None = None  # when the last bytes so far went, monotonic seconds
        self._write = connection.transport.write
        self.is_closing = connection.transport.is_closing

    @property
    def asked(self) -> bool:
        return not self._cycle.more_body

    @property
    def complete(self) -> bool:
        return self._cycle.response_complete

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif not self._begun:
            self._begun = True
            self._head = data
            self._connection.loop.call_soon(self._flush)
            return
        # Before it: whoever waits for these bytes may be given the core at once.
        self.wrote = self._connection.wrote = time.monotonic()
        self._write(data)

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head and not self.is_closing():
            self._write(head)

    def close(self) -> None:
        self._flush()
        self._connection.close_after(self._cycle)

    def stream(self, chunk: bytes) -> bool:
        """A chunk of an answer whose headers went through ASGI; as uvicorn would write it."""
        if not self._cycle.disconnected and chunk:
            self.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        return not self._connection.flow.write_paused

    def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """A complete answer in one write, as uvicorn would write it in two. No header of it speaks
        of the connection."""
        cycle = self._cycle
        if cycle.disconnected:
            return
        lines = [name + b": " + value for name, value in (*cycle.default_headers, *headers)]
        if not cycle.keep_alive:
            lines.append(b"connection: close")
        text = b"\r\n".join(lines)
        if text.count(b"\n") != len(lines) - 1 or text.count(b"\r") != len(lines) - 1:
            raise RuntimeError("an answer's header has a line end")
        answer = STATUS_LINE[status] + text + b"\r\n\r\n" + body
        cycle.response_started = self._begun = True
        self.write(answer)
        if self._connection.flow.write_paused:
            self._held = True  # what its client has sent behind this request waits as well
        else:
            self._completed()

    def _completed(self) -> None:
        cycle = self._cycle
        self._held = False
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.close()
        cycle.on_response()

    @property
    def lags(self) -> bool:
        return self._held or self._connection.flow.write_paused

    async def sent(self) -> None:
        connection, transport = self._connection, self._connection.transport
        if not self.is_closing():
            transport.set_write_buffer_limits(0)  # it goes on once nothing is left
        self.lagged = Interval()
        try:
            with self.lagged:
                await connection.flow.drain()
        finally:
            if not self.is_closing():
                transport.set_write_buffer_limits()
        if connection.lost:
            self.wrote = None
            raise ClientGone
        self.wrote = connection.wrote = time.monotonic()
        if self._held:
            self._completed()

    def cut(self) -> None:
        self.wrote = None
        self._connection.transport.abort()

    def end(self) -> float | None:
        """Nobody waits for it any longer. When the last of a complete answer went."""
        if self._held and not self._cycle.disconnected:
            self._completed()
        return self.wrote if self.complete else None

    def when_writable(self, go_on: Callable[[], None]) -> None:
        self._connection.go_on = go_on

    def when_gone(self, leave: Callable[[], None] | None) -> bool:
        self._connection.attended.pop(self, None)
        if self._cycle.disconnected or self.is_closing():
            return False
        if leave is not None:
            self._connection.attended[self] = leave
        return True


def untaken_bytes(transport: asyncio.Transport) -> int:
    """What a client has not taken yet, here and in the kernel, whose buffer is megabytes: of what
    lies there it tells each acknowledgement (tcp(7), SIOCOUTQ), of its own room only a third."""
    waiting = transport.get_write_buffer_size()
    with suppress(OSError):  # a kernel that does not tell, or a socket that is closed
        told = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        waiting += struct.unpack("i", told)[0]
    return waiting
