"""Load on a gateway from kept-alive connections, and how long each request took."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httptools

from benchmarks.lab.mock_upstream import MODEL, WORD
from benchmarks.lab.report import MeasurementFailed

_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one kind: `connections` at once, `each` one after the other on every one."""

    connections: int
    each: int
    chunks: int = 0  # 0: no stream
    gap_ms: int = 0
    prompt_chars: int = 64

    def request(self, key: str | None) -> bytes:
        asked: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "word " * (self.prompt_chars // 5)}],
        }
        if self.chunks:
            asked |= {"stream": True, "max_tokens": self.chunks, "seed": self.gap_ms}
        body = json.dumps(asked).encode()
        authorization = f"authorization: Bearer {key}\r\n" if key else ""
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\naccept: */*\r\n"
            f"content-type: application/json\r\n{authorization}content-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass(frozen=True, slots=True)
class Driven:
    """What came of a load."""

    took_s: float
    latencies_s: tuple[float, ...]
    chunks: int


class _Caller(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[None] | None = None
        self._transport: Any = None
        self.body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(MeasurementFailed(f"a gateway closed a connection: {exc}"))

    def on_body(self, piece: bytes) -> None:
        self.body.append(piece)

    def on_message_complete(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    async def ask(self, request: bytes) -> tuple[float, bytes]:
        """Seconds until the answer was complete, and its body."""
        self.body = []
        self._done = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        self._transport.write(request)
        await self._done
        took_s = time.perf_counter() - began
        if self._parser.get_status_code() != 200:
            raise MeasurementFailed(f"a gateway answered {b''.join(self.body)[:300]!r}")
        return took_s, b"".join(self.body)

    def close(self) -> None:
        self._transport.abort()


async def drive(port: int, load: Load, key: str | None = None) -> Driven:
    """Runs a load to its end. Raises MeasurementFailed for an answer that is none."""
    loop = asyncio.get_running_loop()
    callers = [
        (await loop.create_connection(_Caller, "127.0.0.1", port))[1]
        for _ in range(load.connections)
    ]
    request = load.request(key)
    began = time.perf_counter()
    try:
        async with asyncio.timeout(_LIMIT_S):
            asked = await asyncio.gather(*(_series(one, request, load) for one in callers))
    except TimeoutError:
        raise MeasurementFailed(f"a load was not through after {_LIMIT_S:g} s") from None
    finally:
        for caller in callers:
            caller.close()
    took_s = time.perf_counter() - began
    latencies = tuple(one for series in asked for one in series)
    return Driven(took_s, latencies, load.connections * load.each * load.chunks)


async def _series(caller: _Caller, request: bytes, load: Load) -> Sequence[float]:
    latencies = []
    for _ in range(load.each):
        took_s, body = await caller.ask(request)
        found = body.count(WORD[: WORD.index(b"%")])
        if load.chunks and (found < load.chunks or b"[DONE]" not in body[-64:]):
            raise MeasurementFailed(f"a stream of {load.chunks} chunks came as {body[-300:]!r}")
        latencies.append(took_s)
    return latencies
