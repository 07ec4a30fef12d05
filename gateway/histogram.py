"""Counts of observed values by size and labels, each bucket with the trace of its latest value.

Knows bounds and counts; knows no names of metrics and no exposition. One thread observes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

# OpenTelemetry's for generative AI, with more above as Envoy AI Gateway has them, and more below.
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    15.0, 20.0, 30.0, 45.0, 60.0,
)  # fmt: skip
TOKEN_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
)  # fmt: skip
DURATION_S = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
GAP_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

Labels = tuple[str, ...]


@dataclass(slots=True)
class Exemplar:
    """One value, and the trace of the request that had it."""

    trace_id: str
    value: float
    at: float  # seconds since 1970


@dataclass(slots=True)
class Series:
    """The values of one set of labels; a bucket more than there are bounds."""

    counts: list[int]
    exemplars: list[Exemplar | None]
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values fell at or below each bound, by labels."""

    bounds: Sequence[float]
    series: dict[Labels, Series] = field(default_factory=dict)

    def observe(self, labels: Labels, value: float, trace: tuple[str, float] | None = None) -> None:
        """`trace`: its id, and the moment since 1970, for a request whose trace is kept."""
        found = self.series.get(labels)
        if found is None:
            buckets = len(self.bounds) + 1
            found = self.series[labels] = Series([0] * buckets, [None] * buckets)
        at = bisect_left(self.bounds, value)
        found.counts[at] += 1
        found.total += value
        if trace is not None:
            found.exemplars[at] = Exemplar(trace[0], value, trace[1])
