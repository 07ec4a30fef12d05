"""Scores, flips, rates and drifts of pairs -> estimates: the tests that count requests.

Everything is turned so that more is better, tested, and turned back. Knows no decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evals.metrics import Metric, share_of
from evals.pairs import BASELINE, CANDIDATE, Pair
from evals.questions import Question
from evals.stats.betting import betting
from evals.stats.divergence import mean_below
from evals.stats.estimate import Estimate, Floats, cluster_sums
from evals.stats.paired import mean_diff
from evals.stats.rates import cluster_rate
from evals.stats.sequential import Sequential
from policies.hypothesis import Stats
from telemetry import Observation

_RIGHT = 0.5  # a score from here on is right


class NotMeasured(ValueError):
    """No pair says anything about the metric."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One item with all its repeats: the mean of each arm."""

    id: str
    baseline: float
    candidate: float
    cluster: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """An estimate, and what the arms have by themselves; `spread` is of its logarithm or mean."""

    estimate: Estimate
    baseline: float | None = None
    candidate: float | None = None
    lost: int | None = None
    gained: int | None = None


def units(metric: Metric, pairs: Sequence[Pair]) -> list[Unit]:
    """Repeats of an item averaged. What a metric says of one arm only is the worst in the other."""
    worst = 0.0 if metric.better == "higher" else 1.0
    return _averaged(pairs, lambda seen: share_of(metric, seen), worst)


def paired(question: Question, pairs: Sequence[Pair], stats: Stats) -> Answer:
    """Difference of means: candidate less baseline. Raises NotMeasured, TooFewClusters."""
    seen = _some(units(question.metric, pairs), question)
    sign = 1.0 if question.metric.better == "higher" else -1.0
    margin = sign * question.margin
    diffs = np.array([sign * (one.candidate - one.baseline) for one in seen])
    lost, gained = _flips(seen, sign)
    if stats.mode == "sequential" and question.kind == "guardrail":
        found = _anytime(diffs, seen, margin, stats.alpha)
    else:
        found = mean_diff(diffs, margin, [one.cluster for one in seen], stats.alpha)
    return Answer(
        estimate=found if sign > 0 else negated(found),
        baseline=_mean([one.baseline for one in seen]),
        candidate=_mean([one.candidate for one in seen]),
        lost=lost,
        gained=gained,
    )


def rate(question: Question, pairs: Sequence[Pair], stats: Stats) -> Answer:
    """Share of unwanted outcomes in the candidate; of `lost`, of pairs that it got wrong and the
    baseline right. Raises NotMeasured, TooFewClusters.
    """
    lost: int | None
    gained: int | None
    of_baseline = None
    if question.metric.kind == "flip":
        events, lost, gained = _lost(pairs)
    else:
        seen = units(question.metric, pairs)
        events = [(one.candidate, one.cluster, one.at_s) for one in seen]
        lost, gained = _flips(seen, -1.0)
        of_baseline = _mean([one.baseline for one in seen]) if seen else None
    if not events:
        raise NotMeasured(question.metric.name)
    values = np.array([value for value, _, _ in events])
    if stats.mode == "sequential":
        seen = [Unit("", 0.0, value, cluster, at_s) for value, cluster, at_s in events]
        found = negated(_anytime(-values, seen, -question.bound, stats.alpha))
    else:
        names = [cluster for _, cluster, _ in events]
        found = cluster_rate(values, names, question.bound, stats.alpha)
    return Answer(found, of_baseline, float(values.mean()), lost, gained)


def mean(question: Question, pairs: Sequence[Pair], stats: Stats) -> Answer:
    """Mean of the candidate, of `nll` its excess over the baseline, and a maximum that it has to
    stay below. A failure is as bad as the worst answer. Raises NotMeasured, TooFewClusters.
    """
    metric = question.metric
    known = [
        metric.value(one) for pair in pairs for one in (pair.baseline, pair.candidate) if one.ok
    ]
    worst = max((one for one in known if one is not None), default=0.0)

    def value(one: Observation) -> float | None:
        return metric.value(one) if one.ok else worst

    seen = _some(_averaged(pairs, value, worst), question)
    excess = metric.name == "nll"
    values = [one.candidate - one.baseline if excess else one.candidate for one in seen]
    found = mean_below(values, question.bound, [one.cluster for one in seen], stats.alpha)
    of_baseline, own = (_mean([getattr(one, arm) for one in seen]) for arm in (BASELINE, CANDIDATE))
    return Answer(found, of_baseline, own)


def negated(found: Estimate) -> Estimate:
    return replace(found, estimate=-found.estimate, low=-found.high, high=-found.low)


def _averaged(
    pairs: Sequence[Pair], value: Callable[[Observation], float | None], worst: float
) -> list[Unit]:
    items: dict[tuple[str, str], list[tuple[float, float, Pair]]] = {}
    for pair in pairs:
        left, right = value(pair.baseline), value(pair.candidate)
        if left is None and right is None:
            continue
        both = (worst if left is None else left, worst if right is None else right, pair)
        items.setdefault((pair.source, pair.id), []).append(both)
    return [
        Unit(
            key[1],
            _mean([left for left, _, _ in seen]),
            _mean([right for _, right, _ in seen]),
            seen[0][2].cluster,
            min(pair.baseline.at_s for _, _, pair in seen),
        )
        for key, seen in items.items()
    ]


def _flips(seen: Sequence[Unit], sign: float) -> tuple[int, int] | tuple[None, None]:
    """Lost and gained, where every score is right or wrong and nothing between."""
    if any(value not in (0.0, 1.0) for one in seen for value in (one.baseline, one.candidate)):
        return None, None
    change = [sign * (one.candidate - one.baseline) for one in seen]
    return sum(one < 0 for one in change), sum(one > 0 for one in change)


def _lost(pairs: Sequence[Pair]) -> tuple[list[tuple[float, str, float]], int, int]:
    """A pair each, repeats too: whether what was right is wrong; and both ways, counted."""
    events, gained = [], 0
    for one in pairs:
        left, right = correct(one.baseline), correct(one.candidate)
        if left is None and right is None:
            continue
        was, stays = (left or 0.0) >= _RIGHT, (right or 0.0) >= _RIGHT
        gained += stays and not was
        events.append((float(was and not stays), one.cluster, one.baseline.at_s))
    return events, int(sum(value for value, _, _ in events)), gained


def correct(seen: Observation) -> float | None:
    return seen.scores.get("correct") if seen.ok else 0.0


def _anytime(
    diffs: Floats,
    seen: Sequence[Unit],
    margin: float,
    alpha: float,
) -> Estimate:
    """Two e-processes over the mean of each cluster, in the order in which they began."""
    began: dict[str, float] = {}
    for one in seen:
        began[one.cluster] = min(one.at_s, began.get(one.cluster, math.inf))
    sums, sizes = cluster_sums(diffs, [one.cluster for one in seen])
    names = list(dict.fromkeys(one.cluster for one in seen))
    means: Mapping[str, float] = dict(zip(names, (sums / sizes).tolist(), strict=True))
    ordered = [means[name] for name in sorted(names, key=lambda name: (began[name], name))]
    watch = Sequential(margin, alpha)
    for diff in ordered:
        watch.update(diff)
    fixed = betting(ordered, margin, alpha)
    passed, failed = watch.safe.pass_at(alpha), watch.harmful.pass_at(alpha)
    return replace(
        fixed,
        low=max(fixed.low, float(np.nextafter(margin, 1))) if passed else min(fixed.low, margin),
        high=min(fixed.high, float(np.nextafter(margin, -1)))
        if failed
        else max(fixed.high, margin),
        p=watch.safe.p,
        p_harm=watch.harmful.p,
        n=len(seen),
        clusters=len(names),
        method="e_process",
        detail={"log_e": watch.safe.best_log_e, "log_e_harm": watch.harmful.best_log_e},
    )


def _some(seen: list[Unit], question: Question) -> list[Unit]:
    if not seen:
        raise NotMeasured(question.metric.name)
    return seen


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
