"""Web pages get nothing from a gateway that only loopback protects."""

from __future__ import annotations

import json

import pytest

from gateway.doorway import refuse_foreign
from policies.loopback import is_local
from runtime.wire import Problem
from tests.gateway.world import HELLO, gateway, on_loop, upstream


@pytest.mark.parametrize(
    "host",
    [
        b"localhost", b"LocalHost:8080", b"127.0.0.1", b"127.0.0.1:8080", b"127.8.9.10:1",
        b"[::1]", b"[::1]:8080",
    ],
)  # fmt: skip
def test_this_machine_by_any_of_its_names_is_let_in(host: bytes) -> None:
    assert is_local(host, "127.0.0.1")
    assert is_local(b"http://" + host, "127.0.0.1", origin=True)
    assert is_local(b"https://" + host, "127.0.0.1", origin=True)


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example", b"evil.example:8080", b"localhost.evil.example", b"127.0.0.1.evil.example",
        b"10.0.0.1", b"0.0.0.0", b"evil.example#localhost", b"localhost@evil.example",
        b"evil.example/localhost", b"localhost:x", b"[::1", b"", b"\xff", b"null",
        b"1" * 10_000, b"127.0.0.1, evil.example",
    ],
)  # fmt: skip
def test_any_other_name_is_not(host: bytes) -> None:
    assert not is_local(host, "127.0.0.1")
    assert not is_local(b"http://" + host, "127.0.0.1", origin=True)
    assert not is_local(host, "127.0.0.1", origin=True)


def test_an_origin_needs_a_scheme_of_the_web() -> None:
    assert not is_local(b"localhost", "127.0.0.1", origin=True)
    assert not is_local(b"file://localhost", "127.0.0.1", origin=True)


def test_every_host_counts_and_none_is_fine() -> None:
    """HTTP/1.0 knows no Host; of two, the second must not slip in."""
    refuse_foreign([], "127.0.0.1")
    two = [(b"host", b"localhost"), (b"host", b"evil.example")]
    with pytest.raises(Problem) as found:
        refuse_foreign(two, "127.0.0.1")
    assert found.value.code == "host_not_allowed"


@on_loop
async def test_a_page_from_elsewhere_makes_no_token() -> None:
    """A form-like POST needs no permission of ours: the browser sends it and adds its Origin."""
    async with upstream() as fake, gateway(fake) as edge:
        headers = {"origin": "https://evil.example", "content-type": "text/plain"}
        response = await edge.post(HELLO, headers=headers)
        assert response.status_code == 403
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == "origin_not_allowed"
        assert "https://evil.example" in error["message"]
        assert fake.requests == []
        local = {"origin": f"http://localhost:{edge.port}"}
        assert (await edge.post(HELLO, headers=local)).status_code == 200


@on_loop
async def test_a_name_that_was_rebound_to_this_machine_reads_nothing() -> None:
    """On every path, also on those that do not exist."""
    async with upstream() as fake, gateway(fake) as edge:
        for path in ("/health", "/v1/models", "/v1/models/m", "/v1/chat/completions", "/nothing"):
            response = await edge.client.get(path, headers={"host": f"evil.example:{edge.port}"})
            assert response.status_code == 403, path
            assert response.json()["error"]["code"] == "host_not_allowed"
            assert response.headers["x-request-id"]


@on_loop
async def test_a_request_without_a_host_is_answered() -> None:
    async with upstream() as fake, gateway(fake) as edge:
        reader, writer = await edge.connect()
        writer.write(b"GET /health HTTP/1.0\r\n\r\n")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert b" 200 " in head
        assert json.loads(body)["status"] == "ready"
