"""Answers that are given again and prompts that are cut, through a listening gateway."""

from __future__ import annotations

import json
import time
from typing import Any

from gateway.admission import ANSWER_TOKENS
from gateway.keys import Known
from gateway.limits import rules_of
from policies.slo import Tenant, key_hash
from tests.gateway.world import DONE, HELLO, Peer, gateway, on_loop, upstream

GREEDY = HELLO | {"temperature": 0}
PRINT = b'{"system_fingerprint": "fp_1"}'
CACHE = {"tiers": ["standard"]}


async def tell(peer: Peer) -> None:
    """An answer with its fingerprint and finish reason, streamed in pieces where asked for."""
    choice = {"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}
    chunk = json.dumps({"system_fingerprint": "fp_1", "choices": [choice]}).encode()
    if json.loads(peer.request.body).get("stream"):
        await peer.stream(b"data: " + chunk[:20], chunk[20:] + b"\n\n", DONE)
    else:
        await peer.json(chunk)


@on_loop
async def test_the_same_request_is_answered_once() -> None:
    """Whole and streamed, byte for byte; only the request's id is new."""
    async with (
        upstream(tell, fingerprint=PRINT) as one,
        upstream(tell, fingerprint=PRINT) as two,
        gateway(one, two, response_cache=CACHE) as edge,
    ):
        for asked in (GREEDY, GREEDY | {"stream": True}):
            first, again = [await edge.post(asked) for _ in range(2)]
            assert again.content == first.content
            assert again.headers["content-type"] == first.headers["content-type"]
            assert "x-headgate-cache" not in first.headers
            assert again.headers["x-headgate-cache"] == "hit"
            assert again.headers["x-request-id"] != first.headers["x-request-id"]
        assert len(one.requests) + len(two.requests) == 2
        told = (await edge.client.get("/health")).json()["response_cache"]
        assert (told["hits"], told["misses"], told["entries"]) == (2, 2, 2)


@on_loop
async def test_an_answer_that_is_given_again_counts_as_a_request_and_takes_no_tokens() -> None:
    """It passed by its tenant's limits once: the same request could be repeated without end."""
    rights = Tenant(keys=(key_hash("a"),), requests_per_minute=3, tokens_per_day=100_000)
    async with (
        upstream(tell, fingerprint=PRINT) as one,
        gateway(one, response_cache=CACHE, tenants={"acme": rights}) as edge,
    ):
        asked = [await edge.post(GREEDY, headers={"authorization": "Bearer a"}) for _ in range(4)]
        budget = rules_of(Known("acme", rights), time.time()).wants(0)[0][1:]
        assert [answer.status_code for answer in asked] == [200, 200, 200, 429]
        assert [answer.headers.get("x-headgate-cache") for answer in asked[:2]] == [None, "hit"]
        left = [answer.headers["x-ratelimit-remaining-requests"] for answer in asked]
        assert left == ["2", "1", "0", "0"]
        assert asked[3].json()["error"]["type"] == "requests"
        assert len(one.requests) == 1
        spent = 100_000 - (await edge.live.edge.state.store.take(budget)).left[0]
        assert ANSWER_TOKENS <= spent < 2 * ANSWER_TOKENS  # as estimated, of the first one alone


@on_loop
async def test_what_is_not_sure_is_asked_again() -> None:
    """Sampled, of another tier, cut off, or while replicas serve different things."""

    async def cut(peer: Peer) -> None:
        await peer.stream(b'data: {"system_fingerprint":"fp_1","finish_reason":"stop"}\n\n')

    async def ask_twice(edge: Any, asked: dict[str, Any], **more: Any) -> None:
        for _ in range(2):
            answer = await edge.post(asked, **more)
            assert "x-headgate-cache" not in answer.headers

    async with upstream(tell, fingerprint=PRINT) as one:
        async with gateway(one, response_cache=CACHE) as edge:
            await ask_twice(edge, HELLO)
            await ask_twice(edge, GREEDY, headers={"x-headgate-tier": "batch"})
        async with (
            upstream(tell, fingerprint=b'{"system_fingerprint": "fp_2"}') as other,
            gateway(one, other, response_cache=CACHE) as edge,
        ):
            await ask_twice(edge, GREEDY)
        async with gateway(one) as edge:
            await ask_twice(edge, GREEDY)
    async with (
        upstream(cut, fingerprint=PRINT) as one,
        gateway(one, response_cache=CACHE) as edge,
    ):
        await ask_twice(edge, GREEDY | {"stream": True})
        assert len(one.requests) == 2


@on_loop
async def test_a_long_conversation_is_cut_on_its_way() -> None:
    """The replica gets fewer messages and the rest of the body as it came."""
    messages = [{"role": "system", "content": "be brief"}]
    for at in range(30):
        messages += [{"role": "user", "content": f"{at} " + "words " * 20}]
        messages += [{"role": "assistant", "content": "more " * 20}]
    asked = HELLO | {"messages": [*messages, HELLO["messages"][0]], "foo_ext": {"a": 1}}
    async with (
        upstream(tell) as one,
        gateway(one, trim={"drop": "oldest", "budget_tokens": 500}) as edge,
    ):
        await edge.post(asked)
        await edge.post(GREEDY)
        sent = json.loads(one.requests[0].body)
        assert sent | {"messages": 0} == asked | {"messages": 0}
        assert sent["messages"][0] == messages[0]
        assert sent["messages"][-1] == HELLO["messages"][0]
        assert len(sent["messages"]) < 20
        assert json.loads(one.requests[1].body) == GREEDY
        told = (await edge.client.get("/health")).json()["trim"]
        assert told["cut_prompts"] == 1
        assert told["removed_tokens"] > 1000
