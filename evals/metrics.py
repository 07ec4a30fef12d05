"""What can be judged: metric name -> what it counts of one observation, and which way is better.

`correct` and every other scorer's name, `slo_attained`, `ttft.p95`, `output_tokens`, ... A request
that failed has a value too: wrong, late, as long as was allowed. Knows no pairs and no statistics.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

from telemetry import Observation

Kind = Literal["share", "flip", "time", "tokens", "rate", "divergence", "law", "drift"]
Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Metric:
    """`value` of an answered request is None where the metric says nothing about it.

    Kinds: `share` in [0, 1]; `flip` of a pair from right to wrong; `time` in seconds, by
    `quantile` (None: its mean); `tokens`, a count; `rate`, a sum of `value` a second of a block;
    `divergence` of two texts; `law` of first tokens that are drawn again and again; `drift`,
    unbounded, of the model's probabilities.
    """

    name: str
    kind: Kind
    better: Better
    value: Callable[[Observation], float | None]
    quantile: float | None = None
    scorer: str = ""  # the entry of `Observation.scores` that it reads


class UnknownMetric(ValueError):
    """No metric has this name; says which are close."""

    def __init__(self, name: str, among: tuple[str, ...]) -> None:
        close = get_close_matches(name, among, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        super().__init__(f"there is no metric {name!r}{hint or '; there are ' + ', '.join(among)}")


def _slo_attained(seen: Observation) -> float | None:
    if seen.ttft_target_s is None and seen.tpot_target_s is None:
        return None
    in_time = _within(seen.ttft_s, seen.ttft_target_s) and _within(seen.tpot_s, seen.tpot_target_s)
    return float(in_time)


def _within(taken_s: float | None, target_s: float | None) -> bool:
    """An answer of a single token has no time between tokens, and keeps a target for it."""
    return target_s is None or taken_s is None or taken_s <= target_s


def _computed(seen: Observation) -> float | None:
    return None if seen.prompt_tokens is None else seen.prompt_tokens - (seen.cached_tokens or 0)


def _cost(seen: Observation) -> float | None:
    computed, cached = _computed(seen), seen.cached_tokens or 0
    if computed is None or seen.completion_tokens is None:
        return None
    return computed + 0.1 * cached + 4 * seen.completion_tokens


def _drift(seen: Observation) -> float | None:
    return -sum(seen.logprobs) / len(seen.logprobs) if seen.logprobs else None


def _one(_seen: Observation) -> float:
    return 1.0


_TIMES: Mapping[str, Callable[[Observation], float | None]] = {
    "ttft": lambda seen: seen.ttft_s,
    "tpot": lambda seen: seen.tpot_s,
    "e2e": lambda seen: seen.e2e_s,
    "gap_max": lambda seen: seen.gap_max_s,
}
_POINT = re.compile(r"mean|p([0-9]{1,2})")
# `cost` is in prompt tokens: one that was cached costs a tenth, one of the answer four.
_NAMED: Mapping[str, Metric] = {
    one.name: one
    for one in (
        Metric("slo_attained", "share", "higher", _slo_attained),
        Metric("served", "share", "higher", _one),
        Metric("lost", "flip", "lower", _one),
        Metric("output_tokens", "tokens", "lower", lambda seen: seen.completion_tokens),
        Metric("prompt_tokens", "tokens", "lower", lambda seen: seen.prompt_tokens),
        Metric("computed_tokens", "tokens", "lower", _computed),
        Metric("cost", "tokens", "lower", _cost),
        Metric("throughput", "rate", "higher", lambda seen: seen.completion_tokens),
        Metric("requests", "rate", "higher", _one),
        Metric("goodput", "rate", "higher", _slo_attained),
        Metric("divergence", "divergence", "lower", _one),
        Metric("law", "law", "lower", _one),
        Metric("nll", "drift", "lower", _drift),
    )
}
# Scorers of which less is better; of all others more is.
UNWANTED = ("bad_output", "refusal", "kl", "perplexity", "judge_errors")
_UNBOUNDED = ("kl", "perplexity")
NAMES: tuple[str, ...] = (
    *_NAMED,
    *(f"{time}.{point}" for time in _TIMES for point in ("p50", "p95", "mean")),
)


def metric(name: str) -> Metric:
    """By its name in a hypothesis. A name that is none of ours is a scorer's; one with a dot is
    a time at a quantile. Raises UnknownMetric.
    """
    if name in _NAMED:
        return _NAMED[name]
    time, dot, point = name.partition(".")
    if dot or time in _TIMES:
        match = _POINT.fullmatch(point)
        if time not in _TIMES or match is None or match[1] in ("0", "00"):
            raise UnknownMetric(name, NAMES)
        quantile = int(match[1]) / 100 if match[1] else None
        return Metric(name, "time", "lower", _TIMES[time], quantile)
    better: Better = "lower" if name in UNWANTED else "higher"
    kind: Kind = "drift" if name in _UNBOUNDED else "share"
    return Metric(name, kind, better, lambda seen: seen.scores.get(name), scorer=name)


def late(time: Metric, limit_s: float) -> Metric:
    """Whether a request took longer than a limit: of a time at a quantile, the share that may."""

    def beyond(seen: Observation) -> float | None:
        taken_s = time.value(seen)
        return None if taken_s is None else float(taken_s > limit_s)

    return replace(time, kind="share", value=beyond, quantile=None)


def share_of(metric: Metric, seen: Observation) -> float | None:
    """The value of a share: the worst there is for a request that failed."""
    if not seen.ok:
        return 0.0 if metric.better == "higher" else 1.0
    return metric.value(seen)
