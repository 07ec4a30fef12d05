"""A streaming chat client that costs little while it measures: bytes and times now, JSON later.

Knows the OpenAI wire as a client sees it, of the gateway, of a worker, or of a peer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import aiohttp
import orjson

from benchmarks.lab.report import MeasurementFailed

_HEADERS = {"content-type": "application/json"}


@dataclass(frozen=True, slots=True)
class Answer:
    """A streamed answer, times in seconds since the request was sent."""

    opened_s: float  # to the first event, which may carry no more than a role
    ttft_s: float  # to the first content that is not empty; to the last token where there is none
    last_s: float  # to the last token: the event with the last content or the finish reason
    whole_s: float  # to the end of the stream
    usage: Mapping[str, Any]
    chunks: int  # events that carried content
    text: str

    @property
    def tokens(self) -> int:
        return int(self.usage["completion_tokens"])

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; there have to be two."""
        return (self.last_s - self.ttft_s) / (self.tokens - 1)


@dataclass(frozen=True, slots=True)
class Recording:
    """The bytes of one streamed answer as they came."""

    sent: float  # perf_counter, as all times here
    reads: list[tuple[float, bytes]]

    @property
    def ended(self) -> float:
        return self.reads[-1][0]

    def answer(self) -> Answer:
        """Parses the events. Raises MeasurementFailed for an error in band or an early end."""
        events = list(self._events())
        contents: list[tuple[float, str]] = []
        usage = last = None
        for at, payload in events:
            if "error" in payload:
                raise MeasurementFailed(f"a stream ended with an error: {payload['error']}")
            usage = payload.get("usage") or usage
            for choice in payload["choices"]:
                if content := choice["delta"].get("content"):
                    contents.append((at, content))
                if content or choice["finish_reason"]:
                    last = at
        if last is None or usage is None:
            raise MeasurementFailed("a stream ended without a finish reason or without its usage")
        return Answer(
            opened_s=events[0][0] - self.sent,
            ttft_s=(contents[0][0] if contents else last) - self.sent,
            last_s=last - self.sent,
            whole_s=self.ended - self.sent,
            usage=usage,
            chunks=len(contents),
            text="".join(text for _, text in contents),
        )

    def _events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """Each event's payload with the time at which its last byte was read."""
        held = b""
        for at, data in self.reads:
            *events, held = (held + data).split(b"\n\n")
            for event in events:
                if event == b"data: [DONE]":
                    return
                if event.startswith(b"data: "):
                    yield at, orjson.loads(event[6:])
        raise MeasurementFailed("a stream ended without [DONE]")


def body_of(model: str, messages: list[dict[str, Any]], **fields: Any) -> bytes:
    """A streaming request that asks for its usage; `fields` as the wire names them."""
    request: Mapping[str, Any] = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    return orjson.dumps(request)


async def ask(session: aiohttp.ClientSession, url: str, body: bytes) -> Recording:
    """One answer of the server at a base URL. Raises MeasurementFailed when there is none."""
    reads: list[tuple[float, bytes]] = []
    sent = perf_counter()
    try:
        async with session.post(
            f"{url}/v1/chat/completions", data=body, headers=_HEADERS
        ) as response:
            if response.status != 200:
                said = (await response.text())[:300]
                raise MeasurementFailed(f"a request was answered {response.status}: {said}")
            while data := await response.content.readany():
                reads.append((perf_counter(), data))
    except aiohttp.ClientError as error:
        raise MeasurementFailed(f"a request failed: {type(error).__name__}: {error}") from error
    if not reads:
        raise MeasurementFailed("a request was answered 200 with an empty body")
    return Recording(sent, reads)


def open_session() -> aiohttp.ClientSession:
    """Keeps connections open, as many as there are streams, and sets no time limit to an answer."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=120),
    )
