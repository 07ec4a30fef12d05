"""The overload benchmark's own parts: time that jumps, workers that compute nothing."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks import overload
from benchmarks.lab import virtual
from benchmarks.lab.simulated import Job, Worker


def test_an_hour_of_sleep_takes_no_time_and_the_order_stays() -> None:
    async def work() -> list[float]:
        loop = asyncio.get_running_loop()

        async def sleeper(seconds: float) -> float:
            await asyncio.sleep(seconds)
            return loop.time()

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        return list(await asyncio.gather(sleeper(3600), sleeper(1)))

    assert virtual.run(work()) == pytest.approx([3605, 6])


def test_waiting_for_what_never_comes_is_told() -> None:
    async def work() -> None:
        await asyncio.Event().wait()

    with pytest.raises(virtual.Deadlock):
        virtual.run(work())


def test_a_simulated_worker_takes_its_time_and_remembers_prompts() -> None:
    async def work() -> tuple[float, int]:
        loop = asyncio.get_running_loop()
        worker = Worker("w", fifo=False)
        running = asyncio.create_task(worker.run())
        first, second = (Job(1600, 10, range(100)) for _ in range(2))
        worker.submit(first)
        await first.done.wait()
        took_s = loop.time()
        worker.submit(second)
        await second.done.wait()
        running.cancel()
        return took_s, second.cached

    took_s, cached = virtual.run(work())
    assert 0.2 < took_s < 0.4  # 1,600 tokens at 8,000 a second, and ten steps
    assert cached == 1599


def test_under_overload_tiers_keep_what_first_come_loses() -> None:
    """The benchmark's own run, short: three times what the workers can do."""
    traffic = overload.rows(quick=True)[:300]
    scaled = overload.at_load(traffic, 3.0, 16.0)
    tiered = overload.summary(virtual.run(overload.Run(scaled, tiers=True).go()))
    plain = overload.summary(virtual.run(overload.Run(scaled, tiers=False).go()))
    assert tiered["interactive"]["good"] > plain["interactive"]["good"] + 0.3
    assert tiered["batch"]["answered"] > 0
