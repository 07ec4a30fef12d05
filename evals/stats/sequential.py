"""Looking as often as one likes: two e-processes, one that lets pass and one that rolls back.

State is a few numbers, so a rollout that restarts goes on where it was. Knows no clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import numpy as np

from evals.stats.betting import bets, log_mean
from evals.stats.estimate import check_alpha

Decided = Literal["pass", "fail", "open"]


class EProcess:
    """Evidence for a mean difference above `margin`, one bounded difference after another.

    Differences must come one from each independent unit: the mean of a conversation, not its
    turns. `best_log_e` is the most there ever was: evidence once won stays (Ville).
    """

    def __init__(self, margin: float) -> None:
        if not -1 < margin < 1:
            raise ValueError(f"margin is {margin}; a difference of scores lies between -1 and 1")
        self.margin = margin
        self.count = 0
        self.best_log_e = 0.0
        self._bets = bets(margin)
        self._log_wealths = np.zeros_like(self._bets)

    def update(self, diff: float) -> None:
        if not -1 <= diff <= 1:
            raise ValueError(f"difference is {diff}; scores between 0 and 1 differ by at most 1")
        self._log_wealths += np.log1p(self._bets * (diff - self.margin))
        self.count += 1
        self.best_log_e = max(self.best_log_e, self.log_e)

    @property
    def log_e(self) -> float:
        return log_mean(self._log_wealths)

    @property
    def p(self) -> float:
        """Valid whenever one looks."""
        return min(1.0, math.exp(-self.best_log_e))

    def pass_at(self, alpha: float) -> bool:
        check_alpha(alpha)
        return self.best_log_e >= -math.log(alpha)

    def state(self) -> dict[str, Any]:
        """As JSON; `EProcess.of` goes on from it."""
        return {
            "margin": self.margin,
            "count": self.count,
            "best_log_e": self.best_log_e,
            "log_wealths": self._log_wealths.tolist(),
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> EProcess:
        process = cls(state["margin"])
        wealths = np.array(state["log_wealths"], dtype=np.float64)
        if wealths.shape != process._bets.shape:
            raise ValueError(
                f"a state with {wealths.size} bets, and this version has {process._bets.size}: "
                "begin anew"
            )
        process.count, process.best_log_e = state["count"], state["best_log_e"]
        process._log_wealths = wealths
        return process


class Sequential:
    """One guardrail watched: `decision` is open until either side has its proof, then stays.

    `margin` is of the difference, -0.02 for two points; `update` takes candidate less baseline.
    """

    def __init__(self, margin: float, alpha: float = 0.05) -> None:
        check_alpha(alpha)
        self.alpha = alpha
        self.safe = EProcess(margin)
        self.harmful = EProcess(-margin)
        self._decision: Decided = "open"

    def update(self, diff: float) -> Decided:
        self.safe.update(diff)
        self.harmful.update(-diff)
        if self._decision == "open":
            if self.harmful.pass_at(self.alpha):
                self._decision = "fail"
            elif self.safe.pass_at(self.alpha):
                self._decision = "pass"
        return self._decision

    @property
    def decision(self) -> Decided:
        return self._decision

    @property
    def count(self) -> int:
        return self.safe.count


class Matched:
    """Pairs from arms that are not paired: within a stratum, each of the candidate's scores less
    the mean of the baseline's since the last pair.

    Fair as long as sessions fall into the arms by chance. Strata (tier and length) take out what
    differs between requests. Of the candidate's only so many wait; the oldest leave.
    """

    WAITING = 1000

    def __init__(self) -> None:
        self._baseline: dict[Hashable, tuple[float, int]] = {}
        self._candidate: dict[Hashable, deque[float]] = {}

    def baseline(self, stratum: Hashable, score: float) -> float | None:
        """The difference that this score completes, if one of the candidate's waited for it."""
        waiting = self._candidate.get(stratum)
        if waiting:
            return waiting.popleft() - score
        total, count = self._baseline.get(stratum, (0.0, 0))
        self._baseline[stratum] = (total + score, count + 1)
        return None

    def candidate(self, stratum: Hashable, score: float) -> float | None:
        """The difference that this score completes, if any of the baseline's waited for it."""
        total, count = self._baseline.pop(stratum, (0.0, 0))
        if count:
            return score - total / count
        self._candidate.setdefault(stratum, deque(maxlen=self.WAITING)).append(score)
        return None
