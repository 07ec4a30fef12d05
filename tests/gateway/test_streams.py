"""Streams that go wrong, or slowly: the client hears of it inside the stream, in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import suppress
from typing import Any

import openai
import pytest

from gateway.phases import phases
from gateway.spans import spans_of
from tests.gateway.world import (
    DONE,
    HELLO,
    STREAMED,
    Front,
    Peer,
    events,
    gateway,
    on_loop,
    until,
    upstream,
)

CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


def error_of(body: bytes) -> dict[str, Any]:
    """The in-band error, which is followed by the terminator and by nothing else."""
    *_, problem, end = events(body)
    assert end == "[DONE]"
    assert body.endswith(b"\n\n" + DONE)
    return problem["error"]


@on_loop
async def test_a_reset_stream_ends_with_an_error_event_and_the_terminator() -> None:
    """What came so far is kept, then the cut is told: never a clean truncated 200."""

    async def answer(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(CHUNK)
        await asyncio.sleep(0.02)
        peer.abort()

    async with upstream(answer) as fake, gateway(fake) as edge:
        response = await edge.post(STREAMED)
        assert response.content.startswith(CHUNK)
        error = error_of(response.content)
        assert error["code"] == "upstream_stream_cut"
        assert set(error) == {"message", "type", "param", "code"}


@on_loop
async def test_a_line_that_was_half_sent_is_closed_before_the_error_event() -> None:
    """The error does not become part of the broken line."""

    async def answer(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(CHUNK + CHUNK[:20])
        await peer.end()

    async with upstream(answer) as fake, gateway(fake) as edge:
        body = (await edge.post(STREAMED)).content
        assert body.startswith(CHUNK + CHUNK[:20] + b'\n\ndata: {"error"')
        assert body.endswith(b"\n\n" + DONE)


@on_loop
async def test_a_stream_that_ends_without_the_terminator_is_a_cut() -> None:
    """A proper end of HTTP is no proper end of a stream."""

    async def answer(peer: Peer) -> None:
        await peer.stream(CHUNK, b'data: {"x":"\\ndata: [DONE]"}\n\n')

    async with upstream(answer) as fake, gateway(fake) as edge:
        assert error_of((await edge.post(STREAMED)).content)["code"] == "upstream_stream_cut"


@on_loop
async def test_the_sdk_raises_on_a_cut_stream() -> None:
    """A caller of the OpenAI SDK cannot take a cut answer for a whole one."""

    async def answer(peer: Peer) -> None:
        await peer.stream(CHUNK)

    async with upstream(answer) as fake, gateway(fake) as edge:
        sdk = openai.AsyncOpenAI(base_url=f"{edge.url}/v1", api_key="none", max_retries=0)
        async with sdk:
            stream = await sdk.chat.completions.create(**STREAMED)
            with pytest.raises(openai.APIError, match="cut"):
                async for _ in stream:
                    pass


@on_loop
async def test_a_terminator_split_over_chunks_ends_the_stream_cleanly() -> None:
    """One byte at a time is still a whole stream, and arrives as it came."""

    async def answer(peer: Peer) -> None:
        await peer.head()
        for at in range(len(CHUNK + DONE)):
            await peer.chunk((CHUNK + DONE)[at : at + 1])
            await asyncio.sleep(0)
        await peer.end()

    async with upstream(answer) as fake, gateway(fake) as edge:
        assert (await edge.post(STREAMED)).content == CHUNK + DONE


@on_loop
async def test_a_replica_that_holds_its_stream_open_after_the_terminator_is_left() -> None:
    """The client's answer ends soon after [DONE], whatever the replica does."""

    async def answer(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(CHUNK + b"data: [DONE]\n")
        await asyncio.Event().wait()

    async with upstream(answer) as fake, gateway(fake) as edge:
        assert (await edge.post(STREAMED)).content == CHUNK + DONE
        await until(lambda: fake.running == 0)


@on_loop
async def test_a_stream_that_falls_silent_ends_with_an_error_event() -> None:
    """After idle_timeout_s the client is told, and the replica's connection is closed."""

    async def answer(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(CHUNK)
        await asyncio.Event().wait()

    async with upstream(answer) as fake, gateway(fake, idle_timeout_s=0.1) as edge:
        body = (await edge.post(STREAMED)).content
        assert error_of(body)["code"] == "upstream_idle_timeout"
        await until(lambda: fake.running == 0)


@on_loop
async def test_a_replica_that_never_answers_is_given_up() -> None:
    """504 while nothing was sent, in band once comments were."""

    async def answer(peer: Peer) -> None:
        await asyncio.Event().wait()

    async with upstream(answer) as fake:
        async with gateway(fake, first_byte_timeout_s=0.1) as edge:
            for payload in (HELLO, STREAMED):
                response = await edge.post(payload)
                assert response.status_code == 504
                assert response.json()["error"]["code"] == "upstream_timeout"
        async with gateway(fake, first_byte_timeout_s=0.1, keep_alive_s=0.03) as edge:
            response = await edge.post(STREAMED)
            assert response.status_code == 200
            assert error_of(response.content)["code"] == "upstream_timeout"
        await until(lambda: fake.running == 0)


COMMENT = b": keep-alive\n\n"


async def read_until(edge: Front, seen: bytes, event: asyncio.Event) -> bytes:
    """A whole streamed answer; `event` is set once these bytes are in it."""
    body = b""
    path = "/v1/chat/completions"
    async with edge.client.stream("POST", path, json=STREAMED) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        async for part in response.aiter_raw():
            body += part
            if seen in body:
                event.set()
    return body


@on_loop
async def test_a_long_prefill_is_bridged_with_comments() -> None:
    """200 and keep-alive comments come while the replica works; the stream follows untouched."""

    computed = asyncio.Event()

    async def answer(peer: Peer) -> None:
        await computed.wait()
        await peer.stream(CHUNK, DONE)

    async with upstream(answer) as fake, gateway(fake, keep_alive_s=0.04) as edge:
        got = await read_until(edge, COMMENT + COMMENT, computed)
        comments, rest = got.split(CHUNK)
        assert comments.replace(COMMENT, b"") == b""
        assert rest == DONE


@on_loop
async def test_comments_come_between_events_and_never_inside_one() -> None:
    """Silence after a whole event is commented on; silence inside an event is not."""

    bridged = asyncio.Event()

    async def answer(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(CHUNK)
        await bridged.wait()
        await peer.chunk(CHUNK[:20])
        await asyncio.sleep(0.15)
        await peer.chunk(CHUNK[20:] + DONE)
        await peer.end()

    async with upstream(answer) as fake, gateway(fake, keep_alive_s=0.04) as edge:
        # On a busy machine the wait for the first event is a silence too.
        body = await read_until(edge, CHUNK + COMMENT, bridged)
        assert body.endswith(b"\n\n" + CHUNK + DONE)
        assert body.replace(COMMENT, b"") == CHUNK + CHUNK + DONE


@on_loop
async def test_an_answer_that_is_no_stream_gets_no_comments() -> None:
    """Without stream: true the client waits for JSON, however long."""

    async def answer(peer: Peer) -> None:
        await asyncio.sleep(0.12)
        await peer.json({"choices": []})

    async with upstream(answer) as fake, gateway(fake, keep_alive_s=0.02) as edge:
        assert (await edge.post(HELLO)).content == b'{"choices": []}'


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"error":{"message":"too long","type":"t","param":null,"code":"context"}}', "context"),
        (b"<html>busy</html>", "upstream_error"),
        (b'["list"]', "upstream_error"),
    ],
)
@on_loop
async def test_an_error_after_comments_is_delivered_in_band(body: bytes, code: str) -> None:
    """200 is out already: the replica's refusal becomes an event, in its own words if it can."""

    async def answer(peer: Peer) -> None:
        await asyncio.sleep(0.1)
        await peer.json(body, status=400)

    async with upstream(answer) as fake, gateway(fake, keep_alive_s=0.03) as edge:
        response = await edge.post(STREAMED)
        assert response.status_code == 200
        assert error_of(response.content)["code"] == code


@on_loop
async def test_an_answer_that_is_cut_is_502() -> None:
    """Fewer bytes than announced never reach the client as an answer."""

    async def answer(peer: Peer) -> None:
        await peer.raw(b"HTTP/1.1 200 X\r\ncontent-length: 100\r\n\r\n{")
        peer.abort()

    async with upstream(answer) as fake, gateway(fake) as edge:
        response = await edge.post(HELLO)
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "upstream_cut"


@on_loop
async def test_an_answer_beyond_the_limit_is_502(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless answer is not collected endlessly."""
    monkeypatch.setattr("gateway.relay.WHOLE_MAX_BYTES", 1000)

    async def answer(peer: Peer) -> None:
        await peer.head(kind="application/json")
        while True:
            await peer.chunk(b"x" * 500)
            await asyncio.sleep(0)

    async with upstream(answer) as fake, gateway(fake) as edge:
        response = await edge.post(HELLO)
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "upstream_too_large"
        await until(lambda: fake.running == 0)


@on_loop
async def test_an_encoded_stream_is_refused() -> None:
    """Identity was asked for: a compressed stream could not be watched for its end."""

    async def answer(peer: Peer) -> None:
        await peer.head(content_encoding="gzip")
        await peer.end()

    async with upstream(answer) as fake, gateway(fake) as edge:
        response = await edge.post(STREAMED)
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "upstream_encoding"


@on_loop
async def test_a_client_that_reads_nothing_is_dropped_in_the_end() -> None:
    """The replica is held back meanwhile, and the request does not stay for ever."""

    async def answer(peer: Peer) -> None:
        await peer.head()
        while True:
            await peer.chunk(CHUNK * 100)

    async with upstream(answer) as fake, gateway(fake, idle_timeout_s=0.3) as edge:
        _, writer = await edge.send(STREAMED)
        writer.transport.pause_reading()
        await until(lambda: fake.running == 1)
        await until(lambda: edge.pool.in_flight == 0)
        await until(lambda: fake.running == 0)
        writer.transport.abort()


@on_loop
async def test_a_client_that_reads_late_holds_the_replica_back_and_gets_every_byte() -> None:
    """Memory stays bounded while it sleeps; then the stream goes on to its end."""
    sent = 0
    chunks = 8000  # of 5,700 bytes each: more than all sockets on the way hold

    async def answer(peer: Peer) -> None:
        nonlocal sent
        await peer.head()
        for _ in range(chunks):
            await peer.chunk(CHUNK * 100)
            sent += 1
        await peer.chunk(DONE)
        await peer.end()

    async with upstream(answer) as fake, gateway(fake) as edge:
        reader, writer = await edge.send(STREAMED)
        writer.transport.pause_reading()
        before = -1
        while before != sent or not sent:
            before = sent
            await asyncio.sleep(0.1)
        assert sent < chunks / 2
        writer.transport.resume_reading()
        await reader.readuntil(b"\r\n\r\n")
        pieces: list[bytes] = []
        while size := int(await reader.readline(), 16):
            pieces.append((await reader.readexactly(size + 2))[:-2])
        assert b"".join(pieces) == CHUNK * 100 * chunks + DONE


class Slow:
    """A client of bare sockets that takes what it is told to."""

    def __init__(self, edge: Front) -> None:
        self._loop = asyncio.get_running_loop()
        self._edge = edge
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        self._socket.setblocking(False)

    async def __aenter__(self) -> Slow:
        await self._loop.sock_connect(self._socket, ("127.0.0.1", self._edge.port))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.close()

    async def ask(self, times: int = 1) -> None:
        body = json.dumps(HELLO).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        asked = head + b"content-length: %d\r\n\r\n" % len(body) + body
        await self._loop.sock_sendall(self._socket, asked * times)

    async def take(self, most: int) -> bytes:
        return await self._loop.sock_recv(self._socket, most)

    async def take_or_nothing(self, most: int) -> bytes:
        """b"" also where the connection was reset."""
        with suppress(ConnectionError):
            return await self.take(most)
        return b""


LARGE = b'{"choices": [], "pad": "' + b"x" * 24_000_000 + b'"}'  # more than all sockets hold


async def large(peer: Peer) -> None:
    await peer.json(LARGE)


@on_loop
async def test_a_client_that_takes_a_large_answer_slowly_gets_it_and_its_trace_lasts_as_long() -> (
    None
):
    """The bugs: it was cut after idle_timeout_s, and told of as one that was over at once."""
    async with (
        upstream(large) as fake,
        gateway(fake, idle_timeout_s=0.4) as edge,
        Slow(edge) as one,
    ):
        await one.ask()
        began, got = time.monotonic(), 0
        while got < len(LARGE) // 2:
            got += len(taken := await one.take(200_000))
            assert taken
            await asyncio.sleep(0.02)
        half_s = time.monotonic() - began
        assert half_s > 0.4
        assert fake.running == 0
        assert edge.pool.in_flight == 1
        assert all(replica.in_flight == 0 for replica in edge.pool.replicas)
        assert not edge.live.edge.meters.requests
        while got < len(LARGE):
            got += len(taken := await one.take(2**20))
            assert taken
        await until(lambda: edge.pool.in_flight == 0)
        (trail,) = edge.live.edge.tracer.ring
        assert (trail.status, trail.error) == (200, "")
        assert trail.e2e_s > half_s
        spent = phases(trail)
        assert sum(spent.values()) == pytest.approx(trail.e2e_s, abs=1e-6)
        assert spent["download"] > trail.e2e_s / 2
        (span,) = (one for one in spans_of(trail) if one.name == "gateway.download")
        assert span.end_s - span.start_s == pytest.approx(spent["download"], abs=1e-6)
        assert sum(edge.live.edge.meters.requests.values()) == 1
        (took,) = edge.live.edge.meters.duration_s.series.values()
        assert took.total > half_s


@on_loop
async def test_a_client_that_takes_little_at_a_time_is_not_dropped() -> None:
    """The bug: what counted was when the kernel had room again, which is megabytes later."""
    async with (
        upstream(large) as fake,
        gateway(fake, idle_timeout_s=0.4) as edge,
        Slow(edge) as one,
    ):
        await one.ask()
        await until(lambda: edge.pool.in_flight == 1)
        for _ in range(40):
            assert await one.take(40_000)
            await asyncio.sleep(0.03)
        assert edge.pool.in_flight == 1


@on_loop
async def test_a_client_that_takes_nothing_of_a_whole_answer_is_dropped_and_has_left() -> None:
    async with (
        upstream(large) as fake,
        gateway(fake, idle_timeout_s=0.3) as edge,
        Slow(edge) as one,
    ):
        await one.ask()
        await until(lambda: edge.pool.in_flight == 1)
        await until(lambda: edge.pool.in_flight == 0)
        (trail,) = edge.live.edge.tracer.ring
        assert (trail.status, trail.error) == (200, "client_cancelled")
        assert trail.e2e_s > 0.3
        ((*_, outcome),) = edge.live.edge.meters.requests
        assert outcome == "cancelled"


@on_loop
async def test_total_timeout_s_holds_until_the_client_has_all_of_a_whole_answer() -> None:
    """It ended with the replica's part, and whoever read slowly had for ever. What came is cut,
    which a length that is not reached says."""
    limit_s = 3.0
    async with (
        upstream(large) as fake,
        gateway(fake, total_timeout_s=limit_s) as edge,
        Slow(edge) as one,
    ):
        await one.ask()
        got = head = await one.take(200)
        while piece := await one.take_or_nothing(20_000):
            got += piece
            await asyncio.sleep(0.02)
        assert head.startswith(b"HTTP/1.1 200 OK")
        assert len(got) < len(LARGE)
        await until(lambda: edge.pool.in_flight == 0)
        (trail,) = edge.live.edge.tracer.ring
        assert (trail.status, trail.error) == (200, "request_timeout")
        assert trail.ended - trail.read >= limit_s - 0.01
        assert phases(trail)["download"] > 0
        ((*_, outcome),) = edge.live.edge.meters.requests
        assert outcome == "timeout"
    async with upstream(large) as fake, gateway(fake, total_timeout_s=30.0) as edge:
        assert (await edge.post(HELLO)).content == LARGE


@on_loop
async def test_what_is_asked_behind_an_answer_that_lies_there_waits_for_it() -> None:
    """However much a client asks for and does not read: one answer is kept for it."""
    async with upstream(large) as fake, gateway(fake) as edge, Slow(edge) as one:
        await one.ask(3)
        await until(lambda: len(fake.requests) == 1 and not fake.running)
        pieces = [await one.take(100_000)]
        assert len(fake.requests) == 1
        while sum(map(len, pieces)) < 3 * len(LARGE):
            pieces.append(await one.take(2**20))
        assert b"".join(pieces).count(b"HTTP/1.1 200 OK") == 3
        assert len(fake.requests) == 3
