"""Gateways that share a store: what each has under way counts for all, and what went where."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cache.failover import FailoverStore
from cache.memory_store import MemoryStore
from cache.prefix_index import Mode, PrefixIndex
from gateway.edge import Live, build
from gateway.others import NOTE_S, PEER_S, PENDING, PLACED, Forecast, Others, _digest
from gateway.replica import Elsewhere, Replica
from gateway.state import open_state
from policies.schema import Deployment, Gateway, StateStore, Upstream
from tests.gateway.world import (
    HELLO,
    STREAMED,
    Fake,
    held,
    listening,
    on_loop,
    until,
    upstream,
)
from tests.redis_server import needs_redis, redis_server

X, Y = "http://x", "http://y"
BLOCKS = [bytes([number]) * 16 for number in range(6)]


class World:
    """Gateways by their names, on one store, with a clock that is set."""

    def __init__(self) -> None:
        self.now = 1.7e9
        self.store = MemoryStore(lambda: self.now)

    def gateway(self, name: str) -> Others:
        far = FailoverStore(self.store, when_down="local", patience_s=1, clock=lambda: self.now)
        return Others(far, name, lambda: self.now)


@on_loop
async def test_what_is_under_way_elsewhere_is_summed_by_replica() -> None:
    """A gateway that stops telling is forgotten after some seconds, as if it had died."""
    world = World()
    a, b, c = map(world.gateway, "abc")
    mine = [Replica(X), Replica(Y)]
    assert not await c.exchange(mine, PrefixIndex())
    await a.exchange([Replica(X, in_flight=2), Replica(Y, in_flight=1)], PrefixIndex())
    await b.exchange([Replica(X, in_flight=3), Replica("http://z", in_flight=9)], PrefixIndex())
    assert await c.exchange(mine, PrefixIndex())
    assert [one.elsewhere for one in mine] == [Elsewhere(5), Elsewhere(1)]
    assert c.store.peers == 3
    world.now += NOTE_S / 2
    await b.exchange([Replica(X, in_flight=1)], PrefixIndex())
    world.now += NOTE_S / 2
    assert await c.exchange(mine, PrefixIndex())
    assert mine[0].elsewhere.running > mine[1].elsewhere.running >= 0
    assert sum(one.elsewhere.running for one in mine) == 1
    world.now += PEER_S
    assert not await c.exchange(mine, PrefixIndex())
    assert [one.elsewhere for one in mine] == [Elsewhere(), Elsewhere()]
    assert c.store.peers == 1


@on_loop
async def test_what_was_sent_where_is_known_to_all_but_once() -> None:
    """Only blocks that were not known there travel; a replica that tells by itself is left out."""
    world = World()
    a, b = world.gateway("a"), world.gateway("b")
    of_a, of_b = PrefixIndex(), PrefixIndex()
    of_a.trust(Y, Mode.EXACT)
    replicas = [Replica(X), Replica(Y)]
    await b.exchange(replicas, of_b)
    a.placed(X, BLOCKS[:4])
    a.placed(Y, BLOCKS[:4])
    a.placed(X, BLOCKS, known=4)
    await a.exchange(replicas, of_a)
    now = asyncio.get_running_loop().time()
    assert of_a.match(BLOCKS, now) == {}  # routing has noted it there already
    await b.exchange(replicas, of_b)
    assert of_b.match(BLOCKS, now) == {X: 6}
    before = b._cursor
    await b.exchange(replicas, of_b)
    assert b._cursor == before
    (entry,) = (await world.store.read(PLACED, "", 9)).entries
    assert len(entry) < 6 * 16 + 40


@on_loop
async def test_what_cannot_be_read_is_passed_over() -> None:
    """A gateway of another version on the same board: no exchange fails for good."""
    world = World()
    a = world.gateway("a")
    await world.store.post(PENDING, "old", b"{not json", 1)
    replicas = [Replica(X)]
    async with a.exchanging(lambda: replicas, PrefixIndex()):
        await asyncio.sleep(0)
        await until(lambda: "old" in a._seen)
        world.now += 1
        await world.store.post(PENDING, "new", b'{"%s": [1, 0]}' % digest(X), 60)
        await until(lambda: replicas[0].elsewhere.running == 1)
    assert "a" not in await world.store.notes(PENDING)


def digest(url: str) -> bytes:
    return _digest(url).hex().encode()


def test_news_is_believed_as_far_as_it_lasts() -> None:
    """Differences that stay are taken as they are; those that turn round each time are not."""
    steady, turning = Forecast(), Forecast()
    for number in range(200):
        held = steady.expect({X: 6.0, Y: 2.0})
        flips = turning.expect({X: 8.0 * (number % 2), Y: 8.0 * (1 - number % 2)})
    assert held == {X: 6.0, Y: 2.0}
    assert flips == {X: 4.0, Y: 4.0}
    assert (steady.persistence, turning.persistence) == (1.0, 0.0)
    assert turning.expect({}) == {}


@needs_redis
@on_loop
async def test_two_gateways_do_not_send_to_the_same_replica() -> None:
    """One is busy with streams on the first replica; the other's requests go to the second."""
    release = asyncio.Event()
    with redis_server() as server:
        async with (
            upstream(held(release)) as first,
            upstream() as second,
            listening(live(server.url, first)) as one,
            listening(live(server.url, first, second)) as other,
        ):
            await until(lambda: all(r.healthy for r in (*one.pool.replicas, *other.pool.replicas)))
            streams = [asyncio.create_task(one.post(STREAMED)) for _ in range(3)]
            seen = other.pool.replicas[0]
            await until(lambda: seen.elsewhere.running == 3)
            for _ in range(3):
                assert (await other.post(HELLO)).is_success
            assert len(second.requests) == 3
            release.set()
            await asyncio.gather(*streams)
            await until(lambda: seen.elsewhere.running == 0)
            state = (await other.client.get("/health")).json()["state"]
            assert state == {"store": "redis", "outages": 0, "processes": 2}


def live(redis: str, *fakes: Fake) -> Live:
    gateway = Gateway(store=StateStore(redis=redis, timeout_ms=1000))
    upstreams = tuple(Upstream(url=fake.url) for fake in fakes)
    policy = Deployment(version=1, gateway=gateway, upstreams=upstreams)
    state = open_state(gateway, {}, Path())
    return Live(build(policy, [Replica(fake.url) for fake in fakes], state=state))
