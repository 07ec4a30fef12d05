"""A store that is away, late or has forgotten: requests go on, and everything is told it later."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from cache.failover import FailoverStore, WhenDown
from cache.memory_store import MemoryStore
from cache.store import Bucket, Entries, Quota, StoreDown, Taken, Want, key

A, B = key("limit", "a"), key("limit", "b")
NOW = 1.7e9
RULE, DAY = Bucket(100, per_s=1), Quota(1000, ends_at=NOW + 3600)


class Far:
    """A store behind a line that can be cut, or that answers late."""

    def __init__(self) -> None:
        self.store = MemoryStore(lambda: NOW)
        self.cut = False
        self.late: asyncio.Event | None = None
        self.closed = False

    async def reach(self) -> MemoryStore:
        if self.late is not None:
            await self.late.wait()
        await asyncio.sleep(0)
        if self.cut:
            raise StoreDown("the line is cut")
        return self.store

    async def take(self, wants: Sequence[Want]) -> Taken:
        return await (await self.reach()).take(wants)

    async def settle(self, changes: Sequence[Want]) -> None:
        await (await self.reach()).settle(changes)

    async def restore(self, left: Sequence[Want]) -> None:
        await (await self.reach()).restore(left)

    async def get(self, key: str) -> bytes | None:
        return await (await self.reach()).get(key)

    async def put(self, key: str, value: bytes, ttl_s: float) -> None:
        await (await self.reach()).put(key, value, ttl_s)

    async def swap(self, key: str, old: bytes | None, new: bytes | None, ttl_s: float) -> bool:
        return await (await self.reach()).swap(key, old, new, ttl_s)

    async def count(self, key: str, amount: float, ttl_s: float) -> float:
        return await (await self.reach()).count(key, amount, ttl_s)

    async def append(self, key: str, entries: Sequence[bytes], keep: int, ttl_s: float) -> None:
        await (await self.reach()).append(key, entries, keep, ttl_s)

    async def read(self, key: str, after: str, limit: int) -> Entries:
        return await (await self.reach()).read(key, after, limit)

    async def post(self, board: str, owner: str, note: bytes, ttl_s: float) -> None:
        await (await self.reach()).post(board, owner, note, ttl_s)

    async def notes(self, board: str) -> Mapping[str, bytes]:
        return await (await self.reach()).notes(board)

    async def aclose(self) -> None:
        self.closed = True


@dataclass
class World:
    far: Far
    near: FailoverStore

    async def left(self, name: str, rule: Bucket | Quota) -> float:
        """What the far store itself says."""
        return (await self.far.store.take([Want(name, rule, 0)])).left[0]

    async def back(self) -> None:
        """The line is mended, and that has been noticed."""
        self.far.cut, self.far.late = False, None
        await until(lambda: self.near.up)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  # what it waits for has no event
        await asyncio.sleep(0.002)


@asynccontextmanager
async def world(when_down: WhenDown = "local", patience_s: float = 10.0) -> AsyncIterator[World]:
    far = Far()
    near = FailoverStore(
        far, when_down=when_down, patience_s=patience_s, clock=lambda: NOW, rng=random.Random(1)
    )
    async with near.running():
        await until(lambda: near._epoch is not None)
        yield World(far, near)
    assert far.closed


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    @functools.wraps(test)
    def sync() -> None:
        asyncio.run(asyncio.wait_for(test(), 30))

    return sync


@run
async def test_while_it_is_there_the_far_store_decides() -> None:
    async with world() as it:
        assert (await it.near.take([Want(A, RULE, 60)])).left == (40,)
        await it.far.store.take([Want(A, RULE, 30)])  # another gateway
        assert (await it.near.take([Want(A, RULE, 60)])).left == (10,)
        await it.near.put(A, b"1", 60)
        assert await it.near.get(A) == b"1"
        assert await it.near.count(B, 2, 60) == 2
        assert await it.near.swap(A, b"1", b"2", 60)
        await until(lambda: not it.near._outbox)
        assert await it.far.store.get(A) == b"2"


@run
async def test_local_gives_a_share_of_what_was_left_and_tells_it_later() -> None:
    """Four gateways, 60 left when the store went away: each gives 15."""
    async with world("local") as it:
        it.near.peers = 4
        await it.near.take([Want(A, RULE, 40), Want(B, DAY, 400)])
        it.far.cut = True
        assert (await it.near.take([Want(A, RULE, 15), Want(B, DAY, 100)])).allowed
        assert not it.near.up
        assert it.near.error == "the line is cut"
        assert not (await it.near.take([Want(A, RULE, 5)])).allowed
        assert not (await it.near.take([Want(B, DAY, 51)])).allowed
        await it.near.settle([Want(B, DAY, 30)])
        await it.back()
        assert await it.left(A, RULE) == 60 - 15
        assert await it.left(B, DAY) == 600 - 100 + 30


@run
async def test_open_lets_all_through_and_counts_it() -> None:
    async with world("open") as it:
        it.far.cut = True
        for _ in range(5):
            assert (await it.near.take([Want(B, DAY, 300)])).allowed
        await it.back()
        assert await it.left(B, DAY) == -500


@run
async def test_closed_lets_nothing_through() -> None:
    async with world("closed") as it:
        it.far.cut = True
        with pytest.raises(StoreDown, match="the line is cut"):
            await it.near.take([Want(A, RULE)])
        assert await it.near.get(A) is None  # only limits are closed
        await it.back()
        assert (await it.near.take([Want(A, RULE)])).allowed


@run
async def test_values_go_on_near_by_and_arrive_later() -> None:
    """A session's cut that is moved while the store is away is the one that stays."""
    async with world() as it:
        await it.near.put(A, b"1", 60)
        assert await it.near.get(A) == b"1"
        await until(lambda: not it.near._outbox)
        it.far.cut = True
        assert await it.near.get(A) == b"1"
        assert await it.near.swap(A, b"1", b"2", 60)
        assert not await it.near.swap(A, b"1", b"3", 60)
        await it.near.put(B, b"gone", 60)
        assert await it.near.swap(B, b"gone", None, 60)
        assert await it.near.count(key("n"), 3, 60) == 3
        await it.near.append(key("log"), [b"x", b"y"], keep=1, ttl_s=60)
        assert await it.near.notes(key("board")) == {}
        assert (await it.near.read(key("log"), "7", 5)).cursor == "7"
        await it.back()
        assert await it.far.store.get(A) == b"2"
        assert await it.far.store.get(B) is None
        assert await it.far.store.count(key("n"), 0, 60) == 3
        assert (await it.far.store.read(key("log"), "", 5)).entries == (b"y",)


@run
async def test_it_comes_back_while_changes_keep_coming() -> None:
    """Once it waited for a moment with nothing to tell, which never comes under load."""
    async with world() as it:
        it.far.cut = True
        await it.near.take([Want(A, RULE)])
        done = asyncio.Event()

        async def spend() -> None:
            while not done.is_set():
                await it.near.settle([Want(B, DAY, -1)])
                await asyncio.sleep(0)

        spending = asyncio.create_task(spend())
        await it.back()
        done.set()
        await spending
        assert it.near.up


@run
async def test_a_store_that_has_forgotten_is_told_what_is_known() -> None:
    """Flushed, or another one in its place: budgets of the day do not begin again."""
    async with world() as it:
        await it.near.take([Want(B, DAY, 700)])
        await it.near.put(A, b"cut", 60)
        await until(lambda: not it.near._outbox)
        it.far.store = MemoryStore(lambda: NOW)
        it.near._news.set()  # instead of the second until the next look
        await until(lambda: len(it.far.store._values._kept) > 1)
        assert await it.left(B, DAY) == 300
        assert await it.far.store.get(A) == b"cut"


@run
async def test_what_was_taken_while_away_counts_once_in_a_store_that_has_forgotten() -> None:
    async with world() as it:
        await it.near.take([Want(B, DAY, 500)])
        it.far.cut = True
        await it.near.take([Want(B, DAY, 100)])
        it.far.store = MemoryStore(lambda: NOW)
        await it.back()
        assert await it.left(B, DAY) == 400


@run
async def test_a_request_waits_no_longer_than_its_patience_in_all() -> None:
    """Ten questions to a silent store, one wait; a late answer alone does not mean it is away."""
    async with world(patience_s=0.05) as it:
        it.far.late = asyncio.Event()
        begun = asyncio.get_running_loop().time()
        it.near.begin()
        for _ in range(10):
            assert (await it.near.take([Want(A, RULE)])).allowed
            assert await it.near.get(A) is None
        assert asyncio.get_running_loop().time() - begun < 0.5  # 20 waits would be 1 s
        assert it.near.up
        it.far.late.set()
        await until(lambda: not it.near._outbox)
        assert await it.left(A, RULE) == 90


@run
async def test_settling_and_putting_do_not_wait_at_all() -> None:
    async with world(patience_s=10) as it:
        it.far.late = asyncio.Event()
        begun = asyncio.get_running_loop().time()
        for number in range(300):
            await it.near.settle([Want(key("limit", f"{number}"), DAY, -1)])
            await it.near.put(key("value", f"{number}"), b"1", 60)
        assert await it.near.get(key("value", "7")) == b"1"
        assert asyncio.get_running_loop().time() - begun < 5
        it.far.late.set()
        await until(lambda: not it.near._outbox)
        assert await it.left(key("limit", "299"), DAY) == 999
        assert await it.far.store.get(key("value", "299")) == b"1"
