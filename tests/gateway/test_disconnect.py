"""A client that goes takes its request with it, in every phase, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import random
import time

import pytest

from tests.gateway.world import DONE, HELLO, STREAMED, Fake, Peer, gateway, on_loop, until, upstream

CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


async def prefill(peer: Peer) -> None:
    await asyncio.Event().wait()


async def flow(peer: Peer) -> None:
    await peer.head()
    while True:
        await peer.chunk(CHUNK)
        await asyncio.sleep(0.005)


async def slow(peer: Peer) -> None:
    await peer.head()
    await peer.chunk(CHUNK)
    await asyncio.Event().wait()


async def left(fake: Fake, since: float) -> float:
    """Seconds until the upstream saw its connection closed; reported, and generously bounded."""
    await until(lambda: fake.left_at is not None and fake.running == 0)
    assert fake.left_at is not None
    return fake.left_at - since


@pytest.mark.parametrize("payload", [HELLO, STREAMED], ids=["whole", "stream"])
@pytest.mark.parametrize("answer", [prefill, flow, slow])
@on_loop
async def test_a_disconnect_cancels_the_replica_in_every_phase(answer, payload) -> None:
    """During prefill, while chunks flow and between slow chunks; usually within a few ms."""
    async with upstream(answer) as fake, gateway(fake) as edge:
        reader, writer = await edge.send(payload)
        await until(lambda: fake.running == 1)
        if payload is STREAMED and answer is not prefill:
            await reader.readuntil(CHUNK)
        else:
            await asyncio.sleep(0.02)
        since = time.perf_counter()
        writer.close()
        seconds = await left(fake, since)
        print(f"{answer.__name__}: upstream closed after {1000 * seconds:.1f} ms")
        assert seconds < 0.5


@on_loop
async def test_a_reset_cancels_the_replica_too() -> None:
    """A client that vanishes with a reset counts like one that closes."""
    async with upstream(slow) as fake, gateway(fake) as edge:
        reader, writer = await edge.send(STREAMED)
        await reader.readuntil(CHUNK)
        since = time.perf_counter()
        writer.transport.abort()
        assert await left(fake, since) < 0.5


@on_loop
async def test_a_client_that_goes_inside_its_body_leaves_nothing() -> None:
    """No replica was asked, no place is kept."""
    async with upstream() as fake, gateway(fake) as edge:
        _, writer = await edge.connect()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"
        )
        await until(lambda: edge.pool.in_flight == 1)
        writer.close()
        await until(lambda: edge.pool.in_flight == 0)
        assert fake.requests == []


@on_loop
async def test_sixty_four_streams_with_random_disconnects_leave_nothing_behind() -> None:
    """Two seconds of clients that come and go: no place, task or upstream stays."""
    rng = random.Random(7)

    async def answer(peer: Peer) -> None:
        pause = json.loads(peer.request.body)["pause"]
        await asyncio.sleep(pause)
        await peer.head()
        for _ in range(20):
            await peer.chunk(CHUNK)
            await asyncio.sleep(pause)
        await peer.chunk(DONE)
        await peer.end()

    outcomes = {"left": 0, "whole": 0}

    async def visitor(edge, deadline: float) -> None:
        while time.perf_counter() < deadline:
            pause = rng.choice((0.001, 0.01, 0.05))
            reader, writer = await edge.send(STREAMED | {"pause": pause})
            try:
                patience = rng.uniform(0, 0.3)
                await asyncio.wait_for(reader.readuntil(DONE), patience)
                outcomes["whole"] += 1
            except TimeoutError:
                outcomes["left"] += 1
            writer.close() if rng.random() < 0.5 else writer.transport.abort()

    async with (
        upstream(answer) as one,
        upstream(answer) as two,
        gateway(one, two, keep_alive_s=0.02) as edge,
    ):
        before = len(asyncio.all_tasks())
        deadline = time.perf_counter() + 2
        await asyncio.gather(*(visitor(edge, deadline) for _ in range(64)))
        await until(lambda: edge.pool.in_flight == 0)
        await until(lambda: one.running + two.running == 0)
        assert all(replica.in_flight == 0 for replica in edge.pool.replicas)
        idle = one.connections + two.connections  # each kept-alive one has a task in its fake
        await until(lambda: len(asyncio.all_tasks()) <= before + idle)
        mine = [
            task
            for task in asyncio.all_tasks()
            if "gateway" in task.get_coro().__qualname__ + task.get_coro().cr_code.co_filename
            and "/tests/" not in task.get_coro().cr_code.co_filename
        ]
        assert len(mine) == 2, mine  # the two probes
        assert min(outcomes.values()) > 20, outcomes
