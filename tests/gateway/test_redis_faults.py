"""Redis killed, silent and flushed while requests run: none is lost, and limits go on counting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cache.failover import FailoverStore
from gateway.edge import Live, build
from gateway.replica import Replica
from gateway.state import open_state
from policies.schema import Deployment, Gateway, StateStore, Tenant, Upstream
from policies.slo import key_hash
from tests.gateway.world import (
    DONE,
    STREAMED,
    Fake,
    Front,
    Peer,
    listening,
    on_loop,
    until,
    upstream,
)  # fmt: skip
from tests.redis_server import RedisServer, needs_redis, redis_server

pytestmark = needs_redis
KEY = "hg_" + "k" * 30
BUDGET = 10**9
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":20,"completion_tokens":10}}\n\n'
TOKENS = 30  # of one answer
VISITORS = 12
LONGEST_S = 5.0  # that any request took; for the busiest of machines


async def answer(peer: Peer) -> None:
    await peer.head()
    await asyncio.sleep(0.002)
    await peer.chunk(USAGE)
    await peer.chunk(DONE)
    await peer.end()


def live(redis: str, fake: Fake, **store: object) -> Live:
    tenant = Tenant(keys=(key_hash(KEY),), requests_per_minute=10**6, tokens_per_day=BUDGET)
    gateway = Gateway(store=StateStore(redis=redis, **store), tenants={"acme": tenant})
    policy = Deployment(version=1, gateway=gateway, upstreams=(Upstream(url=fake.url),))
    state = open_state(gateway, {}, Path())
    return Live(build(policy, [Replica(fake.url)], state=state))


@dataclass
class World:
    """Two gateways on one Redis, and visitors of both that ask again and again."""

    server: RedisServer
    fronts: tuple[Front, ...]
    answered: int = 0
    failed: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    @property
    def stores(self) -> list[FailoverStore]:
        found = [front.live.edge.state.far for front in self.fronts]
        return [far for far in found if far is not None]

    async def ask(self, front: Front) -> None:
        clock = asyncio.get_running_loop().time
        begun = clock()
        response = await front.post(STREAMED, headers={"authorization": f"Bearer {KEY}"})
        self.longest_s = max(self.longest_s, clock() - begun)
        if response.status_code == 200 and response.content == USAGE + DONE:
            self.answered += 1
        else:
            self.failed.append(f"{response.status_code} {response.text}")

    @asynccontextmanager
    async def load(self) -> AsyncIterator[None]:
        """Requests to both gateways all the while; all that were sent are answered, and soon."""
        done = asyncio.Event()

        async def visitor(front: Front) -> None:
            while not done.is_set():
                await self.ask(front)

        visitors = [asyncio.create_task(visitor(self.fronts[n % 2])) for n in range(VISITORS)]
        try:
            yield
        finally:
            done.set()
            await asyncio.gather(*visitors)
        assert not self.failed, self.failed[0]
        assert self.longest_s < LONGEST_S

    async def more(self) -> None:
        """Returns after some further answers."""
        so_far = self.answered
        await until(lambda: self.answered >= so_far + 5 * VISITORS or bool(self.failed))

    async def until_up(self, up: bool) -> None:
        await until(lambda: all(store.up == up for store in self.stores))

    async def used(self) -> float:
        """Tokens of the day, as Redis has them once it has been told all."""
        await until(lambda: not any(store._outbox or store._sender for store in self.stores))
        rules = self.stores[0]._rules.all_left()
        (want,) = (rule for rule in rules if rule.key.startswith("budget:"))
        taken = await self.stores[0]._far.take([want._replace(amount=0)])
        return BUDGET - taken.left[0]


@asynccontextmanager
async def world(**store: object) -> AsyncIterator[World]:
    with redis_server() as server:
        async with upstream(answer) as fake:
            lives = [live(server.url, fake, **store) for _ in range(2)]
            async with listening(lives[0]) as one, listening(lives[1]) as two:
                fronts = (one, two)
                await until(lambda: all(r.healthy for f in fronts for r in f.pool.replicas))
                it = World(server, fronts)
                await until(lambda: all(store._epoch is not None for store in it.stores))
                yield it


@on_loop
async def test_redis_is_killed_under_load_and_comes_back_empty() -> None:
    """Requests go on, and the day's budget does not begin again."""
    async with world() as it:
        async with it.load():
            await it.more()
            it.server.kill()
            await it.until_up(False)
            await it.more()
            it.server.start()
            await it.until_up(True)
            await it.more()
        assert await it.used() >= 0.95 * TOKENS * it.answered


@on_loop
async def test_redis_is_silent_under_load() -> None:
    """Stopped, it keeps its connections and answers nothing; continued, it is told everything."""
    async with world() as it:
        async with it.load():
            await it.more()
            it.server.pause()
            await it.until_up(False)
            await it.more()
            it.server.resume()
            await it.until_up(True)
            await it.more()
        assert await it.used() >= TOKENS * it.answered


@on_loop
async def test_redis_is_flushed_under_load() -> None:
    async with world() as it:
        async with it.load():
            await it.more()
            await until(lambda: not any(store._outbox for store in it.stores))
            epochs = {store._epoch for store in it.stores}
            it.server.flush()
            await until(lambda: not epochs & {store._epoch for store in it.stores})
            await it.more()
        # What others took between its last look and the flush is unknown to each.
        assert await it.used() >= 0.5 * TOKENS * it.answered


@on_loop
async def test_closed_limits_are_told_as_unavailable_and_open_again_by_themselves() -> None:
    async with world(when_down="closed", timeout_ms=1000) as it:  # a late answer is no refusal
        (front, _) = it.fronts
        await it.ask(front)
        it.server.kill()
        await it.until_up(False)
        await it.ask(front)
        (told,) = it.failed
        assert told.startswith("503 ")
        assert "limits_unknown" in told
        it.server.start()
        await it.until_up(True)
        await it.ask(front)
        assert (it.answered, len(it.failed)) == (2, 1)
