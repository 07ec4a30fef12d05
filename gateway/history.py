"""The last minutes of this process, a sample each second: what the console draws over time.

Knows counters and moments; knows no single request. Nothing of it outlives the process.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from gateway.edge import Edge, Live

EVERY_S = 1.0
KEPT = 300  # samples

Told = Callable[[], Mapping[str, Any] | None]


class History:
    """So many samples at most; counters are totals since the process began."""

    def __init__(self, live: Live, rollout: Told, clock: Callable[[], float] = time.time) -> None:
        """`rollout`: the one that runs, as gateway/variants.py tells it."""
        self._live = live
        self._rollout = rollout
        self._clock = clock
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT)

    @asynccontextmanager
    async def sampling(self) -> AsyncIterator[None]:
        """Takes samples meanwhile."""
        task = asyncio.create_task(self._sample())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _sample(self) -> None:
        while True:
            self.take()
            await asyncio.sleep(EVERY_S)

    def take(self) -> None:
        """Takes one now."""
        edge, rollout = self._live.edge, self._rollout()
        ladder = edge.ladder
        self._kept.append(
            {
                "at": round(self._clock(), 3),
                "in_flight": edge.pool.in_flight,
                "prompt_tokens": ladder.prompt,
                "cached_tokens": ladder.delivered,
                "answer_tokens": edge.meters.stages["emitted"],
                "tiers": tiers(edge),
                "share": rollout["share"] if rollout else None,
            }
        )

    def since(self, at: float) -> list[dict[str, Any]]:
        """Those after a moment, the earliest first."""
        return [one for one in self._kept if one["at"] > at]


def tiers(edge: Edge) -> dict[str, dict[str, float]]:
    """Of each tier that has been asked for: what waits and runs now, and its totals."""
    found: dict[str, dict[str, float]] = {}
    ended: Counter[str] = Counter()
    for (tier, *_), count in edge.meters.requests.items():
        ended[tier] += count
    kept: Counter[tuple[str, ...]] = Counter()
    for (tier, _, met), count in edge.meters.goodput.items():
        kept[tier, met] += count
    for name in edge.admission.tiers:
        tally = edge.admission.tallies.of(name)
        found[name] = {
            "waiting": 0,
            "running": 0,
            "admitted": tally.admitted,
            "waited_s": round(tally.waited_s, 6),
            "shed": tally.shed,
            "limited": tally.limited,
            "in_time": tally.in_time,
            "late": tally.late,
            "in_pace": tally.in_pace,
            "slow": tally.slow,
            "ended": ended[name],
            "met": kept[name, "true"],
            "missed": kept[name, "false"],
        } | {f"{phase}_s": round(s, 6) for phase, s in tally.phase_s.items()}
    for front in edge.admission.fronts.values():
        for name, line in front.queue.lines.items():
            if name in found:
                found[name]["waiting"] += line.waiting
                found[name]["running"] += line.running
    return {name: numbers for name, numbers in found.items() if any(numbers.values())}
