"""What a candidate's live traffic says of it, one observation after another: for it, or against it.

Guardrails become signals, each a score in [0, 1] of one request; every one is watched by two
e-processes, so that one may look at any moment. Knows no gateway, no shares and no clock.
docs/rollout.md tells what of a hypothesis is watched, and how.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evals.metrics import Metric, metric, share_of
from evals.pairs import BASELINE, CANDIDATE
from evals.stats.sequential import EProcess, Matched
from policies.hypothesis import Guardrail, Hypothesis
from telemetry import Observation

LEARN = 100  # of the baseline's times, before a limit is set by them
UNPAIRED_MAX = 8192  # observations that wait for the other arm's
SERVED_MARGIN = 0.02  # of requests that are answered, where a hypothesis says nothing of it
TIME_MARGIN, MEDIAN_MARGIN = 0.05, 0.1  # of requests beyond the limit of a quantile
SHADOW = "shadow"  # source of what the candidate answered for nobody
NOBODYS = ("refused", "cancelled")  # outcomes that say nothing of an arm
LATE_TURN = 4  # from this turn of a conversation on
ANEW = 500  # pairs after which harm of late is looked for anew


@dataclass(frozen=True, slots=True)
class Signal:
    """One guardrail as it can be watched live. `alone`: against its limit, not the baseline."""

    name: str
    metric: Metric
    margin: float
    alone: bool = False
    beyond: float = 0.0  # a time's limit lies so far above the baseline's quantile, as a share
    limit_s: float | None = None  # of a time: known, and not learned from the baseline


@dataclass(slots=True)
class Watched:
    """One signal, and what was seen of it: over all, of late, and in late turns alone. What gets
    worse with time or turns shows in the last two, which no good beginning hides.
    """

    signal: Signal
    safe: EProcess
    harmful: EProcess
    harmful_of_late: EProcess
    harmful_late_turns: EProcess
    alpha: float  # chance of a false alarm of all three
    begun: int = 1  # how often harm of late has begun anew
    harmed: bool = False
    matched: Matched = field(default_factory=Matched)
    matched_late_turns: Matched = field(default_factory=Matched)
    limit_s: float | None = None
    learning: list[float] = field(default_factory=list)
    total: float = 0.0

    def score(self, seen: Observation) -> float | None:
        """1 is good. None where this request says nothing of it, or nothing yet."""
        of = self.signal.metric
        if of.kind != "time":
            value = share_of(of, seen)
            return value if value is None or of.better == "higher" else 1.0 - value
        value = of.value(seen) if seen.ok else None
        if seen.ok and value is None:
            return None
        if self.limit_s is None:
            if seen.arm == BASELINE and value is not None:
                self._learn(value)
            return None
        return float(value is not None and value <= self.limit_s)

    def _learn(self, value: float) -> None:
        self.learning.append(value)
        if len(self.learning) >= LEARN:
            quantile = self.signal.metric.quantile or 0.5
            usual = float(np.quantile(self.learning, quantile))
            self.limit_s = usual * (1 + self.signal.beyond)
            self.learning.clear()

    def update(self, diff: float) -> None:
        self.safe.update(diff)
        self.harmful.update(-diff)
        self.harmful_of_late.update(-diff)
        self.total += diff
        third = self.alpha / 3
        # Sums over all beginnings to a third: those to come have ever less of it.
        of_late = third * 6 / (math.pi * self.begun) ** 2
        self.harmed |= self.harmful.pass_at(third) or self.harmful_of_late.pass_at(of_late)
        if self.harmful_of_late.count >= ANEW:
            self.begin_anew()

    def update_late_turns(self, diff: float) -> None:
        self.harmful_late_turns.update(-diff)
        self.harmed |= self.harmful_late_turns.pass_at(self.alpha / 3)

    def begin_anew(self) -> None:
        if self.harmful_of_late.count:
            self.harmful_of_late = EProcess(self.signal.margin)
            self.begun += 1

    def difference(self, before: Observation, after: Observation) -> float | None:
        """Of the same request in both arms."""
        old, new = self.score(before), self.score(after)
        if new is None or (old is None and not self.signal.alone):
            return None
        return new - (1.0 if self.signal.alone or old is None else old)

    def match(self, seen: Observation, score: float, matched: Matched) -> float | None:
        """The difference that a score completes, with one of the other arm within its stratum."""
        if self.signal.alone:
            return score - 1.0 if seen.arm == CANDIDATE else None
        stratum = (seen.tier, _bucket(seen.prompt_tokens))
        arm = matched.candidate if seen.arm == CANDIDATE else matched.baseline
        diff = arm(stratum, score)
        return None if diff is None else max(-1.0, min(1.0, diff))

    @property
    def mean(self) -> float:
        return self.total / self.safe.count if self.safe.count else 0.0

    def state(self) -> dict[str, Any]:
        return {
            "safe": self.safe.state(),
            "harmful": self.harmful.state(),
            "harmful_of_late": self.harmful_of_late.state(),
            "harmful_late_turns": self.harmful_late_turns.state(),
            "begun": self.begun,
            "harmed": self.harmed,
            "limit_s": self.limit_s,
            "total": self.total,
        }


class Monitor:
    """All signals of one rollout."""

    def __init__(self, signals: Iterable[Signal], alpha: float) -> None:
        self.alpha = alpha
        named = list(signals)
        self.watched = [_watched(one, alpha / len(named)) for one in named]
        self.pairs = 0
        self._unpaired: OrderedDict[str, Observation] = OrderedDict()
        self._units: set[tuple[str, str]] = set()  # arm and cluster: each counts once in a stage

    def saw(self, seen: Observation) -> None:
        """One request of either arm."""
        if seen.outcome in NOBODYS:
            return
        if seen.source == SHADOW or seen.id in self._unpaired:
            self._mirrored(seen)
        elif seen.arm == BASELINE:
            self._unpaired[seen.id] = seen
            if len(self._unpaired) > UNPAIRED_MAX:
                self._unpaired.popitem(last=False)
            self._live(seen)
        else:
            self._live(seen)

    def _mirrored(self, seen: Observation) -> None:
        """The second of a pair completes it."""
        other = self._unpaired.pop(seen.id, None)
        if other is None or other.arm == seen.arm:
            self._unpaired[seen.id] = seen
            return
        self.pairs += 1
        before, after = (other, seen) if other.arm == BASELINE else (seen, other)
        first, late = self._counts(before, "pair")
        for watched in self.watched if first or late else ():
            diff = watched.difference(before, after)
            if diff is not None and first:
                watched.update(diff)
            if diff is not None and late:
                watched.update_late_turns(diff)

    def _live(self, seen: Observation) -> None:
        first, late = self._counts(seen, seen.arm)
        for watched in self.watched if first or late else ():
            score = watched.score(seen)
            if score is None:
                continue
            if first and (diff := watched.match(seen, score, watched.matched)) is not None:
                watched.update(diff)
            if late:
                diff = watched.match(seen, score, watched.matched_late_turns)
                if diff is not None:
                    watched.update_late_turns(diff)

    def _counts(self, seen: Observation, arm: str) -> tuple[bool, bool]:
        """Whether it is the first of its conversation in a stage; and of its late turns."""
        late = seen.turn >= LATE_TURN and self._first(seen.cluster, f"{arm}, late")
        return self._first(seen.cluster, arm), late

    def _first(self, cluster: str, arm: str) -> bool:
        """Turns of a conversation depend on each other: its first one in a stage counts."""
        unit = (arm, cluster)
        if unit in self._units:
            return False
        self._units.add(unit)
        return True

    def next_stage(self) -> None:
        """Harm of late counts from here; conversations count anew."""
        self._units.clear()
        for watched in self.watched:
            watched.begin_anew()

    # ---- what it says ---------------------------------------------------------------------------

    @property
    def harm(self) -> str | None:
        """Why the candidate has to go: one proof of harm beyond a margin is enough."""
        for watched in self.watched:
            if watched.harmed:
                signal = watched.signal
                return (
                    f"{signal.name} is worse by more than {signal.margin:g}: {watched.mean:+.4f} "
                    f"over {watched.safe.count} pairs"
                )
        return None

    @property
    def passed(self) -> bool:
        """Whether every signal has its proof that nothing beyond its margin is lost."""
        return all(watched.safe.pass_at(self.alpha) for watched in self.watched)

    def told(self) -> list[dict[str, Any]]:
        """For people, and for an incident."""
        return [
            {
                "signal": watched.signal.name,
                "margin": watched.signal.margin,
                "pairs": watched.safe.count,
                "difference": round(watched.mean, 6),
                "p_safe": watched.safe.p,
                "p_harmful": min(watched.harmful.p, watched.harmful_of_late.p),
                "p_harmful_late_turns": watched.harmful_late_turns.p,
                "passed": watched.safe.pass_at(self.alpha),
            }
            for watched in self.watched
        ]

    # ---- kept over restarts ---------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """As JSON. What waits for its other half is left out."""
        named = {watched.signal.name: watched.state() for watched in self.watched}
        return {"pairs": self.pairs, "watched": named}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """From where `state` was taken; a signal that it does not know begins anew."""
        self.pairs = state["pairs"]
        for watched in self.watched:
            known = state["watched"].get(watched.signal.name)
            if known is None:
                continue
            watched.safe = EProcess.of(known["safe"])
            watched.harmful = EProcess.of(known["harmful"])
            watched.harmful_of_late = EProcess.of(known["harmful_of_late"])
            watched.harmful_late_turns = EProcess.of(known["harmful_late_turns"])
            watched.begun, watched.harmed = known["begun"], known["harmed"]
            watched.limit_s, watched.total = known["limit_s"], known["total"]


def _watched(signal: Signal, alpha: float) -> Watched:
    safe, (harmful, of_late, late_turns) = (
        EProcess(-signal.margin),
        [EProcess(signal.margin) for _ in range(3)],
    )
    return Watched(signal, safe, harmful, of_late, late_turns, alpha, limit_s=signal.limit_s)


def _bucket(prompt_tokens: int | None) -> int:
    """Lengths within a factor of four are alike; -1: not known."""
    return -1 if prompt_tokens is None else prompt_tokens.bit_length() // 2


# ---- a hypothesis as signals --------------------------------------------------------------------


def signals(hypothesis: Hypothesis) -> tuple[list[Signal], list[str]]:
    """What can be watched live, and the guardrails that cannot: they need expected answers."""
    found: dict[str, Signal] = {}
    unseen = []
    for guardrail in hypothesis.guardrails:
        signal = _signal(guardrail)
        if signal is None:
            unseen.append(guardrail.metric)
        else:
            found.setdefault(signal.name, signal)
    found.setdefault("served", Signal("served", metric("served"), SERVED_MARGIN))
    return list(found.values()), unseen


LIVE_SHARES = ("slo_attained", "served", "bad_output")


def _signal(guardrail: Guardrail) -> Signal | None:
    of = metric(guardrail.metric)
    if of.quantile is not None and guardrail.within is not None:
        limit_s = guardrail.within
        return Signal(f"{of.name} within", of, 1 - of.quantile, alone=True, limit_s=limit_s)
    if of.kind == "time" and guardrail.margin is not None:
        high = of.quantile is not None and of.quantile >= 0.9
        margin = TIME_MARGIN if high else MEDIAN_MARGIN
        return Signal(of.name, of, margin, beyond=guardrail.margin)
    if of.name not in LIVE_SHARES:
        return None
    if guardrail.max is not None:
        return Signal(of.name, of, guardrail.max, alone=True)
    assert guardrail.margin is not None, "the schema sees to it"
    return Signal(of.name, of, guardrail.margin)
