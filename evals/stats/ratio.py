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
    Estimate,
    Floats,
    TooFewClusters,
    check_alpha,
    cluster_sums,
    finite,
    moments,
    worth,
)

Harm = Literal["rise", "fall"]  # what of the metric is bad: latencies rise, throughput falls
FEWEST_BLOCK_PAIRS = 10
_RESAMPLES = 4000
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
    values of its requests. Block t and hierarchical bootstrap, the wider bound holds; where they
    do not say the same of the margin, `detail["methods_disagree"]`.
    """
    if len(baseline) != len(candidate):
        raise ValueError(f"{len(baseline)} blocks of the baseline, {len(candidate)} of the other")
    befores = [np.sort(finite(block, "requests of a block")) for block in baseline]
    afters = [np.sort(finite(block, "requests of a block")) for block in candidate]
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
    then requests within them. Blocks are sorted. The quantile of a resample is one of its order
    statistics, so its place is drawn at once.
    """
    draws = np.stack(
        [
            np.log(_resampled(after, q, rng)) - np.log(_resampled(before, q, rng))
            for before, after in zip(baseline, candidate, strict=True)
        ]
    )
    exact = [
        math.log(np.quantile(after, q) / np.quantile(before, q))
        for before, after in zip(baseline, candidate, strict=True)
    ]
    draws += (np.array(exact) - draws.mean(axis=1))[:, None]  # an order statistic is a little off
    pairs = len(baseline)
    chosen = rng.integers(0, pairs, (_RESAMPLES, pairs))
    within = rng.integers(0, _WITHIN, (_RESAMPLES, pairs))
    means: Floats = draws[chosen, within].mean(axis=1)
    return means


def _resampled(block: Floats, q: float, rng: np.random.Generator) -> Floats:
    place = min(max(math.ceil(q * block.size), 1), block.size)
    share = rng.beta(place, block.size - place + 1, _WITHIN)
    found: Floats = block[np.minimum((share * block.size).astype(np.int64), block.size - 1)]
    return found


def tost(
    logs: ArrayLike,
    margin: float,
    clusters: Sequence[Hashable] | None = None,
    alpha: float = 0.05,
) -> Estimate:
    """Neither more nor less than `margin` (0.10: between 1 / 1.10 and 1.10), by two one-sided t
    tests over whole clusters. `p` is the larger of both. Raises TooFewClusters below 20.
    """
    check_alpha(alpha)
    if margin <= 0:
        raise ValueError(f"margin is {margin}; a share more or less is above 0, 0.10 for 10 %")
    values = finite(logs, "log ratios")
    sums, sizes = cluster_sums(values, clusters)
    if sizes.size < FEWEST_CLUSTERS:
        raise TooFewClusters(sizes.size, FEWEST_CLUSTERS)
    error = float(moments((sums - sizes * values.mean())[None, :], sizes)[0][0])
    units = worth(sizes)
    above = _by_t(values, error, units, 1 + margin, alpha, "rise", "tost")
    below = _by_t(values, error, units, 1 / (1 + margin), alpha, "fall", "tost")
    return replace(
        above,
        clusters=sizes.size,
        p=max(above.p, below.p),
        p_harm=min(1.0, 2 * min(above.p_harm, below.p_harm)),
        detail={**above.detail, "p_more": above.p, "p_less": below.p},
    )


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
