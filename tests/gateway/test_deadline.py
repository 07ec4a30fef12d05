"""A deadline does what `asyncio.timeout_at` does, by which it is judged here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gateway.deadline import Deadline

Limited = Callable[[float, Callable[[], Awaitable[object]]], Awaitable[object]]
PAST, FAR = -1.0, 60.0


async def by_ours(after_s: float, work: Callable[[], Awaitable[object]]) -> object:
    with Deadline(asyncio.get_running_loop().time() + after_s):
        return await work()


async def by_asyncio(after_s: float, work: Callable[[], Awaitable[object]]) -> object:
    async with asyncio.timeout_at(asyncio.get_running_loop().time() + after_s):
        return await work()


async def quick() -> str:
    await asyncio.sleep(0)
    return "done"


async def endless() -> None:
    await asyncio.get_running_loop().create_future()


async def broken() -> None:
    await asyncio.sleep(0)
    raise ValueError("its own")


async def stubborn() -> str:
    """Says something else once it is cancelled."""
    try:
        await endless()
    except asyncio.CancelledError:
        return "after all"
    return ""


async def outcome(limited: Limited, after_s: float, work: Callable[[], Awaitable[object]]) -> str:
    """How it ends, and whether the task that it was in may go on."""
    try:
        told = str(await limited(after_s, work))
    except (TimeoutError, ValueError) as error:
        told = type(error).__name__
    task = asyncio.current_task()
    assert task is not None
    await asyncio.sleep(0)
    return f"{told}, {task.cancelling()} cancellations left"


@pytest.mark.parametrize(
    ("after_s", "work"), [(FAR, quick), (FAR, broken), (PAST, endless), (PAST, stubborn)]
)
def test_it_ends_as_asyncios_own(after_s: float, work: Callable[[], Awaitable[object]]) -> None:
    """In time or not, with an error of its own, or with an answer in spite of being cancelled."""

    async def run() -> None:
        ours = await outcome(by_ours, after_s, work)
        assert ours == await outcome(by_asyncio, after_s, work)

    asyncio.run(run())


@pytest.mark.parametrize("limited", [by_ours, by_asyncio])
def test_who_is_cancelled_by_others_is_not_late(limited: Limited) -> None:
    """Also where the deadline passes in the same turn of the loop."""

    async def run() -> None:
        for after_s in (FAR, PAST):
            task = asyncio.create_task(outcome(limited, after_s, endless))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())


def test_it_can_be_time_sooner() -> None:
    """Who holds it may end the wait; twice is once."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        deadline = Deadline(loop.time() + FAR)
        with pytest.raises(TimeoutError), deadline:
            loop.call_soon(deadline.now)
            loop.call_soon(deadline.now)
            await endless()
        assert deadline.passed
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()

    asyncio.run(run())
