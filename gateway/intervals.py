"""Where an arm's figures, and how far both arms are apart, lie with 95 %: for people who look.

Pure. Answers are taken as independent of each other, which those of one session are not; what a
rollout is decided by is evals/monitor.py's, which knows that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Z = 1.959964  # of 95 %, both sides
FEW = 8  # values of which no interval of a median is told

Interval = dict[str, float]  # at, low, high


def share(part: int, whole: int) -> Interval | None:
    """A share, by Wilson's score; None of nothing."""
    if not whole:
        return None
    at, n = part / whole, whole
    middle = (at + Z * Z / (2 * n)) / (1 + Z * Z / n)
    reach = Z / (1 + Z * Z / n) * math.sqrt(at * (1 - at) / n + Z * Z / (4 * n * n))
    return {
        "at": at,
        "low": min(at, max(0.0, middle - reach)),
        "high": max(at, min(1.0, middle + reach)),
    }


def shares_apart(one: Interval | None, other: Interval | None) -> Interval | None:
    """`other` less `one`, by Newcombe's square-and-add of Wilson's (1998, method 10)."""
    if one is None or other is None:
        return None
    at = other["at"] - one["at"]
    down = math.hypot(other["at"] - other["low"], one["high"] - one["at"])
    up = math.hypot(other["high"] - other["at"], one["at"] - one["low"])
    return {"at": at, "low": max(-1.0, at - down), "high": min(1.0, at + up)}


def median(values: Sequence[float]) -> Interval | None:
    """A median between two of the values, by the binomial law: of no distribution in particular."""
    n = len(values)
    if n < FEW:
        return None
    ordered = sorted(values)
    low, high = _ranks(n)
    at = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return {"at": at, "low": ordered[low], "high": ordered[high]}


def medians_apart(one: Interval | None, other: Interval | None) -> Interval | None:
    """`other` less `one`: each side's reach squared and added, as of shares."""
    if one is None or other is None:
        return None
    at = other["at"] - one["at"]
    down = math.hypot(other["at"] - other["low"], one["high"] - one["at"])
    up = math.hypot(other["high"] - other["at"], one["at"] - one["low"])
    return {"at": at, "low": at - down, "high": at + up}


def _ranks(n: int) -> tuple[int, int]:
    """Of the ordered values, counted from 0: those that hold the median with 95 % or more. A sum of
    the binomial law for few, its normal limit for many."""
    if n > 60:
        reach = Z * math.sqrt(n) / 2
        return max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    below, rank = 0.5**n, 0
    while below + math.comb(n, rank + 1) * 0.5**n <= 0.025:
        rank += 1
        below += math.comb(n, rank) * 0.5**n
    return rank, n - 1 - rank


def apart(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Interval | None]:
    """Of two arms as arms.py tells them: candidate less baseline, by figure."""
    return {
        "failed": shares_apart(one["failed_share"], other["failed_share"]),
        "in_time": shares_apart(one["in_time_share"], other["in_time_share"]),
        "ttft_s": medians_apart(one["ttft_median_s"], other["ttft_median_s"]),
        "tpot_s": medians_apart(one["tpot_median_s"], other["tpot_median_s"]),
        "accepted": shares_apart(one["accepted_share"], other["accepted_share"]),
    }
