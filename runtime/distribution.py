"""Counts of observed values by size, cheap enough for every token; read while they grow.

Knows bounds and counts; knows no names and no exposition.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

# vLLM's own bounds (0.32), and finer ones where much of what we serve would fall below the first.
FIRST_TOKEN_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip  # one short list
TOKEN_S = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4,
    0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5,
    5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES = (1, 2, 5, 10, 20)
PREEMPTIONS = (0, 1, 2, 3, 4, 5, 10, 20)


def tokens_up_to(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, ... up to a limit, vLLM's bounds for numbers of tokens."""
    return tuple(
        step * 10**power
        for power in range(len(str(limit)))
        for step in (1, 2, 5)
        if step * 10**power <= limit
    )


class Distribution:
    """How many values fell at or below each bound, and their sum. One thread observes."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by bound, the last one "+Inf" and all of them; and the sum.

        The counts are of one moment; the sum may have a value more or less.
        """
        counts, total = list(self._counts), self._sum
        return list(_cumulative(self._bounds, counts)), total


def _cumulative(bounds: tuple[float, ...], counts: list[int]) -> Iterator[tuple[str, float]]:
    so_far = 0
    for bound, count in zip(bounds, counts, strict=False):
        so_far += count
        yield str(float(bound)), so_far
    yield "+Inf", so_far + counts[-1]
