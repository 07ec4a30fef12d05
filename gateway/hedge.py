"""Asking a second replica while the first one is late: when, how often, and who wins.

Only for a stream whose first token is predicted to miss its target, only where another replica has
capacity to spare, and only within a budget of duplicate work. Dean and Barroso, "The Tail at Scale"
(2013), section "Hedged requests".
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from policies.retrying import Hedge

T = TypeVar("T")


def due_s(policy: Hedge, target_s: float, predicted_s: float | None) -> float:
    """How long after its sending a request without a first token is predicted to miss its target.

    As long as the prediction has not passed, it stands; from then on as much again as has been
    waited is expected, so that headroom turns negative at half of the target.
    """
    if predicted_s is not None and predicted_s > target_s:
        return policy.after_s
    return max(policy.after_s, predicted_s or 0.0, target_s / 2)


def spare(idle_in_flight: int, busy_in_flight: int) -> bool:
    """Whether a replica can take duplicate work that would wait where it was sent first."""
    return 2 * idle_in_flight < busy_in_flight or idle_in_flight == 0


async def race(
    first: Coroutine[Any, Any, T],
    second: Callable[[], Coroutine[Any, Any, T] | None],
    after_s: float,
    good: Callable[[T], bool],
    discard: Callable[[T], None],
) -> T:
    """The first good result of `first` and of what `second` begins `after_s` later, if anything.

    The loser is cancelled and has ended when this returns; a result that came too late is given to
    `discard`. Where neither is good, the result or the exception of `first` counts.
    """
    tasks = [asyncio.create_task(first)]
    kept: asyncio.Task[T] | None = None
    try:
        await asyncio.wait(tasks, timeout=after_s)
        if not tasks[0].done() and (other := second()) is not None:
            tasks.append(asyncio.create_task(other))
        winner = await _winner(tasks, good)
        await _end([task for task in tasks if task is not winner])
        kept = winner
        return winner.result()
    finally:
        if kept is None:  # whoever waited has left, perhaps when the race was decided
            await _end(tasks)
        for task in tasks:
            if task is not kept and _is(lambda _: True, task):
                discard(task.result())


async def _winner(tasks: list[asyncio.Task[T]], good: Callable[[T], bool]) -> asyncio.Task[T]:
    """The first task with a good result, else the first task, when all are done."""
    waiting = set(tasks)
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task in done and _is(good, task):
                return task
    return tasks[0]


async def _end(tasks: list[asyncio.Task[T]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _is(good: Callable[[T], bool], task: asyncio.Task[T]) -> bool:
    return not task.cancelled() and task.exception() is None and good(task.result())
