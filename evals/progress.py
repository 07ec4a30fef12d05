"""How far a run is, when it will end, and what it says so far; and whether it may stop.

Knows the gate's looks at a run that goes on; prints nothing itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from evals.design import Step
from evals.gate import judge_pairs
from evals.journal import Done, Journal
from evals.pairs import BASELINE, CANDIDATE, by_arm, pair
from evals.verdict import Finding
from policies.hypothesis import Hypothesis
from telemetry import Observation

LOOK_SHARE = 0.05  # of the time, at most, is spent on looking at what there is
SHOWN = 3  # questions with their intervals


@dataclass(slots=True)
class Progress:
    """`show` takes a line that replaces the one before."""

    hypothesis: Hypothesis
    show: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _steps: Sequence[Step] = ()
    _seen: list[Observation] = field(default_factory=list)
    _asked: int = 0
    _left: dict[str, int] = field(default_factory=dict)
    _cost_s: dict[str, tuple[float, int]] = field(default_factory=dict)
    _findings: tuple[Finding, ...] = ()
    _looked_at: float = 0.0
    _look_s: float = 0.0

    def begin(self, steps: Sequence[Step], journal: Journal) -> None:
        self._steps = steps
        self._seen = list(journal.observations)
        self._left = {}
        for step in steps:
            if step not in journal:
                self._left[step.arm] = self._left.get(step.arm, 0) + step.block.size
        for one in journal.done:
            self._spent(one)

    def after(self, step: Step, done: Done) -> str | None:
        """Takes a step in; why the run may stop now, or None."""
        self._seen += done.observations
        self._left[step.arm] -= step.block.size
        self._spent(done)
        stop = self._look() if step.arm in (BASELINE, CANDIDATE) else None
        self.show(self.line())
        return stop

    def end(self) -> None:
        self.show("")

    def line(self) -> str:
        """`312 of 2,500 requests  3 min 10 s left  correct -0.40 pp [-1.90, +1.10]`."""
        left = sum(self._left.values())
        total = left + self._asked
        parts = [f"{self._asked:,} of {total:,} requests"]
        if (seconds := self._left_s()) is not None:
            parts.append(f"{_duration(seconds)} left")
        parts += [said for one in self._findings[:SHOWN] if (said := interval(one))]
        return "  ".join(parts)

    def _spent(self, done: Done) -> None:
        spent, count = self._cost_s.get(done.arm, (0.0, 0))
        self._cost_s[done.arm] = (spent + done.took_s, count + len(done.observations))
        self._asked += len(done.observations)

    def _left_s(self) -> float | None:
        """By what a request has taken in each arm so far; the baseline's where there is none."""
        if not self._asked:
            return None
        mean = sum(one[0] for one in self._cost_s.values()) / self._asked
        seconds = 0.0
        for arm, left in self._left.items():
            spent, count = self._cost_s.get(arm, (0.0, 0))
            seconds += left * (spent / count if count else mean)
        return seconds

    def _look(self) -> str | None:
        """The questions over what there is; in sequential mode, whether they are decided."""
        now = self.clock()
        sequential = self.hypothesis.stats.mode == "sequential"
        if now - self._looked_at < self._look_s / LOOK_SHARE:
            return None
        arms = by_arm(self._seen)
        both = _asked_of_both(arms.get(BASELINE, []), arms.get(CANDIDATE, []))
        if not both[0]:
            return None
        self._findings = judge_pairs(self.hypothesis, pair(*both))
        self._looked_at = self.clock()
        self._look_s = self._looked_at - now
        return decided(self._findings) if sequential else None


def decided(findings: Sequence[Finding]) -> str | None:
    """Why no further pair is needed: harm is shown, or all that is asked is."""
    rails = [one for one in findings if one.kind == "guardrail"]
    claims = [one for one in findings if one.kind == "claim"]
    failed = [one.name for one in rails if one.decision == "fail"]
    if failed:
        return f"{failed[0]} is known to fail"
    shown = not claims or any(one.decision == "pass" for one in claims)
    if shown and all(one.decision == "pass" for one in rails):
        return "all that is asked is shown"
    return None


def _asked_of_both(
    baseline: Sequence[Observation], candidate: Sequence[Observation]
) -> tuple[list[Observation], list[Observation]]:
    """Requests that only one arm has been asked yet are no failures of the other."""
    left = {(one.source, one.id, one.repeat) for one in baseline}
    right = {(one.source, one.id, one.repeat) for one in candidate}
    both = left & right
    return (
        [one for one in baseline if (one.source, one.id, one.repeat) in both],
        [one for one in candidate if (one.source, one.id, one.repeat) in both],
    )


def interval(finding: Finding) -> str:
    """`correct -0.40 pp [-1.90, +1.10]`; "" where nothing is known."""
    if finding.estimate is None or finding.low is None or finding.high is None:
        return ""
    if finding.unit == "ratio":
        bounds = f"[{finding.low:.2f}, {finding.high:.2f}]"
        return f"{finding.metric} x{finding.estimate:.2f} {bounds}"
    sign = "+" if finding.unit == "difference" else ""
    low, value, high = (100 * one for one in (finding.low, finding.estimate, finding.high))
    unit = "pp" if finding.unit == "difference" else "%"
    return f"{finding.metric} {value:{sign}.2f} {unit} [{low:{sign}.2f}, {high:{sign}.2f}]"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
