"""How many replicas are wanted, by what all gateways have for them. Pure but for its memory of the
last minutes; knows neither Ray nor HTTP."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from policies.fleet import Fleet


@dataclass(frozen=True, slots=True)
class Demand:
    """What all gateways had for the replicas at one moment."""

    queued_tokens: float  # of prompts, still to be computed: waiting there, or sent
    running: float  # answers under way

    def replicas(self, settings: Fleet) -> int:
        """How many it takes, within the bounds.

        Queued tokens alone would take away the replicas that keep the queue empty.
        """
        share = max(self.queued_tokens / settings.queued_tokens, self.running / settings.running)
        return min(settings.replicas_max, max(settings.replicas_min, math.ceil(share)))


@dataclass(slots=True)
class Scale:
    """What was wanted of late: one peak starts nothing, one lull takes nothing away."""

    settings: Fleet
    _wanted: deque[tuple[float, int]] = field(default_factory=deque)  # seconds, replicas

    def decide(self, now: float, size: int, demand: Demand | None) -> int:
        """The size from now on. None: nobody could be asked, and nothing changes."""
        settings = self.settings
        if demand is None:
            self._wanted.clear()
            return size
        self._wanted.append((now, demand.replicas(settings)))
        up_from, down_from = now - settings.up_after_s, now - settings.down_after_s
        lately, long = self._since(up_from), self._since(down_from)
        self._forget(min(up_from, down_from))
        if lately and min(lately) > size:
            return min(lately)
        if long and max(long) < size:
            return max(long)
        return size

    def _since(self, start: float) -> list[int] | None:
        """What was wanted since then; None where so much is not known."""
        if not self._wanted or self._wanted[0][0] > start:
            return None
        before = [wanted for at, wanted in self._wanted if at <= start]
        return before[-1:] + [wanted for at, wanted in self._wanted if at > start]

    def _forget(self, start: float) -> None:
        """Keeps one entry from before, which says that the whole time is known."""
        while len(self._wanted) > 1 and self._wanted[1][0] <= start:
            self._wanted.popleft()
