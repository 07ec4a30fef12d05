"""All faults at once, at random, over several replicas: every client hears the truth."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from tests.gateway.scripted import (
    ASKED,
    TEXT,
    TOKENS,
    Engine,
    cut,
    fleet,
    garble,
    heard,
    refuse,
    stall,
)
from tests.gateway.world import Front, Peer, gateway, on_loop, until, upstream


def moody(name: str, rng: random.Random, share: float) -> tuple[Engine, object]:
    """An engine that breaks in `share` of its requests, each time in another way."""
    engine = Engine(name)

    async def reset(peer: Peer) -> None:
        peer.abort()

    async def silent(_: Peer) -> None:
        await asyncio.Event().wait()

    async def answer(peer: Peer) -> None:
        if rng.random() >= share:
            await engine.say(peer)
            return
        after = rng.randrange(len(TOKENS) + 1)
        ways = [
            cut(engine, after), stall(engine, after), garble(engine, after), reset, silent,
            refuse(429, "busy", retry_after="0.05"), refuse(503, "busy"), refuse(500, "internal"),
        ]  # fmt: skip
        await rng.choice(ways)(peer)

    return engine, answer


@pytest.mark.parametrize("kind", ["headgate", "vllm"])
@pytest.mark.parametrize("seed", [1, 2])
@on_loop
async def test_whole_answers_or_the_truth_and_nothing_left(kind: str, seed: int) -> None:
    """A hundred and twenty streams, some of whose clients leave: each that stays has all of the
    text, or a beginning of it and an error; most have all; nothing is kept anywhere."""
    rng = random.Random(seed)
    answers = [moody(name, rng, share)[1] for name, share in (("a", 0.5), ("b", 0.2), ("c", 0.2))]
    outcomes: Counter[str] = Counter()
    async with (
        upstream(answers[0]) as one,
        upstream(answers[1]) as two,
        upstream(answers[2]) as three,
    ):
        replicas = fleet(one, two, three, kind=kind)
        replicas[0].weight = 1.0
        async with gateway(
            *replicas,
            resume="auto",
            idle_timeout_s=1.0,
            first_byte_timeout_s=10.0,
            keep_alive_s=0.1,
            retries={
                "max_attempts": 6,
                "budget_share": 1.0,
                "budget_min_per_s": 20.0,
                "headers_failover_s": 0.5,
                "ttft_failover_s": 0.8,
            },
            breaker={"failures": 20, "open_s": 0.05},
            hedge={"budget_share": 0.2, "after_s": 0.05, "ttft_s": 0.1},
        ) as edge:
            await asyncio.gather(*(visit(edge, rng, outcomes) for _ in range(120)))
            await until(lambda: edge.pool.in_flight == 0)
            await until(lambda: one.running + two.running + three.running == 0)
            assert [replica.in_flight for replica in edge.pool.replicas] == [0, 0, 0]
    stayed = sum(outcomes.values()) - outcomes["left"]
    assert outcomes["whole"] >= 0.7 * stayed, outcomes  # all, on a machine that is not busy


async def visit(edge: Front, rng: random.Random, outcomes: Counter[str]) -> None:
    await asyncio.sleep(rng.random())
    if rng.random() < 0.2:
        _, writer = await edge.send(ASKED)
        await asyncio.sleep(rng.random() / 20)
        writer.transport.abort()
        outcomes["left"] += 1
        return
    response = await edge.post(ASKED)
    if response.status_code != 200:
        assert response.json()["error"]["code"]
        outcomes[str(response.status_code)] += 1
        return
    got = heard(response.content)
    assert TEXT.startswith(got.text)
    assert (got.done, len(got.ids) <= 1, got.roles <= 1) == (1, True, True)
    assert got.text == TEXT or got.error is not None
    outcomes["whole" if got.error is None else "told"] += 1
    if got.error is None:
        assert got.usage is not None
        assert got.usage["total_tokens"] == 9 + len(TOKENS)
