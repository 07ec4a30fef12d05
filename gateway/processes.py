"""How each of the gateway processes behind one port is, as far as it says so at once.

For /health, which whoever asks has to get soon, whatever has become of the others.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

from gateway.edge import Live
from gateway.siblings import Part, Question, Siblings
from gateway.upstream import Pool

WHAT = "health"
PATIENCE_S = 0.25  # for one that hangs, or is busy
FRESH_S = 1.0  # what they said is told again


def status_of(pool: Pool) -> str:
    """Of one process: whether any replica can take its requests."""
    now = asyncio.get_running_loop().time()
    if pool.draining:
        return "draining"
    if any(replica.healthy and replica.takes(now) for replica in pool.replicas):
        return "ready"
    starting = any(not replica.tried for replica in pool.replicas)
    return "starting" if starting else "down"


class Processes:
    """As one of them knows them."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._siblings = live.edge.state.siblings
        self._said: dict[str, str | None] = {}
        self._said_at = -math.inf
        self._asking = asyncio.Lock()
        if self._siblings is not None:
            self._siblings.answers[WHAT] = self._answer

    async def told(self) -> Mapping[str, Any]:
        """Which one this is, and what each says of itself: null, where it does not answer; nothing
        where a process is alone."""
        siblings = self._siblings
        if siblings is None:
            return {}
        said = await self._others(siblings)
        expected = siblings.expected(self._live.edge.settings.processes)
        all_of_them = dict.fromkeys(expected, None) | said
        all_of_them[siblings.name] = status_of(self._live.edge.pool)
        status = {name: all_of_them[name] for name in sorted(all_of_them)}
        answering = sum(one is not None for one in status.values())
        return {
            "process": siblings.name,
            "processes": {"answering": answering, "of": len(status), "status": status},
        }

    async def _others(self, siblings: Siblings) -> dict[str, str | None]:
        """Asked once for all who want to know at the same time."""
        clock = asyncio.get_running_loop().time
        async with self._asking:
            if clock() - self._said_at >= FRESH_S:
                found = await siblings.ask({"what": WHAT}, PATIENCE_S)
                self._said = {name: _status(parts) for name, parts in found.items()}
                self._said_at = clock()
        return self._said

    async def _answer(self, _question: Question) -> AsyncIterator[Part]:
        yield {"status": status_of(self._live.edge.pool)}, b""


def _status(parts: list[Part] | None) -> str | None:
    return str(parts[0][0]["status"]) if parts else None
