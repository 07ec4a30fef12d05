"""How baseline and candidate of a rollout do, from what was observed of both by all gateways.

Counts for people who look; what is decided by is evals/monitor.py's, which sees the same rows.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

from gateway.intervals import median, share
from gateway.variants import Variants
from telemetry import Observation

READ = 2000  # rows at once
ROUNDS = 5  # of reading in one answer
KEPT = 1000  # latest answers of an arm, for its quantiles
FAILED = ("error", "timeout")


@dataclass(slots=True)
class Arm:
    """One of the two."""

    requests: int = 0
    failed: int = 0
    judged: int = 0  # that had a target for the first token, and a first token
    in_time: int = 0
    accepted: int = 0
    drafted: int = 0
    latest: deque[Observation] = field(default_factory=lambda: deque(maxlen=KEPT))

    def saw(self, one: Observation) -> None:
        self.requests += 1
        self.failed += one.outcome in FAILED
        if one.ttft_s is not None and one.ttft_target_s is not None:
            self.judged += 1
            self.in_time += one.ttft_s <= one.ttft_target_s
        if one.accepted_tokens is not None and one.rejected_tokens is not None:
            self.accepted += one.accepted_tokens
            self.drafted += one.accepted_tokens + one.rejected_tokens
        self.latest.append(one)

    def told(self) -> dict[str, Any]:
        """Seconds by quantile, of the latest answers; None where there are too few."""
        ttft = [one.ttft_s for one in self.latest if one.ttft_s is not None]
        tpot = [one.tpot_s for one in self.latest if one.tpot_s is not None]
        return {
            "requests": self.requests,
            "failed": self.failed,
            "judged": self.judged,
            "in_time": self.in_time,
            "accepted": self.accepted,
            "drafted": self.drafted,
            "ttft_s": median_and_tail(ttft),
            "tpot_s": median_and_tail(tpot),
            "failed_share": share(self.failed, self.requests),
            "in_time_share": share(self.in_time, self.judged),
            "accepted_share": share(self.accepted, self.drafted),
            "ttft_median_s": median(ttft),
            "tpot_median_s": median(tpot),
        }


def median_and_tail(values: Sequence[float]) -> dict[str, float] | None:
    """None where there are too few."""
    if len(values) < 2:
        return None
    cuts = quantiles(values, n=20, method="inclusive")
    return {"p50": cuts[9], "p95": cuts[18]}


class Arms:
    """Both of the rollout that was asked for last; reads on from where it was."""

    def __init__(self, variants: Variants) -> None:
        self._variants = variants
        self._rollout = ""
        self._cursor = ""
        self._by_name: dict[str, Arm] = {}
        self._one_at_a_time = asyncio.Lock()  # or two that ask at once would count twice

    async def told(self, rollout: Mapping[str, Any]) -> dict[str, Any]:
        """By name, of all that was seen since the rollout began."""
        async with self._one_at_a_time:
            await self._read(rollout)
        return {name: arm.told() for name, arm in sorted(self._by_name.items())}

    async def _read(self, rollout: Mapping[str, Any]) -> None:
        if rollout["id"] != self._rollout:
            self._rollout, self._cursor, self._by_name = rollout["id"], "", {}
        for _ in range(ROUNDS):
            seen, self._cursor = await self._variants.observed(self._cursor, READ)
            for payload in seen:
                one = Observation.of(payload)
                if one.at_s >= rollout["since"]:
                    self._by_name.setdefault(one.arm, Arm()).saw(one)
            if len(seen) < READ:
                break
