"""Ratios of times, tokens and throughput: by blocks that alternate, and by clusters for equality.

Works on logarithms, so that twice and half are equally far from 1. A latency quantile of a block
is one number, and a pair of neighbouring blocks one observation: what drifts hits both.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from evals.stats.estimate import (
    FEWEST_CLUSTERS,
    FEWEST_MOVED,
    Estimate,
    Floats,
    TooFewClusters,
    check_alpha,
    cluster_sums,
    finite,
    freedom,
    moments,
    worth,
)
from evals.stats.paired import reach_of, tail
from evals.stats.rates import rate_p

Harm = Literal["rise", "fall"]  # what of the metric is bad: latencies rise, throughput falls
FEWEST_BLOCK_PAIRS = 10
_RESAMPLES = 4000
_FAR = 20.0  # logarithm of a ratio that nothing is known of
_WITHIN = 200


def log_ratios(baseline: ArrayLike, candidate: ArrayLike) -> Floats:
    """Logarithm of candidate over baseline, pair by pair. Raises ValueError for what is not > 0."""
    below, above = finite(baseline, "baseline values"), finite(candidate, "candidate values")
    if below.size != above.size:
        raise ValueError(f"{below.size} values of the baseline, {above.size} of the candidate")
    if min(below.min(), above.min()) <= 0:
        raise ValueError("a value of zero or less has no ratio: give a failed request its cap")
    return np.log(above / below)


def block_t(
    logs: ArrayLike, margin_ratio: float, alpha: float = 0.05, harm: Harm = "rise"
) -> Estimate:
    """Geometric mean ratio of block pairs, t(pairs - 1). `margin_ratio` 1.10 asks that it is below;
    with harm "fall" 0.90 asks that it is above. Raises TooFewClusters below 10 pairs.
    """
    check_alpha(alpha)
    values = finite(logs, "block pairs")
    if values.size < FEWEST_BLOCK_PAIRS:
        raise TooFewClusters(values.size, FEWEST_BLOCK_PAIRS, "block pairs")
    error = float(values.std(ddof=1)) / math.sqrt(values.size)
    return _by_t(values, error, values.size, margin_ratio, alpha, harm, "block_t")


def quantile_ratio(
    baseline: Sequence[ArrayLike],
    candidate: Sequence[ArrayLike],
    q: float,
    margin_ratio: float,
    alpha: float = 0.05,
    rng: np.random.Generator | None = None,
    harm: Harm = "rise",
) -> Estimate:
    """Ratio of the `q` quantiles: entry i of both is a pair of neighbouring blocks, each with the
    values of its requests, in the same order where both have as many. Block t and hierarchical
    bootstrap, the wider bound holds; where they do not say the same of the margin,
    `detail["methods_disagree"]`.
    """
    if len(baseline) != len(candidate):
        raise ValueError(f"{len(baseline)} blocks of the baseline, {len(candidate)} of the other")
    befores = [finite(block, "requests of a block") for block in baseline]
    afters = [finite(block, "requests of a block") for block in candidate]
    logs = log_ratios(
        [np.quantile(block, q) for block in befores], [np.quantile(block, q) for block in afters]
    )
    by_t = block_t(logs, margin_ratio, alpha, harm)
    means = bootstrap(befores, afters, q, rng or np.random.default_rng(0))
    sign, log_margin = (1 if harm == "rise" else -1), math.log(margin_ratio)
    beyond = int(np.count_nonzero(sign * means >= sign * log_margin))
    p = max(by_t.p, (beyond + 1) / (means.size + 1))
    p_harm = max(by_t.p_harm, (means.size - beyond + 1) / (means.size + 1))
    low, high = (float(edge) for edge in np.exp(np.quantile(means, [alpha, 1 - alpha])))
    disagree = (by_t.p <= alpha) != (p <= alpha) or (by_t.p_harm <= alpha) != (p_harm <= alpha)
    return replace(
        by_t,
        low=min(by_t.low, low),
        high=max(by_t.high, high),
        p=p,
        p_harm=p_harm,
        n=sum(block.size for block in befores),
        method="block_t+bootstrap",
        detail={
            **by_t.detail,
            "bootstrap_low": low,
            "bootstrap_high": high,
            "block_t_low": by_t.low,
            "block_t_high": by_t.high,
            "methods_disagree": disagree,
        },
    )


def bootstrap(
    baseline: Sequence[Floats], candidate: Sequence[Floats], q: float, rng: np.random.Generator
) -> Floats:
    """Mean log quantile ratios of data sets drawn from these: pairs of blocks with replacement,
    then requests within them. Blocks of as many requests hold the same ones in the same order, and
    a request is drawn for both arms at once: prompts that are longer are so in either.
    """
    draws = np.stack(
        [
            _resampled(before, after, q, rng)
            for before, after in zip(baseline, candidate, strict=True)
        ]
    )
    exact = [
        math.log(np.quantile(after, q) / np.quantile(before, q))
        for before, after in zip(baseline, candidate, strict=True)
    ]
    draws += (np.array(exact) - draws.mean(axis=1))[:, None]  # a resample's quantile is a bit off
    pairs = len(baseline)
    chosen = rng.integers(0, pairs, (_RESAMPLES, pairs))
    within = rng.integers(0, _WITHIN, (_RESAMPLES, pairs))
    means: Floats = draws[chosen, within].mean(axis=1)
    return means


def _resampled(before: Floats, after: Floats, q: float, rng: np.random.Generator) -> Floats:
    places = rng.integers(0, before.size, (_WITHIN, before.size))
    others = (
        places if after.size == before.size else rng.integers(0, after.size, (_WITHIN, after.size))
    )
    found: Floats = np.log(_quantiles(after[others], q) / _quantiles(before[places], q))
    return found


def _quantiles(rows: Floats, q: float) -> Floats:
    """Of each row, one of its values."""
    place = min(max(math.ceil(q * rows.shape[1]), 1), rows.shape[1]) - 1
    found: Floats = np.partition(rows, place, axis=1)[:, place]
    return found


def tost(
    logs: ArrayLike,
    margin: float,
    clusters: Sequence[Hashable] | None = None,
    alpha: float = 0.05,
) -> Estimate:
    """Neither more nor less than `margin` (0.10: between 1 / 1.10 and 1.10), by two one-sided tests
    of `mean_ratio`. `p` is the larger of both. Raises TooFewClusters below 20.
    """
    if margin <= 0:
        raise ValueError(f"margin is {margin}; a share more or less is above 0, 0.10 for 10 %")
    above = mean_ratio(logs, 1 + margin, clusters, alpha, "rise")
    below = mean_ratio(logs, 1 / (1 + margin), clusters, alpha, "fall")
    return replace(
        above,
        low=below.low,
        p=max(above.p, below.p),
        p_harm=min(1.0, 2 * min(above.p_harm, below.p_harm)),
        method="tost",
        detail={**above.detail, "p_more": above.p, "p_less": below.p},
    )


def mean_ratio(
    logs: ArrayLike,
    margin_ratio: float,
    clusters: Sequence[Hashable] | None = None,
    alpha: float = 0.05,
    harm: Harm = "rise",
) -> Estimate:
    """Geometric mean ratio of items, by whole clusters: t corrected for skewness, with the freedom
    of the clusters that changed. Where few changed, the data do not tell by how much others would:
    by twice, or as much as the one that changed most (`detail["change_assumed"]`).
    Raises TooFewClusters below 20.
    """
    check_alpha(alpha)
    if margin_ratio <= 0:
        raise ValueError(f"margin is a ratio of {margin_ratio}; 1.10 is ten per cent more")
    sign = 1.0 if harm == "rise" else -1.0  # from here on more is worse
    values = sign * finite(logs, "log ratios")
    sums, sizes = cluster_sums(values, clusters)
    if sizes.size < FEWEST_CLUSTERS:
        raise TooFewClusters(sizes.size, FEWEST_CLUSTERS)
    mean, count = float(values.mean()), sizes.size
    residuals = (sums - sizes * mean)[None, :]
    error, skewness = (float(part[0]) for part in moments(residuals, sizes))
    moved = int(np.count_nonzero(sums))
    free = max(min(moved, worth(sizes), 1 + float(freedom(residuals)[0])), 1.01)
    reach = float(special.stdtrit(free - 1, 1 - alpha))
    distance = sign * math.log(margin_ratio) - mean
    high = mean + error * reach_of(reach, -skewness, count)
    low = mean - error * reach_of(reach, skewness, count)
    if error:
        p = float(tail(distance / error, -skewness, count, free))
        p_harm = float(tail(-distance / error, skewness, count, free))
    else:
        p, p_harm = float(distance <= 0), float(distance >= 0)
    few = moved < FEWEST_MOVED
    if few:
        most, unseen_p = _assumed(sums / sizes, worth(sizes), sign * math.log(margin_ratio), alpha)
        high, p = max(high, most), max(p, unseen_p)
    ends = np.exp(np.clip(sorted((sign * low, sign * high)), -_FAR, _FAR))
    return Estimate(
        estimate=math.exp(sign * mean),
        low=float(ends[0]),
        high=float(ends[1]),
        p=p,
        p_harm=p_harm,
        n=values.size,
        clusters=count,
        method="cluster_t",
        detail={
            "log_mean": sign * mean,
            "standard_error": error,
            "moved": moved,
            "change_assumed": few,
        },
    )


def _assumed(means: Floats, units: float, log_margin: float, alpha: float) -> tuple[float, float]:
    """The most that clusters rise on average if as many change as chance may have hidden, each by
    twice or by what the worst one did; and p of a rise of at least the margin.
    """
    worse = float(np.count_nonzero(means > 0)) * units / means.size
    size = max(float(means.max()), math.log(2))
    most = size * float(special.betaincinv(worse + 1, max(units - worse, 1e-9), 1 - alpha))
    if log_margin <= 0:  # a gain is asked for, and none is assumed
        return most, 0.0
    return most, float(rate_p(worse, units, min(log_margin / size, 1 - 1e-12)))


def _by_t(
    values: Floats,
    error: float,
    units: float,
    margin_ratio: float,
    alpha: float,
    harm: Harm,
    method: str,
) -> Estimate:
    if margin_ratio <= 0:
        raise ValueError(f"margin is a ratio of {margin_ratio}; 1.10 is ten per cent more")
    mean, free = float(values.mean()), max(units, 1.01) - 1
    reach = float(special.stdtrit(free, 1 - alpha)) * error
    distance = math.log(margin_ratio) - mean
    if harm == "fall":
        distance = -distance
    if error:
        p = float(special.stdtr(free, -distance / error))
        p_harm = float(special.stdtr(free, distance / error))
    else:
        p, p_harm = float(distance <= 0), float(distance >= 0)
    return Estimate(
        estimate=math.exp(mean),
        low=math.exp(mean - reach),
        high=math.exp(mean + reach),
        p=p,
        p_harm=p_harm,
        n=values.size,
        clusters=round(units),
        method=method,
        detail={"log_mean": mean, "standard_error": error, "spread": error * math.sqrt(units)},
    )
