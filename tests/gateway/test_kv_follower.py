"""Publishers over real sockets: both framings, gaps, new lives, and those that mean harm."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator

import pytest
import zmq

from cache.prefix_index import Mode, PrefixIndex
from command.machine import free_ports
from gateway.kv_events import Where
from gateway.kv_follower import LIVE_BYTES_MAX, PATIENCE, Follower, Patience
from gateway.kv_source import Source
from tests.gateway.publisher import Publisher, Style, root
from tests.gateway.publishing import END, Sockets, sockets
from tests.gateway.world import on_loop, until

PROMPT = tuple(range(320))


def endpoints() -> tuple[str, str]:
    return tuple(f"tcp://127.0.0.1:{port}" for port in free_ports(2))  # type: ignore[return-value]


@contextlib.asynccontextmanager
async def following(
    live: str,
    replay: str | None,
    *,
    bind: bool = False,
    topic: str = "kv@",
    patience: Patience = PATIENCE,
) -> AsyncIterator[Follower]:
    """A follower at work, and its index, for replica "r"."""
    clock = asyncio.get_running_loop().time
    source = Source(PrefixIndex(), "r", 0, root, replays=replay is not None, clock=clock)
    context = zmq.Context()
    follower = Follower(source, Where(live, replay, topic, bind), context, lambda: None, patience)
    work = asyncio.create_task(follower.run())
    try:
        yield follower
        assert not work.done()
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        context.destroy(linger=0)


def told(follower: Follower) -> set[bytes]:
    return follower.source._blocks._index.told("r")


def knows(follower: Follower, publisher: Publisher) -> bool:
    source = follower.source
    return (
        source.mode is Mode.EXACT
        and source.last == publisher.number - 1
        and told(follower) == publisher.truth().get("GPU", set())
    )


def work(publisher: Publisher, first: int) -> None:
    """Some steps of an engine."""
    for at in range(first, first + 4):
        publisher.store((at, *PROMPT))
        publisher.step()
        publisher.evict(at)
        publisher.step()


@pytest.mark.parametrize("topics", [True, False], ids=["with topics", "without"])
@pytest.mark.parametrize("maps", [True, False], ids=["maps", "arrays"])
def test_a_publisher_is_known_through_gaps_and_a_new_life(topics: bool, maps: bool) -> None:
    """What was published before we came, live batches, lost ones, and all again after a restart."""

    @on_loop
    async def run() -> None:
        live, replay = endpoints()
        publisher = Publisher(Style(maps=maps))
        async with following(live, replay) as follower:
            async with sockets(publisher, live, replay, topics=topics) as one:
                work(publisher, 0)
                publisher.outbox.clear()
                await until(lambda: knows(follower, publisher))
                await until(lambda: follower.connected)
                await one.subscribed()
                work(publisher, 10)
                one.publish()
                await until(lambda: knows(follower, publisher))
                work(publisher, 20)
                one.publish(lose=3)
                await until(lambda: knows(follower, publisher))
                assert follower.source.counts.gaps == 1
            await until(lambda: follower.source.mode is Mode.APPROXIMATE)
            publisher.restart()
            work(publisher, 30)
            publisher.outbox.clear()
            async with sockets(publisher, live, replay, topics=topics):
                await until(lambda: knows(follower, publisher))

    run()


@on_loop
async def test_a_publisher_that_connects_is_waited_for() -> None:
    live, replay = endpoints()
    publisher = Publisher()
    async with (
        following(live, replay, bind=True) as follower,
        sockets(publisher, live, replay, connects=True) as one,
    ):
        await until(lambda: follower.connected)
        await one.subscribed()
        work(publisher, 0)
        one.publish()
        await until(lambda: knows(follower, publisher))


@on_loop
async def test_without_a_replay_endpoint_what_was_missed_stays_missed() -> None:
    live, replay = endpoints()
    publisher = Publisher()
    async with following(live, None) as follower, sockets(publisher, live, replay) as one:
        await until(lambda: follower.connected)
        await one.subscribed()
        work(publisher, 0)
        one.publish(lose=1)
        await until(lambda: follower.source.last >= 0)
        assert follower.source.mode is Mode.DEGRADED


@on_loop
async def test_a_bound_address_that_is_taken_is_told_and_tried_again() -> None:
    live, replay = endpoints()
    async with sockets(Publisher(), live, replay), following(live, replay, bind=True) as follower:
        await until(lambda: follower.error is not None)
        assert "in use" in str(follower.error)


def endless(one: Sockets) -> Iterator[list[bytes]]:
    """Batches without an end, more than are ever read."""
    batch = Style().batch(1.0, [])
    return (
        [b"", number.to_bytes(8, "big"), batch]
        for number in itertools.islice(itertools.count(), 3000)
    )


HARM = {
    "no frames": [b"kv@"],
    "no number": [b"kv@", b"12", b"\x93"],
    "no batch": [b"kv@", bytes(8), b"\xc1" * 100],
    "not even close": [b"kv@", bytes(8), b""],
    "a word": [b"kv@", bytes(8), b"\xa4word"],
    "a promise of many events": [
        b"kv@",
        bytes(8),
        b"\x93\xcb" + bytes(8) + b"\xdd\xff\xff\xff\xff",
    ],
    "arrays in arrays": [b"kv@", bytes(8), b"\x91" * 5000],
    "a negative number": [b"kv@", b"\xff" * 8, b"\x90"],
}


@on_loop
async def test_junk_is_left_alone_and_the_next_publisher_is_followed() -> None:
    """Every kind of broken message, thousands of them, and one that is too large: nothing fails,
    and the loop goes on."""
    live, replay = endpoints()
    publisher = Publisher()
    async with following(live, replay) as follower, sockets(publisher, live, replay) as one:
        await until(lambda: knows(follower, publisher))
        await one.subscribed()
        for frames in HARM.values():
            one.live.send_multipart(frames)
        await until(lambda: follower.source.counts.junk >= len(HARM))
        one.live.send_multipart([b"kv@", bytes(8), bytes(LIVE_BYTES_MAX + 1)])
        await until(lambda: not follower.connected)
        await until(lambda: knows(follower, publisher))
        await one.subscribed()
        work(publisher, 0)
        one.publish()
        await until(lambda: knows(follower, publisher))
        for frames in list(HARM.values()) * 500:
            one.live.send_multipart(frames)
        await until(lambda: follower.error is not None)
        assert told(follower) == set()


@on_loop
async def test_a_replay_without_an_end_holds_nobody_up() -> None:
    live, replay = endpoints()
    publisher = Publisher()
    async with following(live, replay) as follower, sockets(publisher, live, replay) as one:
        one.answer = lambda _: endless(one)
        await until(lambda: follower.source.last > 500)
        assert follower.source.mode is not Mode.EXACT


@on_loop
async def test_a_last_batch_that_was_lost_is_asked_for() -> None:
    """No gap shows it: nothing comes behind it."""
    live, replay = endpoints()
    publisher = Publisher()
    async with (
        following(live, replay, patience=Patience(catch_up_s=0.1)) as follower,
        sockets(publisher, live, replay) as one,
    ):
        await until(lambda: knows(follower, publisher))
        work(publisher, 0)
        one.publish(lose=len(publisher.outbox))
        await until(lambda: knows(follower, publisher))
        assert follower.source.counts.gaps == 0


@on_loop
async def test_a_replay_that_nobody_answers_is_given_up_and_asked_for_again() -> None:
    live, replay = endpoints()
    publisher = Publisher()
    patience = Patience(silence_s=0.1, catch_up_s=0.2)
    async with following(live, replay, patience=patience) as follower:
        async with sockets(publisher, live, endpoints()[1]) as one:
            work(publisher, 0)
            one.publish()
            await until(lambda: follower.error == f"no replay from {replay}")
            assert follower.source.mode is Mode.APPROXIMATE
        async with sockets(publisher, live, replay):
            await until(lambda: knows(follower, publisher))
            assert follower.error is None


@on_loop
async def test_a_degraded_publisher_is_read_again_from_the_beginning() -> None:
    """A hole that a replay could not fill, and later one can."""
    live, replay = endpoints()
    publisher = Publisher()
    async with (
        following(live, replay, patience=Patience(read_again_s=0.2)) as follower,
        sockets(publisher, live, replay) as one,
    ):
        await until(lambda: knows(follower, publisher))
        await one.subscribed()
        one.answer = lambda _: iter([[b"", END, b""]])
        work(publisher, 0)
        one.publish(lose=2)
        await until(lambda: follower.source.mode is Mode.DEGRADED and follower.source.last > 2)
        one.answer = one.all_of
        await until(lambda: knows(follower, publisher))
