"""What a replica refuses comes back at once, and teaches nobody how fast it computes."""

from __future__ import annotations

import json
import random

import pytest

from cache.prefix_index import PrefixIndex
from gateway.call import CHAT_PATH, Call
from gateway.ladder import Ladder
from gateway.prompt import Prompt
from gateway.replica import Replica
from gateway.routing import Routing
from policies.routing import Routing as Policy
from tests.gateway.world import DONE, Peer, gateway, on_loop, upstream

TOO_LONG = {"error": {"message": "too long", "code": "context_length_exceeded", "type": "x"}}


async def by_status(peer: Peer) -> None:
    await peer.json(TOO_LONG, status=400)


async def in_band(peer: Peer) -> None:
    """As vLLM and SGLang do it: 200, and an error as the first event."""
    error = {"error": {"message": "too long", "code": 400, "type": "context_length_exceeded"}}
    await peer.stream(b"data: " + json.dumps(error).encode() + b"\n\n", DONE)


@pytest.mark.parametrize("refuse", [by_status, in_band])
@on_loop
async def test_a_refusal_is_no_first_token(refuse: object) -> None:
    """One prompt of 60,000 tokens that was refused made a worker look a hundred times faster than
    it is: queue, routing and deadlines went by that."""

    async def answer(peer: Peer) -> None:
        if len(peer.request.body) > 10_000:
            await refuse(peer)  # type: ignore[operator]
        else:
            await peer.stream(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', DONE)

    def asked(text: str) -> dict[str, object]:
        return {"model": "m", "stream": True, "messages": [{"role": "user", "content": text}]}

    async with upstream(answer) as fake, gateway(fake) as edge:
        for number in range(8):
            assert (await edge.post(asked(f"word {number}"))).status_code == 200
        (replica,) = edge.pool.replicas
        seen_s = replica.ttft_s
        before = (await edge.client.get("/health")).json()
        answered = await edge.post(asked("word " * 50_000))
        assert b"too long" in answered.content
        after = (await edge.client.get("/health")).json()
        rates, known = after["routing"]["replicas"][fake.url], before["routing"]["replicas"]
        assert rates["first_tokens_seen"] == known[fake.url]["first_tokens_seen"] == 8
        assert rates["prefill_tokens_per_s"] == known[fake.url]["prefill_tokens_per_s"]
        assert rates["busy"] <= known[fake.url]["busy"]
        assert after["cached_tokens"] == before["cached_tokens"]
        assert replica.ttft_s == seen_s  # what a second attempt is sent by


def test_what_a_model_has_no_room_for_pushes_nothing_out() -> None:
    """A prompt longer than the model takes will be refused: what is known of others stays."""
    index = PrefixIndex()
    routing = Routing(Policy(), index, Ladder(), clock=lambda: 0.0, rng=random.Random(7))
    replica = Replica("http://r0", models={"m": {"max_model_len": 2048}}, healthy=True)
    index.size(replica.url, 64)

    def send(name: str, blocks: int) -> tuple[bytes, ...]:
        hashes = tuple(f"{name} {at}".encode() for at in range(blocks))
        call = Call(CHAT_PATH, "m", True, b"{}", data={})
        trip = routing.trip(call, Prompt(16 * blocks, hashes, exact=True), "standard", "t")
        assert trip.choose([replica], "m") is replica
        trip.book(replica).end()
        return hashes

    fits = send("fits", 40)
    refused = send("refused", 4000)
    assert index.match(fits, 0.0) == {replica.url: 40}
    assert index.match(refused, 0.0) == {}
