"""Bytes go through the gateway as they came, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, strategies as st

from gateway.replica import Replica
from gateway.reply import Reply
from tests.gateway.world import (
    DONE,
    HELLO,
    STREAMED,
    Peer,
    gateway,
    on_loop,
    pong,
    upstream,
)

RECORDED = Path(__file__).parents[2] / ".." / "shared" / "data" / "openai" / "recorded.jsonl"


@on_loop
async def test_the_request_body_reaches_the_replica_byte_for_byte() -> None:
    """Spacing, key order, escapes, big integers and unknown fields are not touched."""
    body = (
        b'{ "foo_ext":{"a":[1,  2.50,1e40]},"stream":null,\n '
        b'"messages" :[{"content":"\\u00e9\xc3\xa9",'
        b'"role":"user","x":1}], "top_k":3,"model":"m", "seed":18446744073709551615 }'
    )
    async with upstream() as fake, gateway(fake) as edge:
        response = await edge.post(body)
        assert response.status_code == 200
        assert fake.requests[0].body == body


@on_loop
async def test_a_large_body_reaches_the_replica_byte_for_byte() -> None:
    """5 MB go through without a copy of their meaning, and without a warning."""
    body = json.dumps(HELLO | {"pad": "x" * 5_000_000}).encode()
    async with upstream() as fake, gateway(fake) as edge:
        assert (await edge.post(body)).status_code == 200
        assert fake.requests[0].body == body


@on_loop
async def test_a_chunked_body_reaches_the_replica_whole() -> None:
    """A client that does not know its length in advance is served as well."""
    body = json.dumps(HELLO).encode()

    async def pieces() -> Any:
        for at in range(0, len(body), 7):
            yield body[at : at + 7]

    async with upstream() as fake, gateway(fake) as edge:
        response = await edge.client.post("/v1/chat/completions", content=pieces())
        assert response.status_code == 200
        assert fake.requests[0].body == body


@on_loop
async def test_an_answer_comes_back_byte_for_byte_with_its_status_and_type() -> None:
    """Neither re-serialised nor re-headed; framing headers are the gateway's own."""
    body = b'{"b" : 1,\n"a":"\\u00e9"}'

    async def answer(peer: Peer) -> None:
        await peer.json(body, openai_processing_ms="7", connection="keep-alive")

    async with upstream(answer) as fake, gateway(fake) as edge:
        response = await edge.post(HELLO)
        assert response.content == body
        assert response.headers["content-type"] == "application/json"
        assert response.headers["openai-processing-ms"] == "7"
        assert response.headers["content-length"] == str(len(body))
        assert "connection" not in response.headers


@on_loop
async def test_an_error_of_the_replica_is_relayed_as_it_is() -> None:
    """Status, body and Retry-After of a refusal are the replica's."""
    body = b'{"error":{"message":"slow down","type":"x","param":null,"code":"rate"}}'

    async def answer(peer: Peer) -> None:
        await peer.json(body, status=429, retry_after="9")

    async with upstream(answer) as fake, gateway(fake) as edge:
        for payload in (HELLO, STREAMED):
            response = await edge.post(payload)
            assert (response.status_code, response.content) == (429, body)
            assert response.headers["retry-after"] == "9"


@pytest.mark.parametrize("status", [600, 999])
@on_loop
async def test_a_status_that_http_does_not_have_is_502(status: int) -> None:
    """The bug: its client heard nothing, on a connection that stayed open."""

    async def answer(peer: Peer) -> None:
        await peer.json({"choices": []}, status=json.loads(peer.request.body)["n"])

    async with upstream(answer) as fake, gateway(fake, retries={"max_attempts": 1}) as edge:
        assert (await edge.post(HELLO | {"n": 599})).status_code == 599
        response = await edge.post(HELLO | {"n": status})
        assert response.status_code == 502
        assert f"its status is {status}" in response.json()["error"]["message"]


@on_loop
async def test_completions_take_the_same_way() -> None:
    """/v1/completions is relayed to the same path, with token ids as the prompt."""
    async with upstream() as fake, gateway(fake) as edge:
        payload = {"model": "m", "prompt": [[1, 2, 3]], "echo": True}
        assert (await edge.post(payload, "/v1/completions")).status_code == 200
        assert fake.requests[0].path == "/v1/completions"
        assert json.loads(fake.requests[0].body) == payload


@on_loop
async def test_headers_that_matter_reach_our_workers_and_others_do_not() -> None:
    """Ids, session, targets, tier and trace go on; cookies, the client's key and its host stay."""
    sent = {
        "x-request-id": "r-1",
        "x-correlation-id": "c-1",
        "x-session-id": "s-1",
        "x-session-affinity": "a-1",
        "x-slo-ttft-ms": "200",
        "x-headgate-tier": "batch",
        "x-headgate-route": "summaries",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03",
        "tracestate": "v=1",
    }
    kept_back = {"cookie": "c=1", "authorization": "Bearer sk-client", "x-other": "1"}
    async with upstream() as fake, gateway(fake) as edge:
        response = await edge.post(HELLO, headers=sent | kept_back)
        got = fake.requests[0].headers
        joined = got["traceparent"].split("-")  # the trace goes on, in a span of ours
        assert [*sent["traceparent"].split("-")[:2], "03"] == [*joined[:2], joined[3]]
        assert {name: got.get(name) for name in sent} == sent | {"traceparent": "-".join(joined)}
        assert not set(kept_back) & set(got)
        assert got["accept-encoding"] == "identity"
        assert response.headers["x-request-id"] == "r-1"


@on_loop
async def test_a_target_that_cannot_go_on_is_refused() -> None:
    """A request is not served without the deadline that it names."""
    async with upstream() as fake, gateway(fake) as edge:
        response = await edge.post(HELLO, headers={b"x-slo-deadline-ms": "٣٠٠".encode()})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "x-slo-deadline-ms"
        assert fake.requests == []


@on_loop
async def test_an_answer_always_has_a_request_id() -> None:
    """Made by the gateway when the client sent none, or one that is no plain short text."""
    async with upstream() as fake, gateway(fake) as edge:
        for headers in ({}, {"x-request-id": "x" * 500}):
            response = await edge.post(HELLO, headers=headers)
            assert response.headers["x-request-id"].startswith("req_")
            assert fake.requests[-1].headers["x-request-id"] == response.headers["x-request-id"]
        assert (await edge.post(b"{")).headers["x-request-id"].startswith("req_")


@on_loop
async def test_an_upstream_with_its_own_key_never_sees_the_clients() -> None:
    """A foreign server gets its configured key; one without gets what the client sent."""
    headers = {"authorization": "Bearer sk-client"}
    async with upstream(models=("keyed",)) as keyed, upstream(models=("open",)) as plain:
        replicas = (Replica(keyed.url, api_key="sk-own"), Replica(plain.url))
        async with gateway(*replicas) as edge:
            for model in ("keyed", "open"):
                assert (await edge.post(HELLO | {"model": model}, headers=headers)).is_success
        assert keyed.requests[0].headers["authorization"] == "Bearer sk-own"
        assert plain.requests[0].headers["authorization"] == "Bearer sk-client"


@on_loop
async def test_a_stream_comes_back_byte_for_byte_with_streaming_headers() -> None:
    """Comments, odd spacing and CRLF line ends included; nothing between may cache or buffer."""
    chunks = (b": hello\r\n\r\n", b"event: x\r\ndata:{}\r\n\r\n", b'data: {"a" : 1}\n\n', DONE)

    async def answer(peer: Peer) -> None:
        await peer.stream(*chunks)

    async with upstream(answer) as fake, gateway(fake) as edge:
        response = await edge.post(STREAMED)
        assert response.content == b"".join(chunks)
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"


@on_loop
async def test_connections_to_the_replica_are_kept_alive() -> None:
    """Twenty streams and answers one after another need one connection beyond the probe's."""
    async with upstream() as fake, gateway(fake) as edge:
        for _ in range(10):
            await edge.post(STREAMED)
            await edge.post(HELLO)
        assert len(fake.requests) == 20
        assert fake.connections <= 2


class Sent:
    """Collects what a Reply sends."""

    def __init__(self) -> None:
        self.body = b""

    async def __call__(self, message: Any) -> None:
        self.body += message.get("body", b"")

    def stream(self, chunk: bytes) -> bool:
        self.body += chunk
        return True

    def when_writable(self, go_on: Any) -> None:
        raise AssertionError("it is always writable")

    asked = True

    def when_gone(self, leave: Any) -> bool:
        raise AssertionError("nobody goes")


def drive(coroutine: Any) -> None:
    with pytest.raises(StopIteration):
        coroutine.send(None)


@given(st.data())
def test_the_terminator_is_found_however_the_stream_is_split(data: st.DataObject) -> None:
    """Every split of a stream passes the same bytes, and only a real terminator line counts."""
    text = json.dumps({"content": "a\ndata: [DONE]\n b data: [DONE]"}).encode()
    line_end = data.draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
    ended = data.draw(st.booleans())
    stream = b"data: " + text + line_end * 2
    if ended:
        stream += b"data:" + data.draw(st.sampled_from([b" ", b""])) + b"[DONE]" + line_end * 2
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    sent = Sent()
    reply = Reply(sent, "id", sent)
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        assert reply.write(stream[start:stop])
    assert sent.body == stream
    assert reply.terminated is ended
    if ended:
        drive(reply.end_stream())
        assert sent.body == stream


def recorded() -> list[dict[str, Any]]:
    """Answers of real servers; /v1/responses is not served here."""
    if not RECORDED.exists():
        return []
    rows = map(json.loads, RECORDED.read_text().splitlines())
    return [row for row in rows if row["path"] in ("/v1/chat/completions", "/v1/completions")]


@pytest.mark.skipif(not RECORDED.exists(), reason="recorded.jsonl is not beside this checkout")
@on_loop
async def test_recorded_answers_of_real_servers_pass_byte_for_byte_and_parse() -> None:
    """Every recorded answer arrives as recorded, and the OpenAI SDK reads it on the way."""
    rows = recorded()
    assert len(rows) >= 10
    body = b""
    kind = ""

    async def answer(peer: Peer) -> None:
        await peer.head(kind=kind)
        for at in range(0, len(body), 61):
            await peer.chunk(body[at : at + 61])
        await peer.end()

    async with upstream(answer) as fake, gateway(fake) as edge:
        sdk = openai.AsyncOpenAI(base_url=f"{edge.url}/v1", api_key="none", max_retries=0)
        async with sdk:
            for row in rows:
                body, kind = row["body"].encode(), row["content_type"]
                stream = kind.startswith("text/event-stream")
                chat = row["path"] == "/v1/chat/completions"
                payload = (HELLO if chat else {"model": "m", "prompt": "hi"}) | {"stream": stream}
                got = await edge.post(payload, row["path"])
                assert got.content == body, row["name"]
                assert got.headers["content-type"] == kind
                endpoint = sdk.chat.completions if chat else sdk.completions
                answered = await endpoint.create(**payload)
                if stream:
                    chunks = [chunk async for chunk in answered]
                    assert len(chunks) == body.count(b"data: {")
                else:
                    assert answered.choices


@on_loop
async def test_the_sdk_reads_problems_as_its_own_errors() -> None:
    """The OpenAI SDK turns the gateway's problems into its typed exceptions with code and param."""
    async with upstream(pong) as fake, gateway(fake) as edge:
        sdk = openai.AsyncOpenAI(base_url=f"{edge.url}/v1", api_key="none", max_retries=0)
        async with sdk:
            with pytest.raises(openai.NotFoundError) as caught:
                await sdk.chat.completions.create(**HELLO | {"model": "nope"})
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
            assert [model.id async for model in sdk.models.list()] == ["m"]
            assert (await sdk.models.retrieve("m")).owned_by == "unknown"
