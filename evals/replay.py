"""Plays recorded requests at the times they came, whatever the server makes of it: open loop.

Knows when each is due and how late it was sent, since a generator that falls behind measures itself
(`generator_saturated`); knows neither files nor HTTP.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from evals.item import Item
from telemetry import Observation

AT_ONCE = 32  # requests under way, where they are sent as fast as possible
LATE_S = 0.1  # a request that is sent later than this was not sent when it was due
LATE_SHARE_MAX = 0.01

Ask = Callable[[Item], Awaitable[Observation]]


@dataclass(slots=True)
class Lateness:
    """By how much requests were sent after they were due."""

    late_s: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """0 without requests."""
        if not self.late_s:
            return 0.0
        ordered = sorted(self.late_s)
        return ordered[min(math.ceil(share * len(ordered)), len(ordered)) - 1]

    @property
    def late_share(self) -> float:
        return sum(one > LATE_S for one in self.late_s) / max(len(self.late_s), 1)

    @property
    def saturated(self) -> bool:
        """Whether the load was the generator's own, not the recording's."""
        return self.late_share > LATE_SHARE_MAX


class Replay:
    """One run over items that have `meta["t_s"]`, in its order.

    `speed` 2 plays twice as fast; None: as fast as possible, `at_once` under way (AT_ONCE). With a
    speed, `at_once` is a bound that makes requests late; without one, nothing waits for an answer.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        speed: float | None = 1.0,
        at_once: int | None = None,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if speed is not None and not (math.isfinite(speed) and speed > 0):
            raise ValueError(f"speed: expected more than 0, or None, got {speed}")
        self.lateness = Lateness()
        self.sent = 0
        self._ask = ask
        self._speed = speed
        self._clock = clock
        self._sleep = sleep
        most = at_once if speed is not None else at_once or AT_ONCE
        self._places = asyncio.Semaphore(most) if most is not None else None
        self._done: asyncio.Queue[Observation | None] = asyncio.Queue()

    async def observations(self, items: Iterable[Item]) -> AsyncIterator[Observation]:
        """Each as it ends. Whoever stops listening ends what is under way."""
        sending = asyncio.create_task(self._send(items))
        try:
            while (seen := await self._done.get()) is not None:
                yield seen
            await sending
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, items: Iterable[Item]) -> None:
        """Ends when all are answered; an item is made while the one before it goes its way."""
        began = self._clock()
        try:
            async with asyncio.TaskGroup() as group:
                for item in items:
                    due = self._due(item, began)
                    if due > (now := self._clock()):
                        await self._sleep(due - now)
                    if self._places is not None:
                        await self._places.acquire()
                    if self._speed is not None:
                        self.lateness.late_s.append(max(self._clock() - due, 0.0))
                    self.sent += 1
                    group.create_task(self._one(item))
                    await asyncio.sleep(0)
        finally:
            self._done.put_nowait(None)

    def _due(self, item: Item, began: float) -> float:
        return began if self._speed is None else began + float(item.meta["t_s"]) / self._speed

    async def _one(self, item: Item) -> None:
        try:
            self._done.put_nowait(await self._ask(item))
        finally:
            if self._places is not None:
                self._places.release()
