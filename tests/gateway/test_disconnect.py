"""A client that goes takes its request with it, in every phase, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gateway.world import (
    DONE,
    HELLO,
    STREAMED,
    Fake,
    Front,
    Peer,
    gateway,
    on_loop,
    until,
    upstream,
)

GATEWAY = Path(__file__).parents[2] / "gateway"
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


NAP_S, NAPS_MAX = 0.005, 10  # 50 ms, the limit that the gateway keeps


async def within_naps(holds: Callable[[], bool]) -> int:
    """Naps of 5 ms until it holds: at most 50 ms of them.

    On a busy machine each nap takes longer, and so does what is waited for: the number stays.
    """
    naps = 0
    while not holds():
        await asyncio.sleep(NAP_S)
        naps += 1
        assert naps < NAPS_MAX, "the upstream is still asked"
    return naps


async def left(fake: Fake) -> int:
    """Naps until the upstream saw its connection closed."""
    return await within_naps(lambda: fake.was_left and not fake.running)


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
        writer.close()
        naps = await left(fake)
        print(f"{answer.__name__}: upstream closed within {naps} naps of {1000 * NAP_S:g} ms")


@on_loop
async def test_a_reset_cancels_the_replica_too() -> None:
    """A client that vanishes with a reset counts like one that closes."""
    async with upstream(slow) as fake, gateway(fake) as edge:
        reader, writer = await edge.send(STREAMED)
        await reader.readuntil(CHUNK)
        writer.transport.abort()
        await left(fake)


@on_loop
async def test_a_client_that_goes_takes_a_pipelined_request_with_it() -> None:
    """What waits behind the answer under way hides neither from the disconnect."""
    async with upstream(slow) as fake, gateway(fake) as edge:
        reader, writer = await edge.connect()
        body = json.dumps(STREAMED).encode()
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
        )
        writer.write((head % len(body) + body) * 2)
        await reader.readuntil(CHUNK)
        writer.close()
        await left(fake)
        await until(lambda: edge.pool.in_flight == 0)
        assert len(fake.requests) == 1


@on_loop
async def test_a_client_that_goes_inside_its_body_leaves_nothing() -> None:
    """No replica was asked, no place is kept."""
    async with upstream() as fake, gateway(fake) as edge:
        _, writer = await edge.connect()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{"
        )
        await until(lambda: edge.pool.in_flight == 1)
        writer.close()
        await until(lambda: edge.pool.in_flight == 0)
        assert fake.requests == []


async def short_stream(peer: Peer) -> None:
    """Twenty chunks, at the pace that the request asks for."""
    pause_s = json.loads(peer.request.body)["pause_s"]
    await asyncio.sleep(pause_s)
    await peer.head()
    for _ in range(20):
        await peer.chunk(CHUNK)
        await asyncio.sleep(pause_s)
    await peer.chunk(DONE)
    await peer.end()


async def visit(edge: Front, rng: random.Random) -> bool:
    """One stream, read whole or left: before its headers, after some chunks, by close or reset."""
    reader, writer = await edge.send(STREAMED | {"pause_s": rng.choice((0.001, 0.005, 0.02))})
    whole = rng.random() < 0.3
    if whole:
        await reader.readuntil(DONE)
    else:
        for _ in range(rng.randrange(10)):
            await reader.readline()
    writer.close() if rng.random() < 0.5 else writer.transport.abort()
    return whole


@on_loop
async def test_sixty_four_streams_with_random_disconnects_leave_nothing_behind() -> None:
    """Clients that come and go at any moment: no place, task or upstream stays."""
    rng = random.Random(7)

    async def visitor() -> int:
        return sum([await visit(edge, rng) for _ in range(6)])

    async with (
        upstream(short_stream) as one,
        upstream(short_stream) as two,
        gateway(one, two, keep_alive_s=0.02) as edge,
    ):
        standing = tasks_of_the_gateway()  # probes, and what else lives as long as the gateway
        whole = await asyncio.gather(*(visitor() for _ in range(64)))
        assert 50 < sum(whole) < 200
        await until(lambda: edge.pool.in_flight == 0)
        await until(lambda: one.running + two.running == 0)
        assert all(replica.in_flight == 0 for replica in edge.pool.replicas)
        await until(lambda: tasks_of_the_gateway() == standing)


def tasks_of_the_gateway() -> list[str]:
    """Tasks whose coroutine stands in the gateway's own code, by name."""
    codes = [task.get_coro().cr_code for task in asyncio.all_tasks()]
    return sorted(code.co_qualname for code in codes if Path(code.co_filename).parent == GATEWAY)
