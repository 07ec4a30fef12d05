"""`python -m benchmarks.lab.mock_upstream`: an OpenAI-compatible server that computes nothing.

Says its port, then answers at once: a short whole answer, or a stream of `max_tokens` chunks that
come as fast as they can, or one every `seed` milliseconds. Costs as little as Python can, so that
what stands before it is what is measured.
"""

from __future__ import annotations

import asyncio
import re
import sys
from functools import partial
from typing import Any

import httptools
import uvloop

MODEL = "mock"
_NUMBERS = re.compile(rb'"(max_tokens|max_completion_tokens|seed)": ?([0-9]+)')
_HEAD = b'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk",'
_HEAD += b'"created":1790000000,"model":"mock","choices":'
WORD = b'" word%d"'
_CHUNK = _HEAD + b'[{"index":0,"delta":{"content":' + WORD + b'},"finish_reason":null}]}\n\n'
_LAST = _HEAD + b'[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
_USAGE = b'"usage":{"prompt_tokens":16,"completion_tokens":16,"total_tokens":32}'
_END = _LAST + _HEAD + b"[]," + _USAGE + b"}\n\ndata: [DONE]\n\n"
_WHOLE = (
    b'{"id":"chatcmpl-0123456789abcdef","object":"chat.completion","created":1790000000,'
    b'"model":"mock","choices":[{"index":0,"message":{"role":"assistant","content":"a short '
    b'answer"},"finish_reason":"stop"}],' + _USAGE + b"}"
)
_MODELS = b'{"object":"list","data":[{"id":"mock","object":"model","created":1,"owned_by":"me"}]}'
_STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _framed(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


# LiteLLM takes one chunk that repeats for a model that has lost its way: ten take turns.
_FRAMED = tuple(_framed(_CHUNK % number) for number in range(10))
_FRAMED_END = _framed(_END) + b"0\r\n\r\n"


def _answer(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


class Upstream(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._body = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:  # some peers try HTTP/2 first
            self._transport.abort()

    def on_message_begin(self) -> None:
        self._body = b""

    def on_url(self, url: bytes) -> None:
        self._path = url

    def on_body(self, piece: bytes) -> None:
        self._body += piece

    def on_message_complete(self) -> None:
        if b"completions" not in self._path:
            self._transport.write(_answer(_MODELS if b"models" in self._path else b"{}"))
        elif b'"stream":true' not in self._body and b'"stream": true' not in self._body:
            self._transport.write(_answer(_WHOLE))
        else:
            numbers = {name: int(value) for name, value in _NUMBERS.findall(self._body)}
            chunks = numbers.get(b"max_tokens") or numbers.get(b"max_completion_tokens", 1)
            gap_s = numbers.get(b"seed", 0) / 1000
            self._transport.write(_STREAM)
            if gap_s:
                self._pace(chunks, gap_s, self._loop.time() + gap_s)
            else:
                self._pour(chunks)

    def _pour(self, chunks: int) -> None:
        """All that is left, ten in a turn of the loop: in a burst several arrive in one read."""
        if not self._transport.is_closing():
            self._transport.write(b"".join(_FRAMED[:chunks]))
            if chunks > 10:
                self._loop.call_soon(self._pour, chunks - 10)
            else:
                self._transport.write(_FRAMED_END)

    def _pace(self, chunks: int, gap_s: float, at: float) -> None:
        if not self._transport.is_closing():
            self._transport.write(_FRAMED[chunks % 10] if chunks else _FRAMED_END)
            if chunks:
                self._loop.call_at(at, partial(self._pace, chunks - 1, gap_s, at + gap_s))


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # whoever started it closes this to end it


if __name__ == "__main__":
    uvloop.run(main())
