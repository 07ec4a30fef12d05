"""Bad input gets a clear 4xx in OpenAI's shape, and the gateway goes on."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from typing import Any

import pytest

from tests.gateway.world import (
    HELLO,
    STREAMED,
    Front,
    Peer,
    gateway,
    held,
    on_loop,
    until,
    upstream,
)

POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"


def problem(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


async def answer_to(edge: Front, data: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of what comes for raw bytes, up to the end of the connection."""
    reader, writer = await edge.connect()
    writer.write(data)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split(b" ")[1]), json.loads(body)["error"]


async def alive(edge: Front) -> None:
    assert (await edge.post(HELLO)).status_code == 200


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


BAD_BODIES = [
    (b"", "invalid_json", None),
    (b'{"model": "m", "messages": [', "invalid_json", None),
    (b"[1, 2]", "invalid_json", None),
    (b'"text"', "invalid_json", None),
    (b'{"model": "m\xff", "messages": [{}]}', "invalid_json", None),
    (b"[" * 100_000, "invalid_json", None),
    (b'{"model": "m", "messages": [{}], "tools": %s}' % nested(300), "invalid_json", None),
    (b'{"model": "m", "messages": [{"content": %s}]}' % nested(252), "invalid_json", None),
    (b'{"messages": [{}]}', "missing_required_parameter", "model"),
    (b'{"model": null, "messages": [{}]}', "missing_required_parameter", "model"),
    (b'{"model": "", "messages": [{}]}', "invalid_value", "model"),
    (b'{"model": 7, "messages": [{}]}', "invalid_value", "model"),
    (b'{"model": "m"}', "missing_required_parameter", "messages"),
    (b'{"model": "m", "messages": []}', "invalid_value", "messages"),
    (b'{"model": "m", "messages": "hi"}', "invalid_value", "messages"),
    (b'{"model": "m", "messages": [{}], "stream": 1}', "invalid_value", "stream"),
    (b'{"model": "m", "messages": [{}], "stream": "yes"}', "invalid_value", "stream"),
]


@on_loop
async def test_bodies_that_cannot_be_routed_are_400_with_the_field() -> None:
    """Broken JSON, invalid UTF-8, wrong types and empty messages never reach a replica."""
    async with upstream() as fake, gateway(fake) as edge:
        for body, code, param in BAD_BODIES:
            error = problem(await edge.post(body), 400)
            assert (error["code"], error["param"]) == (code, param), body[:50]
            assert error["type"] == "invalid_request_error"
        error = problem(await edge.post({"model": "m"}, "/v1/completions"), 400)
        assert error["param"] == "prompt"
        assert fake.requests == []
        await alive(edge)


@on_loop
async def test_a_long_or_odd_value_is_quoted_short() -> None:
    """Messages stay bounded and printable whatever the client sent."""
    async with upstream() as fake, gateway(fake) as edge:
        error = problem(await edge.post(HELLO | {"model": "x\r\n" * 10_000}), 404)
        assert len(error["message"]) < 1000
        assert "\n" not in error["message"]


@on_loop
async def test_an_unknown_model_is_404_and_names_those_there_are() -> None:
    """The client reads what it could have asked for."""
    async with upstream(models=("m", "n")) as fake, gateway(fake) as edge:
        error = problem(await edge.post(HELLO | {"model": "gpt-9"}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "'gpt-9'" in error["message"]
        assert "m, n" in error["message"]
        error = problem(await edge.client.get("/v1/models/gpt-9"), 404)
        assert error["code"] == "model_not_found"


@on_loop
async def test_unknown_paths_and_methods_are_answered_in_shape() -> None:
    """404 and 405 look like every other error; 405 says what is allowed."""
    async with upstream() as fake, gateway(fake) as edge:
        assert problem(await edge.client.get("/v2/x"), 404)["code"] == "unknown_url"
        assert problem(await edge.client.post("/v1/chat/completions/"), 404)
        response = await edge.client.get("/v1/chat/completions")
        assert problem(response, 405)["code"] == "method_not_allowed"
        assert response.headers["allow"] == "POST"
        response = await edge.client.delete("/v1/models")
        assert problem(response, 405)
        assert response.headers["allow"] == "GET, HEAD"
        assert (await edge.client.head("/health")).status_code == 200


@on_loop
async def test_an_encoded_body_is_415() -> None:
    """Bytes pass through: a body that the gateway could not read is not guessed at."""
    async with upstream() as fake, gateway(fake) as edge:
        response = await edge.post(HELLO, headers={"content-encoding": "gzip"})
        assert problem(response, 415)["code"] == "unsupported_content_encoding"
        assert (await edge.post(HELLO, headers={"content-encoding": "identity"})).is_success


@on_loop
async def test_a_body_that_is_too_large_is_413_however_it_comes() -> None:
    """By its Content-Length, chunked without one, and before it is sent at all."""
    body = b"x" * 10_000_000

    async def pieces() -> Any:
        for at in range(0, len(body), 2**18):
            yield body[at : at + 2**18]

    async with upstream() as fake, gateway(fake) as edge:
        for content in (body, pieces()):
            response = await edge.client.post("/v1/chat/completions", content=content)
            error = problem(response, 413)
            assert error["code"] == "body_too_large"
            assert str(8 * 2**20) in error["message"]
        reader, writer = await edge.connect()
        writer.write(POST + b"expect: 100-continue\r\ncontent-length: 99999999\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
        writer.close()
        await alive(edge)


@pytest.mark.parametrize(
    ("line", "host", "status"),
    [
        (b"POST /v1/chat/completions HTTP/1.1", b"localhost", 413),
        (b"POST /v1/chat/completions HTTP/1.0", b"localhost", 413),
        (b"POST /v1/embeddings HTTP/1.1", b"localhost", 404),
        (b"POST /v1/chat/completions HTTP/1.1", b"evil.example", 403),
    ],
)
@on_loop
async def test_a_client_that_sends_all_before_it_reads_gets_the_refusal(
    line: bytes, host: bytes, status: int
) -> None:
    """urllib does, and closes its connections: it got a reset, for a body was still coming."""
    body = b"x" * 10_000_000
    head = b"%s\r\nhost: %s\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    async with upstream() as fake, gateway(fake) as edge:
        reader, writer = await edge.connect()
        writer.write(head % (line, host, len(body)))
        await reader.readuntil(b"\r\n\r\n")  # the refusal is out, and nobody has read it
        writer.write(body)
        await writer.drain()
        rest = await reader.read()
        assert b'"code":' in rest
        writer.close()
        assert fake.requests == []
        await alive(edge)


@pytest.mark.parametrize(
    "sent",
    [
        POST + b"content-length: 100\r\n\r\n",
        POST + b"content-length: 100\r\n\r\n" + b'{"model"',
        POST + b"transfer-encoding: chunked\r\n\r\n5\r\n{",
    ],
)
@on_loop
async def test_a_half_sent_body_is_408_and_the_connection_closes(sent: bytes) -> None:
    """A body that stops does not keep its place beyond body_timeout_s."""
    async with upstream() as fake, gateway(fake, body_timeout_s=0.4) as edge:
        status, error = await answer_to(edge, sent)
        assert (status, error["code"]) == (408, "request_timeout")
        assert edge.pool.in_flight == 0
        await alive(edge)


@pytest.mark.parametrize(
    "sent", [b"P", POST, POST + b"content-length: 1", b"\r\nGET /health HTTP/1.1\r\nhost:"]
)
@on_loop
async def test_half_sent_headers_are_408_and_the_connection_closes(sent: bytes) -> None:
    """uvicorn would wait for ever."""
    async with upstream() as fake, gateway(fake, body_timeout_s=0.4) as edge:
        status, error = await answer_to(edge, sent)
        assert (status, error["code"]) == (408, "request_timeout")
        await alive(edge)


@on_loop
async def test_headers_that_drip_do_not_outlive_the_deadline() -> None:
    """Each further byte buys no time; on a kept-alive connection neither."""
    async with upstream() as fake, gateway(fake, body_timeout_s=0.5) as edge:
        reader, writer = await edge.connect()
        writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")

        async def drip() -> None:
            writer.write(b"GET /health HTTP/1.1\r\nx: ")
            while not writer.is_closing():
                writer.write(b"X")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        rest = await reader.read()
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
        assert b"HTTP/1.1 408 " in rest
        writer.close()
        await alive(edge)


@on_loop
async def test_a_connection_that_says_nothing_is_closed_without_a_word() -> None:
    """Nobody asked, so nobody is answered."""
    async with upstream() as fake, gateway(fake, body_timeout_s=0.1) as edge:
        reader, writer = await edge.connect()
        assert await reader.read() == b""
        writer.close()


@on_loop
async def test_a_slow_answer_is_not_taken_for_slow_headers() -> None:
    """The deadline of headers ends with them: a long prefill may follow."""

    async def answer(peer: Peer) -> None:
        await asyncio.sleep(0.8)
        await peer.json({"choices": []})

    async with upstream(answer) as fake, gateway(fake, body_timeout_s=0.5) as edge:
        await alive(edge)
        await alive(edge)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"hello there\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        POST + b"content-length: -4\r\n\r\n",
        POST + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
@on_loop
async def test_what_is_not_http_is_400(sent: bytes) -> None:
    """A TLS hello, prose, a version or a length that cannot be: an answer, and the server lives."""
    async with upstream() as fake, gateway(fake) as edge:
        reader, writer = await edge.connect()
        writer.write(sent)
        head = await reader.readline()
        assert head.startswith(b"HTTP/1.1 400 "), head
        writer.close()
        await until(lambda: edge.pool.in_flight == 0)
        await alive(edge)


@on_loop
async def test_headers_without_end_are_431() -> None:
    """Memory for headers is bounded."""
    async with upstream() as fake, gateway(fake) as edge:
        reader, writer = await edge.connect()
        writer.write(b"GET /health HTTP/1.1\r\n" + (b"x-pad: " + b"y" * 4096 + b"\r\n") * 100)
        assert (await reader.readline()).startswith(b"HTTP/1.1 431 ")
        writer.close()
        await alive(edge)


@pytest.mark.parametrize("pieces", [1, 2])
@on_loop
async def test_whole_headers_that_are_too_large_are_431_and_what_follows_is_not_served(
    pieces: int,
) -> None:
    """The bug: they passed where their end came with the read in which they grew too large."""
    health = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
    sent = health + b"x-pad: " + b"y" * 70_000 + b"\r\n\r\n" + health + b"\r\n"
    async with upstream() as fake, gateway(fake) as edge:
        with socket.create_connection(("127.0.0.1", edge.port)) as client:
            half = len(sent) // pieces
            for at in range(0, len(sent), half):
                client.sendall(sent[at : at + half])  # the loop, whose thread this is, reads later
                if pieces == 2:
                    await alive(edge)
            client.setblocking(False)
            loop, got = asyncio.get_running_loop(), b""
            while piece := await loop.sock_recv(client, 2**16):
                got += piece
    assert got.startswith(b"HTTP/1.1 431 ")
    assert got.count(b"HTTP/1.1") == 1


@on_loop
async def test_a_large_body_that_comes_with_its_headers_does_not_count_as_headers() -> None:
    body = json.dumps(HELLO | {"pad": "x" * 100_000}).encode()
    async with upstream() as fake, gateway(fake) as edge:
        reader, writer = await edge.connect()
        writer.write(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")


@on_loop
async def test_an_offer_to_upgrade_gets_an_answer_over_http_1() -> None:
    """Some clients offer h2c on every request; with a body, which is not read then: a refusal."""
    body = json.dumps(HELLO).encode()
    offer = b"host: localhost\r\nconnection: upgrade\r\nupgrade: h2c\r\n"
    async with upstream() as fake, gateway(fake) as edge:
        reader, writer = await edge.connect()
        writer.write(b"GET /health HTTP/1.1\r\n" + offer + b"\r\n")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in answer
        sent = POST + offer + b"content-length: %d\r\n\r\n" % len(body) + body
        status, error = await answer_to(edge, sent)
        assert (status, error["code"]) == (400, "upgrade_not_supported")


@on_loop
async def test_pipelined_requests_are_answered_in_order() -> None:
    """Two requests in one write, the second half-sent at first: two whole answers."""
    get = b"GET /v1/models/%s HTTP/1.1\r\nhost: localhost\r\n\r\n"
    async with upstream() as fake, gateway(fake) as edge:
        reader, writer = await edge.connect()
        both = get % b"m" + get % b"n"
        writer.write(both[:-10])
        await reader.readuntil(b'"max_model_len":64}')
        writer.write(both[-10:])
        assert b"HTTP/1.1 404 " in await reader.readuntil(b"model_not_found")
        writer.close()


WHOLE = b"content-length: %d\r\n\r\n" % len(json.dumps(HELLO)) + json.dumps(HELLO).encode()
BROKEN_BODY = POST + b"transfer-encoding: chunked\r\n\r\nxyz\r\n"
LONG_HEADERS = b"GET /health HTTP/1.1\r\nx: " + b"y" * 70_000


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (POST + WHOLE + b"GARBAGE\r\n\r\n", [200, 400]),
        (POST + WHOLE + b"\x16\x03\x01\x02", [200, 400]),
        ((POST + WHOLE) * 3 + b"GARBAGE\r\n\r\n", [200, 200, 200, 400]),
        (POST + WHOLE + BROKEN_BODY, [200, 400]),
        ((POST + WHOLE) * 2 + BROKEN_BODY, [200, 200, 400]),
        (b"HEAD /health HTTP/1.1\r\nhost: localhost\r\n\r\nGARBAGE\r\n\r\n", [200, 400]),
        (POST + b"connection: close\r\n" + WHOLE + b"GARBAGE\r\n\r\n", [200]),
        (POST + WHOLE + LONG_HEADERS, [200, 431]),
        (BROKEN_BODY + POST + WHOLE, [400]),
        (b"GARBAGE\r\n\r\n" + POST + WHOLE, [400]),
    ],
)
@on_loop
async def test_what_cannot_be_read_is_refused_once_what_came_before_it_is_answered(
    sent: bytes, statuses: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """The bug: nothing was answered, and each had an error in the log, which anybody could fill."""
    async with upstream() as fake, gateway(fake) as edge:
        reader, writer = await edge.connect()
        writer.write(sent)
        told = await reader.read()
        assert [int(one) for one in re.findall(rb"HTTP/1.1 (\d{3}) ", told)] == statuses
        assert len(fake.requests) == statuses.count(200) - (sent[:4] == b"HEAD")
        await alive(edge)
    assert [one.getMessage() for one in caplog.records if one.levelname != "INFO"] == []


@on_loop
async def test_garbage_inside_a_stream_ends_it_no_sooner() -> None:
    """It is told when the stream is over; what comes meanwhile is read away."""
    release = asyncio.Event()
    async with upstream(held(release, b"data: {}\n\n")) as fake, gateway(fake) as edge:
        reader, writer = await edge.send(STREAMED)
        await reader.readuntil(b"data: {}")
        for _ in range(3):
            writer.write(b"GARBAGE\r\n\r\n")
            await edge.client.get("/health")
        release.set()
        stream, _, refusal = (await reader.read()).partition(b"HTTP/1.1 400 ")
        assert stream.endswith(b"0\r\n\r\n")
        assert b"[DONE]" in stream
        assert b"connection: close" in refusal


@on_loop
async def test_requests_beyond_the_limit_are_503_with_retry_after() -> None:
    """Shed at once, before their body is read; a place that is given back serves the next."""

    async def answer(peer: Peer) -> None:
        await peer.head()
        await asyncio.Event().wait()

    async with upstream(answer) as fake, gateway(fake, max_in_flight=2) as edge:
        held = [await edge.send(STREAMED) for _ in range(2)]
        await until(lambda: fake.running == 2)
        response = await edge.post(HELLO)
        assert problem(response, 503)["code"] == "overloaded"
        assert response.headers["retry-after"] == "1"
        held[0][1].close()
        await until(lambda: edge.pool.in_flight == 1)
        third = await edge.send(STREAMED)
        await until(lambda: len(fake.requests) == 3)
        held[1][1].close()
        third[1].close()
        await until(lambda: edge.pool.in_flight == 0)
