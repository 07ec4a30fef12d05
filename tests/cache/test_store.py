"""What every store does alike, in memory and in Redis."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from cache.memory_store import Expiring, MemoryStore
from cache.redis_store import RedisStore
from cache.store import Bucket, Quota, Store, Taken, Want, key
from tests.redis_server import RedisServer, needs_redis, redis_server

Open = Callable[[Callable[[], float]], Store]


class Clock:
    """A clock that stands until it is set forward."""

    def __init__(self, now: float = 1.7e9) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(params=["memory", pytest.param("redis", marks=needs_redis)])
def opened(request: pytest.FixtureRequest) -> Open:
    """How to open one kind of store; each test of Redis has a namespace of its own."""
    if request.param == "memory":
        return MemoryStore
    server: RedisServer = request.getfixturevalue("server")
    namespace = secrets.token_hex(8)
    return lambda clock: RedisStore(server.url, namespace=namespace, timeout_s=10, clock=clock)


def with_store(test: Callable[[Store, Clock], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The test on both kinds."""

    def on_both(opened: Open) -> None:
        async def run() -> None:
            clock = Clock()
            store = opened(clock)
            try:
                await test(store, clock)
            finally:
                await store.aclose()

        asyncio.run(run())

    on_both.__name__, on_both.__doc__ = test.__name__, test.__doc__
    return on_both


A, B = key("limit", "tenant a"), key("limit", "tenant b")


@with_store
async def test_a_bucket_gives_its_capacity_then_its_rate(store: Store, clock: Clock) -> None:
    """Ten at once, then one each tenth of a second; a refusal says when, and takes nothing."""
    ten = Bucket(10, per_s=10)
    for left in range(9, -1, -1):
        assert await store.take([Want(A, ten)]) == Taken(True, (float(left),))
    refused = await store.take([Want(A, ten)])
    assert refused == Taken(False, (0.0,), retry_after_s=0.1, short=(0,))
    clock.now += 0.125
    assert (await store.take([Want(A, ten)])).allowed
    assert not (await store.take([Want(A, ten)])).allowed
    clock.now += 3600
    assert (await store.take([Want(A, ten, 0)])).left == (10.0,)


@with_store
async def test_all_wants_are_taken_or_none(store: Store, clock: Clock) -> None:
    """Requests a minute fit, tokens a minute do not: no request is counted."""
    requests, tokens = Bucket(2, 2 / 60), Bucket(100, 100 / 60)
    assert (await store.take([Want(A, requests), Want(B, tokens, 80)])).allowed
    refused = await store.take([Want(A, requests), Want(B, tokens, 50)])
    assert refused.short == (1,)
    assert refused.left == (1.0, 20.0)
    assert refused.retry_after_s == pytest.approx(18)
    clock.now += refused.retry_after_s
    assert (await store.take([Want(A, requests), Want(B, tokens, 50)])).allowed


@with_store
async def test_more_than_a_bucket_holds_passes_when_it_is_full(store: Store, clock: Clock) -> None:
    """It leaves a debt, which the next one waits for."""
    rule = Bucket(10, per_s=1)
    assert (await store.take([Want(A, rule, 25)])).left == (-15.0,)
    assert (await store.take([Want(A, rule, 1)])).retry_after_s == 16
    clock.now += 15
    assert (await store.take([Want(A, rule, 25)])).retry_after_s == 10


@with_store
async def test_a_quota_comes_back_only_by_its_next_key(store: Store, clock: Clock) -> None:
    day = Quota(100, ends_at=clock.now + 50)
    assert (await store.take([Want(A, day, 70)])).left == (30.0,)
    refused = await store.take([Want(A, day, 40)])
    assert (refused.allowed, refused.left, refused.retry_after_s) == (False, (30.0,), 50)
    assert (await store.take([Want(A, day, 101)])).retry_after_s == math.inf
    clock.now += 49
    assert not (await store.take([Want(A, day, 40)])).allowed
    assert (await store.take([Want(B, day, 40)])).allowed


@with_store
async def test_settling_gives_back_and_takes_more(store: Store, clock: Clock) -> None:
    """Never above full; below nothing is a debt."""
    rule, day = Bucket(10, per_s=1), Quota(10, clock.now + 60)
    await store.take([Want(A, rule, 8), Want(B, day, 8)])
    await store.settle([Want(A, rule, 5), Want(B, day, 5)])
    assert (await store.take([Want(A, rule, 0), Want(B, day, 0)])).left == (7.0, 7.0)
    await store.settle([Want(A, rule, 99), Want(B, day, -9)])
    assert (await store.take([Want(A, rule, 0)])).left == (10.0,)
    refused = await store.take([Want(B, day, 0)])
    assert (refused.allowed, refused.left) == (False, (-2.0,))


@with_store
async def test_what_is_remembered_is_restored_and_never_more(store: Store, clock: Clock) -> None:
    rule = Bucket(10, per_s=0.5)
    await store.restore([Want(A, rule, 4)])
    assert (await store.take([Want(A, rule, 1)])).left == (3.0,)
    await store.restore([Want(A, rule, 9)])
    assert (await store.take([Want(A, rule, 0)])).left == (3.0,)


@with_store
async def test_a_clock_that_goes_back_refills_nothing(store: Store, clock: Clock) -> None:
    """Gateways' clocks differ a little: the one behind neither gains nor loses."""
    rule = Bucket(10, per_s=1)
    await store.take([Want(A, rule, 10)])
    clock.now -= 5
    assert (await store.take([Want(A, rule, 0)])).left == (0.0,)
    clock.now += 5
    assert (await store.take([Want(A, rule, 0)])).left == (0.0,)


@with_store
async def test_values_end_and_are_swapped_only_as_known(store: Store, clock: Clock) -> None:
    await store.put(A, b"one", 10)
    assert await store.get(A) == b"one"
    assert not await store.swap(A, b"other", b"two", 10)
    assert await store.swap(A, b"one", b"two", 10)
    clock.now += 9.5
    assert await store.get(A) == b"two"
    clock.now += 0.5
    assert await store.get(A) is None
    assert await store.swap(A, None, b"new", 10)
    assert not await store.swap(A, None, b"newer", 10)
    assert await store.swap(A, b"new", None, 10)
    assert await store.get(A) is None


@with_store
async def test_a_counter_lives_from_its_first_count(store: Store, clock: Clock) -> None:
    assert await store.count(A, 2, 10) == 2
    clock.now += 9
    assert await store.count(A, 0.5, 10) == 2.5
    clock.now += 1
    assert await store.count(A, 1, 10) == 1


@with_store
async def test_a_log_is_read_on_from_a_cursor(store: Store, clock: Clock) -> None:
    """A reader that was away finds what the log still keeps."""
    nothing = await store.read(A, "", 10)
    assert nothing.entries == ()
    await store.append(A, [b"1", b"2", b"3"], keep=4, ttl_s=60)
    first = await store.read(A, nothing.cursor, 2)
    assert first.entries == (b"1", b"2")
    await store.append(A, [b"4", b"5", b"6"], keep=4, ttl_s=60)
    assert (await store.read(A, first.cursor, 10)).entries == (b"3", b"4", b"5", b"6")
    last = await store.read(A, "", 10)
    assert last.entries == (b"3", b"4", b"5", b"6")
    assert (await store.read(A, last.cursor, 10)).entries == ()
    clock.now += 60
    assert (await store.read(A, last.cursor, 10)).entries == ()
    await store.append(A, [b"7"], keep=4, ttl_s=60)
    assert (await store.read(A, last.cursor, 10)).entries == (b"7",)


@with_store
async def test_a_short_lived_entry_takes_no_older_one_along(store: Store, clock: Clock) -> None:
    """Once the whole log ended with what was appended last."""
    await store.append(A, [b"long"], keep=4, ttl_s=100)
    await store.append(A, [b"short"], keep=4, ttl_s=0.5)
    clock.now += 0.5
    assert (await store.read(A, "", 10)).entries == (b"long",)


@with_store
async def test_notes_of_owners_that_stopped_are_gone(store: Store, clock: Clock) -> None:
    board = key("pending")
    await store.post(board, "one", b"12", 2)
    await store.post(board, "two", b"7", 2)
    clock.now += 1
    await store.post(board, "two", b"8", 2)
    assert await store.notes(board) == {"one": b"12", "two": b"8"}
    clock.now += 1
    assert await store.notes(board) == {"two": b"8"}
    await store.post(board, "two", b"", 0)
    assert await store.notes(board) == {}


def test_a_key_tells_no_name_and_keeps_parts_apart() -> None:
    assert key("limit", "secret").startswith("limit:")
    assert "secret" not in key("limit", "secret")
    assert key("limit", "a", "bc") != key("limit", "ab", "c") != key("limit", "abc")


def test_what_expires_is_bounded() -> None:
    """Beyond the bound what ends first goes; taking out and putting in again leaves nothing."""
    kept = Expiring[int](keys_max=10)
    for number in range(50):
        kept.set(f"{number}", number, ends_at=100 - number % 25, now=0)
    assert len(kept) == 10
    for _ in range(10_000):
        kept.set("same", 1, ends_at=90, now=0)
        kept.pop("same")
    assert len(kept._due) < 100
    kept.set("late", 1, ends_at=300, now=200)
    assert len(kept) == 1
