"""A small world for gateway tests: a real listening gateway, and upstreams over bare sockets."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvloop
from uvicorn.server import ServerState

from gateway.app import create_app
from gateway.arrival import note_arrivals
from gateway.drains import Drains
from gateway.edge import Live, build
from gateway.listener import configure
from gateway.replica import Replica, replicas_of
from gateway.upstream import Pool
from gateway.variants import Variants
from policies.schema import Deployment, Discovery, Gateway, Runtime, Tracing, Upstream
from runtime.wire import CHALLENGE_HEADER, run_proof

LIMIT_S = 180.0  # against hanging; on a machine busy with other work processes start slowly
DONE = b"data: [DONE]\n\n"
HELLO = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
STREAMED = HELLO | {"stream": True}


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs an async test on the loop that serves in production, within a limit."""

    @functools.wraps(test)
    def sync(*args: Any, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(asyncio.wait_for(test(*args, **kwargs), LIMIT_S))

    return sync


async def until(holds: Callable[[], bool]) -> None:
    """Waits for a condition that other tasks bring about; on_loop limits it."""
    while not holds():  # noqa: ASYNC110  # conditions inside servers have no event
        await asyncio.sleep(0.002)


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Peer:
    """One connection of the gateway to a fake upstream."""

    def __init__(self, request: Request, writer: asyncio.StreamWriter) -> None:
        self.request = request
        self._writer = writer

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def head(self, status: int = 200, kind: str = "text/event-stream", **more: str) -> None:
        lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", "transfer-encoding: chunked"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in more.items()]
        await self.raw("\r\n".join([*lines, "", ""]).encode())

    async def chunk(self, data: bytes) -> None:
        await self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.raw(b"0\r\n\r\n")

    async def stream(self, *chunks: bytes) -> None:
        await self.head()
        for chunk in chunks:
            await self.chunk(chunk)
        await self.end()

    async def json(self, payload: Any, status: int = 200, **more: str) -> None:
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in more.items()]
        lines += [f"content-length: {len(body)}", "", ""]
        await self.raw("\r\n".join(lines).encode() + body)

    def abort(self) -> None:
        self._writer.transport.abort()


Answer = Callable[[Peer], Awaitable[None]]


async def pong(peer: Peer) -> None:
    """A complete short answer of the kind that was asked for."""
    if json.loads(peer.request.body).get("stream"):
        await peer.stream(b'data: {"choices":[]}\n\n', DONE)
    else:
        await peer.json({"choices": []})


def held(release: asyncio.Event, *chunks: bytes) -> Answer:
    """A stream that begins with `chunks` and ends when it is released."""

    async def answer(peer: Peer) -> None:
        await peer.head()
        for chunk in chunks:
            await peer.chunk(chunk)
        await release.wait()
        await peer.chunk(DONE)
        await peer.end()

    return answer


@dataclass
class Fake:
    """An upstream: answers probes by itself and everything else by `answer`."""

    answer: Answer = pong
    models: tuple[str, ...] = ("m",)
    health: int = 200
    fingerprint: bytes | None = None  # the body of /v1/fingerprint; None: there is no such path
    facts: dict[str, Any] = field(default_factory=dict)  # more of its /health
    run_token: str | None = None  # as a worker of ours has it from `headgate serve`
    requests: list[Request] = field(default_factory=list)
    running: int = 0
    was_left: bool = False  # the gateway closed a connection on which an answer ran
    connections: int = 0
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        rest = b""
        try:
            while (request := await self._read(reader, rest)) is not None:
                rest = await self._answer(Peer(request, writer), reader)
                if not rest and reader.at_eof():
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        except RuntimeError:  # uvloop, for a write to what the gateway has closed
            assert writer.transport.is_closing()
        finally:
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader, rest: bytes) -> Request | None:
        head = rest + await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode().rstrip().split("\r\n")
        method, path, _ = first.split(" ")
        headers = dict(line.lower().split(": ", 1)[:1] + line.split(": ", 1)[1:] for line in lines)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return Request(method, path, headers, body)

    async def _answer(self, peer: Peer, reader: asyncio.StreamReader) -> bytes:
        """Runs the answer, watches for the gateway to leave; the next request's first byte."""
        if peer.request.path == "/health":
            state = {"status": "?", **self.facts}
            if self.run_token is not None:
                state["proof"] = run_proof(self.run_token, peer.request.headers[CHALLENGE_HEADER])
            await peer.json(state, status=self.health)
            return b""
        if peer.request.path == "/v1/models":
            data = [{"id": name, "max_model_len": 64} for name in self.models]
            await peer.json({"object": "list", "data": data})
            return b""
        if peer.request.path == "/v1/fingerprint":
            none = b'{"error": {}}'
            await peer.json(self.fingerprint or none, 200 if self.fingerprint else 404)
            return b""
        self.requests.append(peer.request)
        self.running += 1
        work = asyncio.ensure_future(self.answer(peer))
        watch = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.was_left = True
                raise ConnectionResetError
            await work
        finally:
            self.running -= 1
            if not work.done() or work.exception():
                watch.cancel()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        return await watch


@asynccontextmanager
async def upstream(answer: Answer = pong, **more: Any) -> AsyncIterator[Fake]:
    fake = Fake(answer, **more)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.close()


@dataclass
class Front:
    """A listening gateway, its inside, and a client of it."""

    live: Live
    pool: Pool
    url: str
    port: int
    client: httpx.AsyncClient
    sockets: list[asyncio.StreamWriter] = field(default_factory=list)

    async def post(self, payload: Any, path: str = "/v1/chat/completions", **more: Any) -> Any:
        content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        return await self.client.post(path, content=content, **more)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.sockets.append(writer)
        return reader, writer

    async def send(self, payload: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A request over a socket of its own, for tests that leave, or that look at bytes."""
        body = json.dumps(payload).encode()
        reader, writer = await self.connect()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        return reader, writer


@asynccontextmanager
async def gateway(
    *replicas: Fake | Replica | str,
    wait: bool = True,
    discovery: Sequence[Discovery] = (),
    upstreams: Sequence[Upstream] = (),
    tracing: Tracing | None = None,
    **settings: Any,
) -> AsyncIterator[Front]:
    """Listens on a free port; with `wait`, every replica has been found healthy."""
    policy = Gateway(**settings)
    deployment = Deployment(
        version=1,
        gateway=policy,
        runtime=Runtime(),
        discovery=tuple(discovery),
        upstreams=tuple(upstreams),
        tracing=tracing or Tracing(),
    )
    known = [
        r if isinstance(r, Replica) else Replica(getattr(r, "url", r), own=True) for r in replicas
    ]
    known += replicas_of(deployment, (), {})
    live = Live(build(deployment, known))
    pool = live.edge.pool
    async with listening(live) as front:
        if wait:
            await until(lambda: all(replica.healthy for replica in pool.replicas))
        yield front
    assert pool.in_flight == 0
    assert all(replica.in_flight == 0 for replica in pool.replicas)
    for before in live.edge.admission.fronts.values():
        assert before.queue.running == before.queue.waiting == before.queue.reading == 0


@asynccontextmanager
async def listening(live: Live) -> AsyncIterator[Front]:
    """The gateway of an edge on a free port; all is served and gone at the end."""
    variants = Variants(live)
    drains = Drains(live, lambda: variants.edge)
    app = create_app(live, variants=variants, drains=drains)
    config = configure(app, live.edge.settings, host="127.0.0.1", port=0)
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    protocol = config.http_protocol_class
    server = await loop.create_server(lambda: protocol(config, state, {}), "127.0.0.1", 0)
    note_arrivals(server.sockets)
    port = server.sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    try:
        async with (
            live.running(),
            drains.following(),
            variants.following(),
            httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as client,
        ):
            edge = Front(live, live.edge.pool, url, port, client)
            try:
                yield edge
            finally:
                for writer in edge.sockets:
                    writer.transport.abort()
            await client.aclose()
            await until(lambda: not state.tasks)
    finally:
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()


def events(body: bytes) -> list[Any]:
    """The JSON payloads of a stream, comments skipped; the terminator as its text."""
    found = []
    for line in body.split(b"\n"):
        if line.startswith(b"data: "):
            text = line.removeprefix(b"data: ")
            found.append("[DONE]" if text == b"[DONE]" else json.loads(text))
    return found


def refused_port() -> str:
    """A URL at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
