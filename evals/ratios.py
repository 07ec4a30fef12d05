"""Times, rates of blocks and tokens of pairs -> estimates: the tests of ratios.

A ratio is candidate over baseline. Knows no decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from evals.metrics import Metric
from evals.pairs import Pair
from evals.questions import Question
from evals.shares import Answer, NotMeasured
from evals.stats.estimate import Floats
from evals.stats.ratio import Harm, block_t, mean_ratio, quantile_ratio, tost
from policies.hypothesis import Stats
from telemetry import Observation


@dataclass(frozen=True, slots=True)
class Blocks:
    """A pair of blocks each: the values of the same requests in both arms."""

    baseline: tuple[Floats, ...]
    candidate: tuple[Floats, ...]


@dataclass(frozen=True, slots=True)
class Counted:
    """Tokens of an item in both arms, repeats averaged; `log`: mean log ratio."""

    id: str
    cluster: str
    baseline: float
    candidate: float
    log: float


def times(question: Question, pairs: Sequence[Pair], stats: Stats) -> Answer:
    """Of a quantile, or of the mean. A failure takes as long as the slowest request of all.

    Raises NotMeasured, TooFewClusters.
    """
    blocks = _blocks(question.metric, pairs)
    left, right = np.concatenate(blocks.baseline), np.concatenate(blocks.candidate)
    quantile = question.metric.quantile
    if quantile is None:
        found = block_t(_time_logs(blocks, None), question.margin, stats.alpha, _harm(question))
        return Answer(found, float(left.mean()), float(right.mean()))
    found = quantile_ratio(
        blocks.baseline,
        blocks.candidate,
        quantile,
        question.margin,
        stats.alpha,
        np.random.default_rng(stats.seed),
        _harm(question),
    )
    return Answer(found, _middle(left, quantile), _middle(right, quantile))


def rates(question: Question, pairs: Sequence[Pair], stats: Stats) -> Answer:
    """Of what a block brings in a second: tokens, requests, requests in time.

    Raises NotMeasured, TooFewClusters.
    """
    both = _block_rates(question.metric, pairs)
    if not both:
        raise NotMeasured(question.metric.name)
    left = math.fsum(a for a, _ in both) / len(both)
    right = math.fsum(b for _, b in both) / len(both)
    logs = [math.log(b / a) for a, b in both]
    return Answer(block_t(logs, question.margin, stats.alpha, _harm(question)), left, right)


def block_logs(metric: Metric, pairs: Sequence[Pair]) -> list[float]:
    """Of a time or a rate: the log ratio of each pair of blocks, as far as it is known."""
    if metric.kind == "rate":
        return [math.log(b / a) for a, b in _block_rates(metric, pairs)]
    try:
        return _time_logs(_blocks(metric, pairs), metric.quantile)
    except NotMeasured:
        return []


def tokens(question: Question, pairs: Sequence[Pair], stats: Stats) -> Answer:
    """Mean of the items' log ratios: within both bounds (tost), or better or no worse than one."""
    seen = counted(question.metric, pairs)
    if not seen:
        raise NotMeasured(question.metric.name)
    names, logs = [one.cluster for one in seen], [one.log for one in seen]
    left = math.fsum(one.baseline for one in seen) / len(seen)
    right = math.fsum(one.candidate for one in seen) / len(seen)
    if question.test == "tost":
        return Answer(tost(logs, question.bound, names, stats.alpha), left, right)
    found = mean_ratio(logs, question.margin, names, stats.alpha, _harm(question))
    return Answer(found, left, right)


def _harm(question: Question) -> Harm:
    return "rise" if question.metric.better == "lower" else "fall"


def _grouped(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs of the same two blocks together, in the order of the blocks."""
    groups: dict[tuple[str, int, int], list[Pair]] = {}
    for one in pairs:
        groups.setdefault((one.source, *one.block), []).append(one)
    return [groups[key] for key in sorted(groups)]


def _blocks(metric: Metric, pairs: Sequence[Pair]) -> Blocks:
    known = [
        value
        for pair in pairs
        for one in (pair.baseline, pair.candidate)
        if (value := _time(metric, one)) is not None
    ]
    if not known:
        raise NotMeasured(metric.name)
    slowest = max(known)
    left, right = [], []
    for group in _grouped(pairs):
        # what one arm alone can tell comes last, so that the others stand side by side
        group.sort(
            key=lambda one: not (_told(metric, one.baseline) and _told(metric, one.candidate))
        )
        a = _values(metric, [one.baseline for one in group], slowest)
        b = _values(metric, [one.candidate for one in group], slowest)
        if a.size and b.size:
            left.append(a)
            right.append(b)
    if not left:
        raise NotMeasured(metric.name)
    return Blocks(tuple(left), tuple(right))


def _time_logs(blocks: Blocks, quantile: float | None) -> list[float]:
    return [
        math.log(_middle(b, quantile) / _middle(a, quantile))
        for a, b in zip(blocks.baseline, blocks.candidate, strict=True)
    ]


def _values(metric: Metric, seen: Sequence[Observation], slowest: float) -> Floats:
    found = [_time(metric, one) if one.ok else slowest for one in seen]
    return np.array([max(one, 1e-6) for one in found if one is not None])


def _told(metric: Metric, seen: Observation) -> bool:
    return not seen.ok or metric.value(seen) is not None


def _time(metric: Metric, seen: Observation) -> float | None:
    """Of a failure: how long it was waited for, if that is known."""
    return metric.value(seen) if seen.ok else seen.e2e_s


def _block_rates(metric: Metric, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    """A block that brought nothing counts as the least that any block brought, a tenth of it."""
    both = [
        (
            _per_second(metric.value, [one.baseline for one in group]),
            _per_second(metric.value, [one.candidate for one in group]),
        )
        for group in _grouped(pairs)
    ]
    known = [(a, b) for a, b in both if a is not None and b is not None]
    some = [one for pair in known for one in pair if one > 0]
    least = min(some, default=0.0) / 10
    return [(max(a, least), max(b, least)) for a, b in known] if some else []


def _per_second(
    value: Callable[[Observation], float | None], seen: Sequence[Observation]
) -> float | None:
    """A failure brings nothing, and its time counts."""
    begin = min(one.at_s for one in seen)
    end = max(one.at_s + (one.e2e_s or 0.0) for one in seen)
    found = [value(one) for one in seen if one.ok]
    if end <= begin or (found and all(one is None for one in found)):
        return None
    return math.fsum(one or 0.0 for one in found) / (end - begin)


def counted(metric: Metric, pairs: Sequence[Pair]) -> list[Counted]:
    """Each item. A failure has taken all the tokens that it was allowed, else as many as the
    longest.
    """
    known = [
        metric.value(one) for pair in pairs for one in (pair.baseline, pair.candidate) if one.ok
    ]
    longest = max((one for one in known if one is not None), default=1.0)
    items: dict[tuple[str, str], list[tuple[float, float]]] = {}
    clusters: dict[tuple[str, str], str] = {}
    for pair in pairs:
        a = _count(metric, pair.baseline, longest)
        b = _count(metric, pair.candidate, longest)
        if a is not None and b is not None:
            items.setdefault((pair.source, pair.id), []).append((a, b))
            clusters[pair.source, pair.id] = pair.cluster
    return [
        Counted(
            id=key[1],
            cluster=clusters[key],
            baseline=math.fsum(a for a, _ in seen) / len(seen),
            candidate=math.fsum(b for _, b in seen) / len(seen),
            log=math.fsum(math.log(b / a) for a, b in seen) / len(seen),
        )
        for key, seen in items.items()
    ]


def _count(metric: Metric, seen: Observation, longest: float) -> float | None:
    if not seen.ok:
        return (
            float(max(seen.max_tokens or longest, 1)) if metric.name == "output_tokens" else longest
        )
    found = metric.value(seen)
    return None if found is None else max(found, 1.0)


def _middle(values: Floats, quantile: float | None) -> float:
    return float(values.mean() if quantile is None else np.quantile(values, quantile))
