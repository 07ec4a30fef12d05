"""Which replicas that somebody drained no gateway has any more, and for how long.

A gateway that has such a replica moves its mark on; the others see that it moved. So clocks that
disagree, or are set, make nobody absent: each measures by its own, since it saw a mark move.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

STEP_S = 1e-3  # a mark that moves is later than it was by any clock


@dataclass(slots=True)
class _Mark:
    at: float  # seconds since 1970, by whoever moved it; 0: nobody has
    moved: float  # when it was seen to move, monotonic seconds


class Presence:
    """Of drained replicas by URL, as one process knows it."""

    def __init__(self, clock: Callable[[], float], now: Callable[[], float]) -> None:
        self._clock = clock
        self._now = now
        self._marks: dict[str, _Mark] = {}

    def look(self, drained: Collection[str], here: Callable[[str], bool]) -> None:
        """Moves the marks of those that are here; one that was not known is absent from now on."""
        self._marks = {url: mark for url, mark in self._marks.items() if url in drained}
        for url in drained:
            mark = self._marks.get(url)
            if mark is None:
                self._marks[url] = _Mark(0.0, self._now())
            elif here(url):
                mark.at, mark.moved = max(self._clock(), mark.at + STEP_S), self._now()

    def hear(self, marks: Mapping[str, float]) -> None:
        """Of another gateway."""
        for url, at in marks.items():
            mark = self._marks.get(url)
            if mark is not None and at > mark.at:
                mark.at, mark.moved = at, self._now()

    def told(self) -> dict[str, float]:
        """For the others."""
        return {url: mark.at for url, mark in self._marks.items()}

    def absent(self, for_s: float) -> list[str]:
        """Those that nobody has had for so long."""
        return [url for url, mark in self._marks.items() if self._now() - mark.moved >= for_s]
