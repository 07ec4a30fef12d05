"""Who sits on the ways out of one answer and looks at what goes by, and one who copies it."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.types import Message, Send

from gateway.reply import Headers, Outgoing


class Onlooker:
    """Lets everything by: ASGI's messages, and pieces of a stream past them."""

    def __init__(self, send: Send, outgoing: Outgoing | None) -> None:
        self._send = send
        self._outgoing = outgoing

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        await self._send(message)

    @property
    def asked(self) -> bool:
        assert self._outgoing is not None
        return self._outgoing.asked

    def stream(self, chunk: bytes) -> bool:
        assert self._outgoing is not None
        return self._outgoing.stream(chunk)

    def when_writable(self, go_on: Callable[[], None]) -> None:
        assert self._outgoing is not None
        self._outgoing.when_writable(go_on)

    def when_gone(self, leave: Callable[[], None] | None) -> bool:
        assert self._outgoing is not None
        return self._outgoing.when_gone(leave)


class Copy(Onlooker):
    """Sits on the ways out and keeps a copy of an answer, until it is too large to be worth it."""

    def __init__(self, send: Send, outgoing: Outgoing | None, most_bytes: int) -> None:
        super().__init__(send, outgoing)
        self._most_bytes = most_bytes
        self._status = 0
        self._headers: Headers = []
        self._pieces: list[bytes] | None = []
        self._size_bytes = 0
        self._complete = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        self._note(message)
        await super().__call__(message)

    def stream(self, chunk: bytes) -> bool:
        self._add(chunk)
        return super().stream(chunk)

    def _note(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = message["headers"]
            return
        self._add(message.get("body", b""))
        self._complete = not message.get("more_body", False)

    def _add(self, piece: bytes) -> None:
        self._size_bytes += len(piece)
        if self._size_bytes > self._most_bytes:
            self._pieces = None
        if self._pieces is not None:
            self._pieces.append(piece)

    def whole(self) -> bytes | None:
        """The body of a complete 200; None for anything else, and for what was too large."""
        if not self._complete or self._status != 200 or self._pieces is None:
            return None
        return b"".join(self._pieces)

    @property
    def headers(self) -> Headers:
        return self._headers

    @property
    def status(self) -> int:
        """0 while nothing has been sent."""
        return self._status

    def so_far(self) -> bytes | None:
        """What was sent of the body, whole or not; None for what was too large."""
        return None if self._pieces is None else b"".join(self._pieces)
