"""The simulated replicas as real HTTP servers, for gateways that cannot be simulated.

`python -m benchmarks.lab.fleet_server COUNT RATE SPEED BLOCKS` listens on COUNT free ports, prints
them as a JSON list, and ends with its stdin. Time runs SPEED times as fast as RATE says; each keeps
BLOCKS. A prompt is the text of its messages, 64 bytes a block; an answer streams a piece a block.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass, field

import orjson

from benchmarks.lab.fleet import TOKEN_S, Cache, prefill_s
from benchmarks.lab.workloads import BLOCK_TOKENS, MODEL

BLOCK_BYTES = 64
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
MODELS = orjson.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
INFO = orjson.dumps({"model_path": MODEL, "served_model_name": MODEL, "status": "ready"})


def text_of(blocks: tuple[int, ...]) -> str:
    """64 characters a block, and no two blocks alike."""
    return "".join(f"{one:08d} {one:054d} " for one in blocks)


@dataclass(slots=True)
class Server:
    """One replica: one prompt at a time, in their order."""

    rate: float
    speed: float
    cache: Cache
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    answers: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await _head(reader):
                method, path, size = head
                body = await reader.readexactly(size)
                if method == "POST" and path.startswith("/v1/chat/completions"):
                    await self._answer(orjson.loads(body), writer)
                else:
                    await _plain(path, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
        messages = asked["messages"]
        assert isinstance(messages, list)
        text = "".join(message["content"] for message in messages)
        prompt = [int(text[at : at + 8]) for at in range(0, len(text), BLOCK_BYTES)]
        async with self.turn:
            held = self.cache.found(prompt)
            tokens = (len(prompt) - held) * BLOCK_TOKENS
            await asyncio.sleep(prefill_s(tokens, self.answers, self.rate) / self.speed)
            self.cache.keep(prompt)
        self.answers += 1
        writer.write(HEAD)
        limit = asked.get("max_tokens") or asked["max_completion_tokens"]  # some rename it
        blocks = int(str(limit)) // BLOCK_TOKENS
        try:
            for number in range(blocks):
                delta = {"role": "assistant", "content": f"piece {number} "}
                writer.write(_event(_chunk(delta)))
                await writer.drain()
                await asyncio.sleep(TOKEN_S * BLOCK_TOKENS / self.speed)
            writer.write(_event(_chunk({}, "stop")))
            writer.write(_event(_usage(len(prompt), held, blocks)))
            writer.write(_piece(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            await writer.drain()
        finally:
            self.answers -= 1


async def _head(reader: asyncio.StreamReader) -> tuple[str, str, int] | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").rstrip().split("\r\n")
    if not first.endswith("HTTP/1.1"):  # some ask for HTTP/2 first
        return None
    method, path, _ = first.split(" ")
    headers = dict(line.lower().split(":", 1) for line in lines)
    return method, path, int(headers.get("content-length", 0))


async def _plain(path: str, writer: asyncio.StreamWriter) -> None:
    body = MODELS if path == "/v1/models" else INFO
    head = (
        f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()


def _chunk(delta: dict[str, str], reason: str | None = None) -> dict[str, object]:
    return {
        "id": "c", "object": "chat.completion.chunk", "created": 0, "model": MODEL,
        "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
    }  # fmt: skip


def _usage(prompt: int, held: int, answer: int) -> dict[str, object]:
    told = {
        "prompt_tokens": prompt * BLOCK_TOKENS,
        "completion_tokens": answer * BLOCK_TOKENS,
        "total_tokens": (prompt + answer) * BLOCK_TOKENS,
        "prompt_tokens_details": {"cached_tokens": held * BLOCK_TOKENS},
    }
    return _chunk({}) | {"choices": [], "usage": told}


def _event(payload: dict[str, object]) -> bytes:
    return _piece(b"data: " + orjson.dumps(payload) + b"\n\n")


def _piece(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def main(count: int, rate: float, speed: float, capacity_blocks: int) -> None:
    ports = []
    servers = []
    for _ in range(count):
        one = Server(rate, speed, Cache(capacity_blocks))
        server = await asyncio.start_server(one.serve, "127.0.0.1", 0, limit=2**22)
        servers.append(server)
        ports.append(server.sockets[0].getsockname()[1])
    print(json.dumps(ports), flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    count, rate, speed, capacity = sys.argv[1:]
    asyncio.run(main(int(count), float(rate), float(speed), int(capacity)))
