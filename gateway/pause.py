"""A long piece of work on the loop on which streams wait, given up in between. Knows no work."""

from __future__ import annotations

import asyncio
import time

PIECE_S = 0.001  # of work; streams wait as long


class Pause:
    """Awaited between pieces of work, it gives the loop to others after PIECE_S of it."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    async def __call__(self) -> None:
        if time.perf_counter() - self._since > PIECE_S:
            await asyncio.sleep(0)
            self._since = time.perf_counter()
