"""A rollout of several gateways that share a Redis: all hear of it, and none outlives the news."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gateway.edge import Live, build
from gateway.replica import Replica
from gateway.state import open_state
from policies.schema import Deployment, Gateway, Runtime, StateStore
from tests.gateway.test_variants import PATH, broken, hi, observed, put, steer, told
from tests.gateway.world import HELLO, Fake, Front, listening, on_loop, until, upstream
from tests.redis_server import needs_redis, redis_server


@asynccontextmanager
async def sharing(url: str, fake: Fake) -> AsyncIterator[Front]:
    """One of the gateways that share a store."""
    settings = Gateway(store=StateStore(redis=url, timeout_ms=1000))
    deployment = Deployment(version=1, gateway=settings, runtime=Runtime())
    state = open_state(settings, {}, Path())
    live = Live(build(deployment, [Replica(fake.url, own=True)], state=state))
    async with listening(live) as front:
        await until(lambda: all(replica.healthy for replica in front.pool.replicas))
        yield front


async def serves(front: Front, arm: str) -> bool:
    answer = await front.post(HELLO)
    assert answer.status_code == 200
    return bool(answer.headers.get("x-headgate-variant", "baseline") == arm)


async def soon(front: Front, arm: str) -> float:
    """Asks until this arm serves; how long that took, in seconds."""
    began = time.monotonic()
    await eventually(lambda: serves(front, arm))
    return time.monotonic() - began


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    """Asks again; on_loop limits it."""
    while not await holds():  # noqa: ASYNC110  # another gateway's doings have no event here
        await asyncio.sleep(0.01)


async def ended(front: Front) -> bool:
    """Whether the rollout is known to be over, or not known at all."""
    state = await told(front)
    return state is None or state["ended"] is not None


@needs_redis
@on_loop
async def test_what_one_gateway_is_told_all_go_by() -> None:
    """Shares, observations and the end of it, within a second."""
    with redis_server() as server:
        async with (
            upstream(hi) as old,
            upstream(hi) as new,
            sharing(server.url, old) as one,
            sharing(server.url, old) as two,
        ):
            await put(one, new)
            assert await soon(two, "candidate") < 1.0
            assert await serves(one, "candidate")

            async def both() -> bool:
                return len({seen.id for seen in await observed(one)}) >= 2

            await eventually(both)
            await steer(two, "POST", f"{PATH}/rollback", id="r1", why="told to")
            assert await serves(two, "baseline")
            assert await soon(one, "baseline") < 1.0
            assert (await told(one))["ended"] == "told to"


@needs_redis
@on_loop
async def test_a_gateway_that_sees_a_catastrophe_ends_it_for_all() -> None:
    with redis_server() as server:
        async with (
            upstream(hi) as old,
            upstream(hi) as new,
            sharing(server.url, old) as one,
            sharing(server.url, old) as two,
        ):
            await put(one, new)
            await soon(two, "candidate")
            new.answer = broken
            for _ in range(4):
                assert await serves(one, "baseline")
            assert await soon(two, "baseline") < 1.0
            await eventually(lambda: ended(two))


@needs_redis
@on_loop
async def test_without_the_store_no_gateway_serves_a_candidate() -> None:
    """None can know whether another has rolled back. Redis comes back empty: the candidate waits
    for its controller, and what had ended stays ended."""
    with redis_server() as server:
        async with (
            upstream(hi) as old,
            upstream(hi) as new,
            sharing(server.url, old) as one,
            sharing(server.url, old) as two,
        ):
            await put(one, new)
            await soon(two, "candidate")
            server.kill()
            for front in (one, two):
                await soon(front, "baseline")
                far: Any = front.live.edge.state.far
                await until(lambda far=far: not far.up)
                assert await serves(front, "baseline")
            status, answer = await steer(one, "PATCH", id="r1", share=1.0)
            assert (status, answer["error"]["code"]) == (503, "store_away")
            await steer(one, "POST", f"{PATH}/rollback", id="r1", why="told to")
            server.start()
            for front in (one, two):
                far = front.live.edge.state.far
                await until(lambda far=far: far.up)
            await eventually(lambda: ended(two))
            for front in (one, two):
                assert await serves(front, "baseline")
