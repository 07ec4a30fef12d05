"""What a run came to, in the numbers that people ask for first. Knows observations only.

A request that failed stays in every share; times are of those that have them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from telemetry import Observation

OUTCOMES = ("ok", "refused", "timeout", "error", "cancelled")
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
TIMES = ("ttft_s", "tpot_s", "gap_max_s", "e2e_s")


def summarize(observations: Sequence[Observation], took_s: float) -> dict[str, Any]:
    """As JSON. `took_s`: from the first request's sending to the last one's end."""
    ended: Counter[str] = Counter(one.outcome for one in observations)
    failures = Counter(one.problem for one in observations if not one.ok)
    return {
        "requests": len(observations),
        "outcomes": {outcome: ended[outcome] for outcome in OUTCOMES if ended[outcome]},
        "requests_per_s": ended["ok"] / took_s if took_s else None,
        "tokens_per_s": _sum(observations, "completion_tokens") / took_s if took_s else None,
        "took_s": took_s,
        "times": {name: _quantiles(observations, name) for name in TIMES},
        "prompt_tokens": _sum(observations, "prompt_tokens"),
        "cached_tokens": _sum(observations, "cached_tokens"),
        "completion_tokens": _sum(observations, "completion_tokens"),
        "tiers": {
            tier: {"requests": len(of), "ok": sum(one.ok for one in of), "slo": attained(of)}
            for tier in sorted({one.tier for one in observations})
            if (of := [one for one in observations if one.tier == tier])
        },
        "fingerprints": sorted({one.fingerprint for one in observations if one.fingerprint}),
        "problems": [[problem, count] for problem, count in failures.most_common(5)],
    }


def attained(observations: Sequence[Observation]) -> float | None:
    """The share that met every target of its tier, failures missing all; None without targets."""
    asked = [one for one in observations if (one.ttft_target_s, one.tpot_target_s) != (None, None)]
    if not asked:
        return None
    return sum(_met(one) for one in asked) / len(asked)


def _met(one: Observation) -> bool:
    return (
        one.ok
        and _within(one.ttft_s, one.ttft_target_s)
        and (one.tpot_s is None or _within(one.tpot_s, one.tpot_target_s))
    )


def _within(took_s: float | None, target_s: float | None) -> bool:
    return target_s is None or (took_s is not None and took_s <= target_s)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that so large a share is at most; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(math.ceil(share * len(ordered)), len(ordered)) - 1]


def _quantiles(observations: Sequence[Observation], name: str) -> dict[str, float | None]:
    values = [value for one in observations if (value := getattr(one, name)) is not None]
    return {label: quantile(values, share) for label, share in QUANTILES.items()}


def _sum(observations: Sequence[Observation], name: str) -> int:
    return sum(getattr(one, name) or 0 for one in observations)
