"""Whether the candidate gets worse as it goes: from turn to turn, or the longer it runs.

A mean over a run hides what grows in it, and a service runs longer than any gate. Knows no
decisions but its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from evals.battery import null_of
from evals.metrics import share_of
from evals.pairs import Pair, by_source
from evals.questions import Question
from evals.stats.estimate import TooFewClusters, cluster_sums
from evals.stats.many import holm
from evals.stats.trend import growth
from evals.verdict import Control

# Chance that a candidate that stays the same is said to get worse, over all metrics together.
TREND_ALPHA = 0.01
LATE_ALPHA = 0.05  # and that late turns, which gain nothing, are said to lose
_ALONG: Mapping[str, Callable[[Pair], float]] = {
    "turn": lambda pair: float(pair.baseline.turn),
    "uptime": lambda pair: pair.candidate.at_s,
}


def check_trend(asked: Sequence[Question], pairs: Sequence[Pair]) -> Control:
    """No guardrail's metric gets worse from the first turn to the last, or from the begin of the
    run to its end, by more than its margin and more than chance does. Of several guardrails of one
    metric the strictest margin counts.

    Talks have an end: where late turns lose nothing, early ones only gain. A server runs on, and
    what it gains less and less it will lose.
    """
    sources = by_source(pairs)
    found: dict[str, dict[str, Any]] = {}
    for question in asked:
        if question.kind == "guardrail":
            for axis, one in _grown(question, sources.get(question.source, ())):
                name = f"{_named(question)} by {axis}"
                if name not in found or one["margin"] < found[name]["margin"]:
                    found[name] = one
    said = []
    for (name, one), p in zip(
        found.items(), holm([one["p"] for one in found.values()]), strict=True
    ):
        one["p"] = p
        if (
            p <= TREND_ALPHA
            and one["growth"] > one["margin"]
            and one.get("late_p", 0) <= LATE_ALPHA
        ):
            unit = one["unit"]
            said.append(
                f"the candidate gets worse: {name} by {_amount(one['growth'], unit)} from first to "
                f"last (p {p:.2g}), and {_amount(one['margin'], unit)} may be lost in all"
            )
    return Control("trend", not said, {"alpha": TREND_ALPHA, "metrics": found}, "; ".join(said))


def _named(question: Question) -> str:
    """Guardrails that count the same have one name; those of late requests each have a limit of
    their own.
    """
    late = question.test == "percentile_max"
    return question.name if late else f"{question.source} {question.metric.name}"


def _grown(question: Question, pairs: Sequence[Pair]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Along each axis that the pairs lie on, as far as they can tell."""
    logs = question.metric.kind in ("time", "tokens")
    known = [(value, one) for one in pairs if (value := _worse(question, one)) is not None]
    margin = math.log1p(question.bound) if logs else question.bound
    for axis, place in _ALONG.items():
        # requests of a block share what the machine did meanwhile
        names: list[Hashable] = [one.block if logs else one.cluster for _, one in known]
        if not known:
            continue
        try:
            grown = growth([value for value, _ in known], [place(one) for _, one in known], names)
        except TooFewClusters:
            continue
        detail = {
            "growth": grown.estimate,
            "low": grown.low,
            "high": grown.high,
            "margin": margin,
            "unit": "ratio" if logs else "difference",
            "p": grown.p_harm,
        }
        if axis == "turn":
            detail["late"], detail["late_p"] = _late(known, place, names)
        yield axis, detail


def _late(
    known: Sequence[tuple[float, Pair]],
    place: Callable[[Pair], float],
    names: Sequence[Hashable],
) -> tuple[float, float]:
    """What the later half of the turns loses, and p of "nothing" by t over clusters."""
    places = np.array([place(one) for _, one in known])
    late = places >= (places.min() + places.max()) / 2
    values = np.array([value for value, _ in known])[late]
    mean = float(values.mean())
    within = [name for name, is_late in zip(names, late, strict=True) if is_late]
    sums, _ = cluster_sums(values - mean, within)
    if sums.size < 2:
        return mean, 0.0
    error = float(np.sqrt((sums @ sums) * sums.size / (sums.size - 1))) / values.size
    if not error:
        return mean, float(mean <= 0)
    return mean, float(special.stdtr(sums.size - 1, -mean / error))


def _worse(question: Question, pair: Pair) -> float | None:
    """How much worse the candidate was; of times and tokens as the logarithm of a ratio, where both
    answered. None where the pair says nothing.
    """
    metric = null_of(question).metric
    sign = 1.0 if metric.better == "lower" else -1.0
    if metric.kind == "share":
        before, after = share_of(metric, pair.baseline), share_of(metric, pair.candidate)
        return None if before is None or after is None else sign * (after - before)
    if metric.kind not in ("time", "tokens") or not pair.complete:
        return None
    before, after = metric.value(pair.baseline), metric.value(pair.candidate)
    return sign * math.log(after / before) if before and after else None


def _amount(value: float, unit: str) -> str:
    return f"{100 * math.expm1(value):.1f} %" if unit == "ratio" else f"{100 * value:.2f} points"
