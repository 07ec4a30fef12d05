"""64 concurrent streams whose clients leave at random: nothing leaks, nothing hangs.

HEADGATE_SOAK_S=60 for the full minute; the suite itself runs a few seconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.end_to_end.stack import CHAT, COMPLETIONS, DEFAULTS, LIMIT_S, Stack, assert_idle, until
from tests.gateway import world
from tests.gateway.world import gateway, on_loop

SOAK_S = float(os.environ.get("HEADGATE_SOAK_S", "8"))
STREAMS = 64
FLAT_BYTES = 24 * 2**20  # of drift in either process's memory
PHASES = ("stay", "headers", "half a body", "at once", "first chunk", "some chunks", "reset")


def request(rng: random.Random) -> bytes:
    path = rng.choice((CHAT, COMPLETIONS))
    body: dict[str, Any] = {
        "stream": rng.random() < 0.8,
        "max_tokens": rng.choice((1, 4, 16, 48)),
        "n": rng.choice((1, 1, 1, 2)),
        "temperature": rng.choice((0, 1)),
        "ignore_eos": True,
    }
    words = "Order 12 is packed. " * rng.choice((1, 5, 40))
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": words}]
    else:
        body["prompt"] = words
    sent = json.dumps(DEFAULTS[path] | body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    return f"{head}content-length: {len(sent)}\r\n\r\n".encode() + sent


async def one_client(port: int, rng: random.Random) -> str:
    """One request that is left in a random phase; how it ended."""
    data, phase = request(rng), rng.choice(PHASES)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        if phase in ("headers", "half a body"):
            cut = data.index(b"\r\n\r\n") + 4
            writer.write(data[: rng.randrange(1, cut if phase == "headers" else len(data))])
            await writer.drain()
            return phase
        writer.write(data)
        await writer.drain()
        if phase == "at once":
            return phase
        if phase == "first chunk":
            await reader.read(1)
            return phase
        if phase in ("some chunks", "reset"):
            for _ in range(rng.randrange(1, 20)):
                await reader.read(400)
            return phase
        answer = await reader.read()
        assert b" 200 OK" in answer[:30], answer[:400]
        whole = b"[DONE]" in answer or answer.endswith(b"}")
        assert whole, answer[-400:]
        assert b'"error"' not in answer
        return phase
    finally:
        if phase == "reset":
            writer.transport.abort()
        writer.close()


async def storm(port: int, duration_s: float, seed: int) -> Counter[str]:
    """64 clients, each one request after another, until the time is over."""
    ends: Counter[str] = Counter()
    until_s = time.perf_counter() + duration_s

    async def client(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        while time.perf_counter() < until_s:
            ends[await asyncio.wait_for(one_client(port, rng), LIMIT_S)] += 1

    await asyncio.gather(*(client(number) for number in range(STREAMS)))
    return ends


def programs(stack: Stack) -> Iterator[tuple[str, int]]:
    yield "gateway", stack.gateway.rss_bytes()
    yield "worker", stack.worker.rss_bytes()


def test_a_storm_of_disconnects_leaves_nothing_behind(stack: Stack) -> None:
    """Every block is back, no request is stuck in either process, and memory is flat."""
    warm_s = max(2.0, SOAK_S / 4)
    asyncio.run(storm(stack.port, warm_s, seed=1))
    assert_idle(stack.worker)
    before = dict(programs(stack))
    ends = asyncio.run(storm(stack.port, SOAK_S - warm_s, seed=2))
    idle_s = assert_idle(stack.worker)
    until(
        lambda: stack.gateway.health()["in_flight"] == 0, LIMIT_S, lambda: "the gateway is not idle"
    )
    after = dict(programs(stack))
    health = stack.worker.health()
    grown = {name: (after[name] - before[name]) / 2**20 for name in after}
    print(
        f"{sum(ends.values())} requests {dict(ends)}; idle after {idle_s * 1000:.0f} ms; "
        f"MiB grown {grown} to {after}; preemptions {health['preemptions']}"
    )
    assert set(ends) == set(PHASES)
    assert all(after[name] - before[name] < FLAT_BYTES for name in after), grown
    blocks = health["blocks"]
    assert blocks["free"] + blocks["cached"] + blocks["in_use"] == blocks["total"]
    assert stack.works()


@on_loop
async def test_no_task_is_left_behind_in_the_gateway(stack: Stack) -> None:
    """The same storm on a gateway in this process, whose tasks can be counted."""
    async with gateway(stack.worker.url) as edge:
        await storm(edge.port, 0.5, seed=3)  # connections to the worker are made meanwhile
        before = len(asyncio.all_tasks())
        await storm(edge.port, 1.5, seed=4)
        await world.until(lambda: not edge.pool.in_flight and len(asyncio.all_tasks()) <= before)
