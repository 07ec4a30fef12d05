"""The state of a gateway process: by the policy, and in /health."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache.store import Bucket, Want, key
from gateway.state import State, open_state
from policies.schema import Gateway, StateStore
from tests.gateway.world import gateway, on_loop, until, upstream
from tests.redis_server import needs_redis, redis_server

A = key("limit", "a")
RULE = Bucket(40, per_s=0.001)


def of(url: str, **more: object) -> Gateway:
    return Gateway(store=StateStore(redis=url, **more))


@on_loop
async def test_without_a_store_each_process_gives_its_share() -> None:
    """Four processes, 40 requests: ten from each, and /health says where the state is."""
    state = open_state(Gateway(processes=4), {}, Path())
    for _ in range(10):
        assert (await state.store.take([Want(A, RULE)])).allowed
    assert not (await state.store.take([Want(A, RULE)])).allowed
    async with upstream() as fake, gateway(fake) as edge:
        assert (await edge.client.get("/health")).json()["state"] == {"store": "memory"}


@needs_redis
@on_loop
async def test_two_gateways_share_one_redis_and_go_on_without_it() -> None:
    """Killed, each goes on with its share; back and empty, it is told what was taken."""
    with redis_server() as server:
        settings = of(server.url, timeout_ms=1000)
        one, two = (open_state(settings, {}, Path()) for _ in range(2))
        assert one.far is not None
        assert two.far is not None
        async with one.far.running(), two.far.running():
            for state in (one, two):
                assert state.far is not None
                state.far.peers = 2
                for _ in range(10):
                    assert (await state.store.take([Want(A, RULE)])).allowed
            assert one.health() == {"store": "redis", "outages": 0, "processes": 2}
            server.kill()
            assert (await taken(one), await taken(two)) == (15, 10)  # of 30 and 20 that they know
            assert one.health()["store"] == "local"
            assert "Redis" in one.health()["error"]
            server.start()
            await until(lambda: one.health()["store"] == two.health()["store"] == "redis")
            left = (await two.store.take([Want(A, RULE, 0)])).left[0]
            assert left == pytest.approx(0, abs=16)


async def taken(state: State) -> int:
    """How many it still gives."""
    count = 0
    while (await state.store.take([Want(A, RULE)])).allowed:
        count += 1
    return count


@needs_redis
@on_loop
async def test_a_password_comes_from_its_variable() -> None:
    with redis_server("--requirepass", "word") as server:
        settings = of(server.url, password_env="STORE_WORD", timeout_ms=1000)
        with pytest.raises(KeyError, match="STORE_WORD"):
            open_state(settings, {}, Path())
        state = open_state(settings, {"STORE_WORD": "word"}, Path())
        assert state.far is not None
        async with state.far.running():
            assert (await state.store.take([Want(A, RULE)])).allowed
            assert state.health()["store"] == "redis"


@needs_redis
@on_loop
async def test_a_gateway_begins_without_its_redis_and_finds_it_later() -> None:
    with redis_server() as server:
        server.kill()
        state = open_state(of(server.url, timeout_ms=1000), {}, Path())
        assert state.far is not None
        async with state.far.running():
            assert (await state.store.take([Want(A, RULE, 7)])).allowed
            await until(lambda: state.health()["store"] == "local")
            server.start()
            await until(lambda: state.health()["store"] == "redis")
            left = (await state.store.take([Want(A, RULE, 0)])).left[0]
            assert left == pytest.approx(33, abs=0.1)
