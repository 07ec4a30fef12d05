"""What strangers try: requests inside requests, bombs, names that are headers, others' caches."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from gateway.call import CHAT_PATH, parse_call, request_id
from gateway.keys import Keys
from policies.schema import Gateway, Tenant
from policies.slo import key_hash
from runtime.wire import Problem
from tests.gateway.world import HELLO, Front, gateway, on_loop, upstream

POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
BODY = json.dumps(HELLO).encode()
INNER = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


async def raw(edge: Front, data: bytes) -> bytes:
    """All that comes for these bytes, up to the end of the connection."""
    reader, writer = await edge.connect()
    writer.write(data)
    return await reader.read()


# ---- requests inside requests -------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: %d\r\ntransfer-encoding: chunked\r\n" % len(BODY),
        b"transfer-encoding: chunked\r\ncontent-length: %d\r\n" % len(BODY),
        b"content-length: %d\r\ncontent-length: %d\r\n" % (len(BODY), len(BODY) + 9),
        b"content-length: +%d\r\n" % len(BODY),
        b"content-length: -1\r\n",
        b"content-length: 0x10\r\n",
        b"content-length: %d, %d\r\n" % (len(BODY), len(BODY)),
        b"content-length: 99999999999999999999\r\n",
        b"transfer-encoding: chunked, identity\r\n",
        b"transfer-encoding: xchunked\r\n",
        b"transfer-encoding : chunked\r\n",
        b"transfer-encoding: chunked\r\ntransfer-encoding: gzip\r\n",
        b"content-length: %d\r\n folded: yes\r\n" % len(BODY),
        b"x\0y: 1\r\ncontent-length: %d\r\n" % len(BODY),
    ],
)
@on_loop
async def test_lengths_that_two_programs_could_read_differently_are_one_refusal(
    head: bytes,
) -> None:
    """Request smuggling: no second request is found inside, and none reaches a replica."""
    async with upstream() as fake, gateway(fake) as edge:
        answer = await raw(edge, POST + head + b"\r\n" + BODY + INNER)
        assert len(re.findall(rb"HTTP/1.1 [0-9]{3} ", answer)) == 1, answer
        assert b" 4" in answer.split(b"\r\n", 1)[0]
        assert fake.requests == []


@on_loop
async def test_what_goes_on_to_a_replica_has_one_length_of_our_own() -> None:
    """A chunked body arrives whole, with a content-length; trailers and extensions stay behind."""
    async with upstream() as fake, gateway(fake) as edge:
        size = b"%x;name=value\r\n" % len(BODY)
        chunked = size + BODY + b"\r\n0\r\nx-trailer: 1\r\n\r\n"
        answer = await raw(
            edge, POST + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n" + chunked
        )
        assert b" 200 " in answer.split(b"\r\n", 1)[0]
        (request,) = fake.requests
        assert request.body == BODY
        assert request.headers["content-length"] == str(len(BODY))
        assert not {"transfer-encoding", "x-trailer"} & set(request.headers)


# ---- bombs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * 200_000,
        b'{"model":"m","messages":[' + b"[" * 100_000 + b"]" * 100_000 + b"]}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"model":"m","messages":[{}],"seed":' + b"9" * 100_000 + b"}",
        b'{"model":"m","messages":[{}],"temperature":1e999}',
        b'{"model":"m","messages":[{}],"temperature":NaN}',
        b'{"model":"\xff","messages":[{}]}',
        b'{"model":"\\ud800","messages":[{}]}',
    ],
)
@on_loop
async def test_a_bomb_of_json_is_400_and_the_next_request_is_served(bomb: bytes) -> None:
    """Nesting without end, numbers beyond any, text that is none."""
    async with upstream() as fake, gateway(fake) as edge:
        response = await edge.post(bomb)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_json"
        assert (await edge.post(HELLO)).status_code == 200
        assert len(fake.requests) == 1


@on_loop
async def test_many_equal_keys_and_values_cost_no_more_than_their_bytes() -> None:
    """A megabyte of repeated keys is parsed once, and what it says last counts."""
    pairs = b",".join(b'"k%d":{}' % (n % 7) for n in range(100_000))
    async with upstream() as fake, gateway(fake) as edge:
        body = b'{"messages":[{}],' + pairs + b',"model":"x","model":"m"}'
        async with asyncio.timeout(5):
            assert (await edge.post(body)).status_code == 200
        assert fake.requests[0].body == body


# ---- names that are headers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", ["m\r\nx-evil: 1", "m\n\n", "../../v1/models", "m\0", "\u2028", "💥" * 1000]
)
@on_loop
async def test_a_models_name_becomes_no_header_and_no_path(model: str) -> None:
    async with upstream() as fake, gateway(fake) as edge:
        response = await edge.post(HELLO | {"model": model})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert "x-evil" not in response.headers
        assert fake.requests == []


@on_loop
async def test_bytes_that_end_a_header_end_no_header() -> None:
    """Session and request ids go on only as short printable text: a line end in one is refused by
    the parser, other control characters and long ones by us."""
    async with upstream() as fake, gateway(fake) as edge:
        length = b"content-length: %d\r\nconnection: close\r\n" % len(BODY)
        for name in (b"x-session-id", b"x-request-id", b"traceparent"):
            for value in (b"a\tb\x7f", b"\xff\xfe", b"s" * 5000):
                head = POST + name + b": " + value + b"\r\n" + length + b"\r\n"
                await raw(edge, head + BODY)
        for request in fake.requests:
            assert all(value.isprintable() and len(value) < 4097 for value in
                       request.headers.values())  # fmt: skip
            assert "x-session-id" not in request.headers


@given(st.binary(max_size=300))
def test_no_header_of_a_client_breaks_the_request_to_a_replica(value: bytes) -> None:
    """Whatever it holds: what goes on is printable ASCII, or nothing."""
    headers = [(b"x-session-id", value), (b"x-request-id", value), (b"traceparent", value)]
    own = request_id(headers)
    assert own.isprintable() and own.isascii() and own
    try:
        call = parse_call(CHAT_PATH, BODY, headers, own)
    except Problem as problem:
        assert problem.status == 400
    else:
        assert all(text.isascii() and text.isprintable() for text in call.headers.values())


# ---- keys ---------------------------------------------------------------------------------------


def test_a_key_is_compared_in_constant_time_whether_it_is_known_or_not() -> None:
    """What is compared is always two hashes of 64 digits, by hmac.compare_digest: for a key that
    nobody has, too."""
    compared: list[tuple[str, str]] = []

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    policy = Gateway(tenants={"t": Tenant(keys=(key_hash("right"),))})
    keys = replace(Keys.of(policy), compare=compare)
    assert keys.tenant([(b"authorization", b"Bearer right")]).name == "t"
    for wrong in (b"wrong", b"", b"right!", b"x" * 4000):
        with pytest.raises(Problem):
            keys.tenant([(b"authorization", b"Bearer " + wrong)])
    assert Keys.of(policy).compare is hmac.compare_digest
    assert len(compared) == 5
    assert all(len(a) == len(b) == 64 for a, b in compared)


@on_loop
async def test_two_tenants_never_meet_in_a_replicas_cache() -> None:
    """A replica that finds prompts by their salt and text, as own workers and vLLM do: what one
    tenant has sent no other finds, whatever salt it sends; its own it finds again."""
    held: set[str] = set()

    async def caching(peer: Any) -> None:
        body = json.loads(peer.request.body)
        entry = json.dumps([body.get("cache_salt"), body["messages"]])
        cached = 20 if entry in held else 0
        held.add(entry)
        details = {"cached_tokens": cached}
        usage = {"prompt_tokens": 20, "completion_tokens": 1, "prompt_tokens_details": details}
        await peer.json({"choices": [], "usage": usage})

    tenants = {
        name: Tenant(keys=(key_hash(name),), isolate=name != "open")
        for name in ("victim", "thief", "open")
    }
    async with upstream(caching) as fake, gateway(fake, tenants=tenants) as edge:

        async def cached(name: str, **more: Any) -> int:
            key = {"authorization": f"Bearer {name}"}
            answer = (await edge.post(HELLO | more, headers=key)).json()
            return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert await cached("victim") == 0
        assert await cached("victim") == 20
        salt = json.loads(fake.requests[0].body)["cache_salt"]
        assert await cached("thief") == 0
        assert await cached("thief", cache_salt=salt) == 0
        assert await cached("open") == 0
        assert await cached("victim") == 20
