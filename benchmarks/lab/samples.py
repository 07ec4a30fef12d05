"""Numbers out of repeated measurements: medians, percentiles, paired differences, shares.

Medians, because a shared machine adds time now and then and never takes any away.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median
from typing import Any

_DRAWS = 2000


def medians(rows: Sequence[Mapping[str, float]], digits: int) -> dict[str, float]:
    """Of each figure over the rounds, `digits` behind the point."""
    return {name: round(median(row[name] for row in rows), digits) for name in rows[0]}


def median_added(
    before: Sequence[Mapping[str, float]],
    after: Sequence[Mapping[str, float]],
    field: str,
    digits: int,
) -> float:
    """Of a figure's differences within a round."""
    pairs = zip(before, after, strict=True)
    return round(median(more[field] - less[field] for less, more in pairs), digits)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the closest ranks (Hyndman and Fan 1996, definition 7). Raises ValueError."""
    if not values:
        raise ValueError("no values to take a percentile of")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent is {percent}, expected 0 to 100")
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def spread(values: Sequence[float]) -> dict[str, float]:
    """The middle and the slow end."""
    return {"p50": percentile(values, 50), "p95": percentile(values, 95)}


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more the second of two paired series is: the median, and where it lies with 95 %."""

    median: float
    low: float
    high: float


def paired_difference(
    first: Sequence[float], second: Sequence[float], rng: random.Random
) -> Difference:
    """Median of second - first, pair by pair, and its percentile bootstrap interval.

    Efron and Tibshirani 1993, chapter 13. Raises ValueError when the series differ in length.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    if not differences:
        raise ValueError("no pairs to compare")
    medians = [median(rng.choices(differences, k=len(differences))) for _ in range(_DRAWS)]
    return Difference(median(differences), percentile(medians, 2.5), percentile(medians, 97.5))


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """Where a share lies with 95 %: the score interval (Wilson 1927). Raises ValueError."""
    if not 0 <= hits <= count or count == 0:
        raise ValueError(f"{hits} of {count} is no share")
    share, z = hits / count, NormalDist().inv_cdf(0.975)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / count / 2) ** 2)
    # At its ends a sum in floats may leave the share outside by its last digit.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def sign_test(gained: int, lost: int) -> float:
    """How likely so lopsided a split of changes, or a worse one, is where neither way is more
    likely (McNemar's test, exact, two-sided)."""
    count = gained + lost
    tail = sum(math.comb(count, few) for few in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / int(2**count))


def mean_interval(
    sums: Sequence[float], counts: Sequence[int], rng: random.Random
) -> tuple[float, float]:
    """Where the mean of all values lies with 95 %, by bootstrap over the groups that they come in.

    A group is given by its sum and its count. Efron and Tibshirani 1993, chapter 13.
    """
    groups = list(zip(sums, counts, strict=True))
    means = []
    for _ in range(_DRAWS):
        drawn = rng.choices(groups, k=len(groups))
        means.append(sum(total for total, _ in drawn) / sum(count for _, count in drawn))
    return percentile(means, 2.5), percentile(means, 97.5)


def four_digits(value: Any) -> Any:
    """Four significant digits, all through a nested result: what lies behind them is noise."""
    if isinstance(value, dict):
        return {name: four_digits(one) for name, one in value.items()}
    if isinstance(value, list):
        return [four_digits(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
