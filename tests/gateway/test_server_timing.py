"""`Server-Timing` on every answer to what asks for an answer of a model, refusals included."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping
from typing import Any

import pytest

from gateway.arrival import CLOCK_SET_S
from policies.schema import Tenant
from policies.slo import key_hash
from tests.gateway.test_given_again import GREEDY, PRINT, tell
from tests.gateway.world import (
    HELLO,
    STREAMED,
    Front,
    Peer,
    gateway,
    on_loop,
    refused_port,
    upstream,
)

CHAT = "/v1/chat/completions"
POST = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n".encode()
LENGTH = b"content-length: %d\r\n"
KEY = {"authorization": "Bearer right"}
TENANTS = {"t": Tenant(keys=(key_hash("right"),))}
BODY = json.dumps(HELLO).encode()


async def answered(edge: Front, data: bytes) -> tuple[int, float]:
    """Status and `total`, in seconds, of the answer to these bytes; it has one `Server-Timing`, and
    `total` is no more than the client saw."""
    reader, writer = await edge.connect()
    at = time.monotonic()
    writer.write(data)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    took_s = time.monotonic() - at
    writer.close()
    (timing,) = re.findall(r"^server-timing: (.*?)\r$", head, re.MULTILINE)
    (total,) = re.findall(r"(?:^|, )total;dur=([0-9.]+)$", timing)
    assert 0 <= float(total) / 1000 <= took_s + CLOCK_SET_S  # of two clocks that it reads
    return int(head.split(" ")[1]), float(total) / 1000


def request(
    body: Any = HELLO,
    headers: Mapping[str, str] | None = None,
    path: str = CHAT,
    method: str = "POST",
) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"host": "localhost", **(headers or {}), "content-length": str(len(data))}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {fields[name]}" for name in fields)]
    return "\r\n".join([*lines, "", ""]).encode() + data


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (403, request(headers={"host": "evil.example"})),
        (403, request(headers={"origin": "https://evil.example"})),
        (404, request(path=f"{CHAT}/")),
        (404, request(HELLO | {"model": "none"})),
        (405, request(method="GET")),
        (405, request(method="OPTIONS", path="/v1/completions")),
        (400, request(b"{")),
        (400, request({"model": "m"}, path="/v1/completions")),
        (400, request(headers={"x-headgate-tier": "none"})),
        (400, request(headers={"upgrade": "h2c", "connection": "upgrade"})),
        (413, POST + LENGTH % 10_000 + b"\r\n"),
        (413, POST + b"transfer-encoding: chunked\r\n\r\n800\r\n" + b" " * 0x800 + b"\r\n"),
        (415, request(headers={"content-encoding": "gzip"})),
        (408, POST + LENGTH % 9 + b"\r\n{"),
        (408, POST),
        (431, POST + b"x: " + b"y" * 70_000),
        (400, b"\x16\x03\x01\x02"),
        (400, POST + b"content-length: x\r\n\r\n"),
        (400, POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n"),
        (200, request(HELLO)),
        (200, request(STREAMED)),
    ],
)
@on_loop
async def test_an_answer_says_how_long_it_took(status: int, data: bytes) -> None:
    """Whoever refuses: the door, the router, the endpoint, the connection itself."""
    bounds = {"max_body_bytes": 1024, "body_timeout_s": 0.3}
    async with upstream() as fake, gateway(fake, **bounds) as edge:
        assert (await answered(edge, data))[0] == status


@on_loop
async def test_a_stranger_is_told_it_and_so_is_who_has_reached_a_limit() -> None:
    tenants = {"t": Tenant(keys=(key_hash("right"),), requests_per_minute=1)}
    async with upstream() as fake, gateway(fake, tenants=tenants) as edge:
        assert (await answered(edge, request()))[0] == 401
        wrong = {"authorization": "Bearer wrong"}
        assert (await answered(edge, request(headers=wrong)))[0] == 401
        assert (await answered(edge, request(headers=KEY)))[0] == 200
        assert (await answered(edge, request(headers=KEY)))[0] == 429


@on_loop
async def test_who_finds_no_replica_or_a_broken_one_is_told_it() -> None:
    """Also where the answer is the replica's own refusal."""

    async def broken(peer: Peer) -> None:
        peer.abort()

    async def refusing(peer: Peer) -> None:
        await peer.json({"error": {"message": "too long"}}, 400)

    async with gateway(refused_port(), wait=False) as edge:
        assert (await answered(edge, request()))[0] == 503
        edge.pool.draining = True
        assert (await answered(edge, request()))[0] == 503
    for answer, status in ((broken, 502), (refusing, 400)):
        for body in (HELLO, STREAMED):
            async with upstream(answer) as fake, gateway(fake) as edge:
                assert (await answered(edge, request(body)))[0] == status


@on_loop
async def test_an_answer_that_was_given_before_says_how_long_it_took_now() -> None:
    cache = {"tiers": ["standard"]}
    async with (
        upstream(tell, fingerprint=PRINT) as fake,
        gateway(fake, response_cache=cache) as edge,
    ):
        for _ in range(2):
            assert (await answered(edge, request(GREEDY)))[0] == 200
        assert len(fake.requests) == 1


@on_loop
async def test_the_time_counts_from_the_requests_first_byte() -> None:
    """What is refused for its slowness took as long as it was given; on a connection that has
    served before, the request before does not count."""
    async with upstream() as fake, gateway(fake, body_timeout_s=0.3) as edge:
        for data in (POST, POST + LENGTH % 9 + b"\r\n{"):
            status, total_s = await answered(edge, data)
            assert (status, total_s >= 0.29) == (408, True)
        reader, writer = await edge.connect()
        writer.write(request())
        await reader.readuntil(b'{"choices": []}')
        await asyncio.sleep(0.05)  # a client that thinks
        at = time.monotonic()
        writer.write(b"\x16\x03\x01")
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        took_s = time.monotonic() - at
    (total_ms,) = re.findall("server-timing: total;dur=([0-9.]+)\r", head)
    assert float(total_ms) / 1000 <= took_s + CLOCK_SET_S


@on_loop
async def test_pages_that_ask_no_model_have_none() -> None:
    async with upstream() as fake, gateway(fake) as edge:
        for path in ("/health", "/metrics", "/v1/models", "/console", "/admin/traces"):
            page = await edge.client.get(path)
            assert (page.status_code, "server-timing" in page.headers) == (200, False), path
