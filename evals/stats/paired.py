"""Differences of pairs: which test fits, and those for pairs that come in clusters.

A difference is the candidate's score less the baseline's of the same item, both in [0, 1]. Errors
are those of whole clusters (Miller 2024, arXiv 2411.00640). Sparse losses are skewed, and the plain
t test then passes far too often; what is done about it, and why: docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from evals.stats import tango as score
from evals.stats.betting import betting
from evals.stats.estimate import (
    FEWEST_CLUSTERS,
    FEWEST_MOVED,
    Estimate,
    Floats,
    TooFewClusters,
    assumed_effect,
    check_alpha,
    cluster_sums,
    finite,
    freedom,
    moments,
    worth,
)
from evals.stats.tango import tango

__all__ = [
    "FEWEST_CLUSTERS",
    "FEWEST_MOVED",
    "TooFewClusters",
    "betting",
    "cluster_t",
    "cluster_tango",
    "mean_diff",
    "tango",
]

FEWEST_SCORES = 100
FEWEST_LOSING = 6  # clusters with a loss, of fewer than so many:
MANY_CLUSTERS = 100


def mean_diff(
    diffs: ArrayLike,
    margin: float,
    clusters: Sequence[Hashable] | None = None,
    alpha: float = 0.05,
) -> Estimate:
    """The test that fits: right or wrong (every difference -1, 0 or 1) or scores between, in
    clusters or each for itself. Raises TooFewClusters below 20 of them.
    """
    values = finite(diffs, "differences")
    alone = clusters is None or len(set(clusters)) == values.size
    binary = bool(np.isin(values, (-1.0, 0.0, 1.0)).all())
    if binary and alone:
        lost, gained = int((values < 0).sum()), int((values > 0).sum())
        return tango(lost, gained, values.size, margin, alpha)
    if binary:
        return cluster_tango(values, clusters, margin, alpha)
    if alone and values.size < FEWEST_SCORES:
        return betting(values, margin, alpha)
    return cluster_t(values, clusters, margin, alpha)


# ---- scores --------------------------------------------------------------------------------------


def cluster_t(
    diffs: ArrayLike, clusters: Sequence[Hashable] | None, margin: float, alpha: float = 0.05
) -> Estimate:
    """Mean difference by whole clusters: t, and t corrected for skewness; the wider bound holds.

    `clusters` names each difference's, or is None when each is its own. A side bets instead where
    too few clusters lose (or, for harm, gain) to know how bad losses are: `detail["bets"]`.
    Raises TooFewClusters below 20 clusters, and where fewer than 10 differ by values that no bet is
    bounded by.
    """
    check_alpha(alpha)
    values = finite(diffs, "differences")
    sums, sizes = cluster_sums(values, clusters)
    if sizes.size < FEWEST_CLUSTERS:
        raise TooFewClusters(sizes.size, FEWEST_CLUSTERS)
    moved = int(np.count_nonzero(sums))
    bounded = float(np.abs(values).max()) <= 1
    if moved < FEWEST_MOVED and not bounded:  # logarithms of ratios
        raise TooFewClusters(moved, FEWEST_MOVED, "clusters that differ")
    sides = {"pass": bounded and few_lose(sums), "harm": bounded and few_lose(-sums)}
    mean = float(values.mean())
    residuals = (sums - sizes * mean)[None, :]
    error, skewness = (float(part[0]) for part in moments(residuals, sizes))
    free = min(moved, worth(sizes), 1 + float(freedom(residuals)[0]))
    reach = float(special.stdtrit(max(free, 1.01) - 1, 1 - alpha))
    bet = betting(values, margin, alpha, clusters) if any(sides.values()) else None
    by_t = Estimate(
        estimate=mean,
        low=mean - error * reach_of(reach, skewness, sizes.size),
        high=mean + error * reach_of(reach, -skewness, sizes.size),
        p=_tail_of(mean - margin, error, skewness, sizes.size, free),
        p_harm=_tail_of(margin - mean, error, -skewness, sizes.size, free),
        n=values.size,
        clusters=sizes.size,
        method="cluster_t" if not all(sides.values()) else "betting",
        detail={
            "standard_error": error,
            "skewness": skewness,
            "moved": moved,
            "bets": [side for side, few in sides.items() if few],
        },
    )
    if bet and sides["pass"]:
        by_t = replace(by_t, low=bet.low, p=bet.p)
    return replace(by_t, high=bet.high, p_harm=bet.p_harm) if bet and sides["harm"] else by_t


def few_lose(sums: Floats) -> bool:
    """Whether too few clusters have a loss to tell what losses are like: t believes too soon."""
    if np.count_nonzero(sums) < FEWEST_MOVED:
        return True
    return sums.size < MANY_CLUSTERS and int(np.count_nonzero(sums < 0)) < FEWEST_LOSING


def _tail_of(distance: float, error: float, skewness: float, count: int, free: float) -> float:
    if error == 0:
        return float(distance <= 0)
    return float(tail(distance / error, skewness, count, free))


def tail(t: ArrayLike, skewness: ArrayLike, count: int, free: ArrayLike) -> Floats:
    """p of the t statistic, or of Hall's transformation of it (1992, JRSS-B 54:221), whichever is
    larger; `free` clusters carry the variance.
    """
    plain = np.asarray(t, dtype=np.float64)
    gamma, scaled = np.asarray(skewness, dtype=np.float64), plain / np.sqrt(count)
    cubic = scaled + gamma * scaled**2 / 3 + gamma**2 * scaled**3 / 27 + gamma / (6 * count)
    smaller = np.minimum(plain, np.sqrt(count) * cubic)
    p: Floats = special.stdtr(np.maximum(free, 1.01) - 1, -smaller)
    return p


def reach_of(t: float, skewness: float, count: int) -> float:
    """How many standard errors below the mean `tail` refuses: the inverse of both statistics."""
    if abs(skewness) < 1e-9:
        return t
    inner = 1 + skewness * (t / np.sqrt(count) - skewness / (6 * count))
    return float(max(t, np.sqrt(count) * 3 * (np.cbrt(inner) - 1) / skewness))


# ---- right or wrong, in clusters -----------------------------------------------------------------


def cluster_tango(
    diffs: ArrayLike, clusters: Sequence[Hashable] | None, margin: float, alpha: float = 0.05
) -> Estimate:
    """Tango's statistic on as many pairs as the clusters are worth (Rao and Scott 1992, Biometrics
    48:577): counts are divided by how much more the mean varies than with pairs on their own.
    Raises TooFewClusters below 20 clusters.
    """
    check_alpha(alpha)
    values = finite(diffs, "differences")
    sums, sizes = cluster_sums(values, clusters)
    if sizes.size < FEWEST_CLUSTERS:
        raise TooFewClusters(sizes.size, FEWEST_CLUSTERS)
    flips, _ = cluster_sums(np.abs(values), clusters)
    moved = int(np.count_nonzero(flips))
    lost, gained = int((values < 0).sum()), int((values > 0).sum())
    effect = float(design_effect(sums[None, :], sizes, np.array([lost + gained]), moved)[0])
    effective = max(int(values.size / effect), 1)
    part = effective / values.size
    residuals = (sums - sizes * values.mean())[None, :]
    free = min(moved, worth(sizes), 1 + float(freedom(residuals)[0]))
    told = moved >= FEWEST_MOVED
    low, p = _scaled(lost * part, gained * part, effective, free, told, margin, alpha)
    high, p_harm = _scaled(gained * part, lost * part, effective, free, told, -margin, alpha)
    return Estimate(
        estimate=float(values.mean()),
        low=low,
        high=-high,
        p=p,
        p_harm=p_harm,
        n=values.size,
        clusters=sizes.size,
        method="cluster_tango",
        detail={
            "lost": lost,
            "gained": gained,
            "design_effect": effect,
            "effective_pairs": effective,
            "moved": moved,
            "correlation_assumed": not told,
        },
    )


def design_effect(sums: Floats, sizes: Floats, flips: Floats, moved: ArrayLike) -> Floats:
    """How many times more the mean varies than with as many pairs on their own; a row for each
    data set. At least 1; where too few clusters moved to tell, at least what is assumed.
    """
    n = float(sizes.sum())
    mean = sums.sum(axis=1) / n
    error, _ = moments(sums - np.outer(mean, sizes), sizes)
    alone = (flips - n * mean**2) / n**2
    found = np.where(alone > 0, error**2 / np.where(alone > 0, alone, 1.0), 1.0)
    least = np.where(np.asarray(moved) < FEWEST_MOVED, assumed_effect(sizes), 1.0)
    return np.maximum(found, least)


def scaled_p(
    lost: ArrayLike, gained: ArrayLike, n: ArrayLike, free: ArrayLike, margin: float
) -> Floats:
    """p of counts that are worth `n` pairs, by t of the clusters that carry the variance."""
    z = score.statistic(lost, gained, n, margin)
    p: Floats = special.stdtr(np.maximum(free, 1.01) - 1, -z)
    return p


def _scaled(
    lost: float, gained: float, n: int, free: float, told: bool, margin: float, alpha: float
) -> tuple[float, float]:
    """Lower bound and p: by t, or exactly where too few clusters moved to tell a variance."""
    if not told:
        p = score.p_value(lost, gained, n, margin)
        low = score.bound(lost, gained, n, alpha)
        return (max(low, float(np.nextafter(margin, 1))) if p <= alpha else min(low, margin)), p
    reach = float(special.stdtrit(max(free, 1.01) - 1, 1 - alpha))

    def beyond(diff: float) -> float:
        return float(score.statistic(lost, gained, n, diff)) - reach

    mean, least = (gained - lost) / n, -1 + 1e-9
    low = (
        float(optimize.brentq(beyond, least, mean)) if mean > least and beyond(least) > 0 else -1.0
    )
    return low, float(scaled_p(lost, gained, n, free, margin))
