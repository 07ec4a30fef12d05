"""Differences of pairs: which test fits, and those for pairs that come in clusters.

A difference is the candidate's score less the baseline's of the same item, both in [0, 1]. Errors
are those of whole clusters (Miller 2024, arXiv 2411.00640). Sparse losses are skewed, and the plain
t test then passes far too often; what is done about it, and why: docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from evals.stats.betting import betting
from evals.stats.clustered import cluster_tango
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
    fit = cluster_fit(sums[None, :], sizes)
    error, skewness, free = float(fit.error[0]), float(fit.skewness[0]), float(fit.free[0])
    reach = float(special.stdtrit(max(free, 1.01) - 1, 1 - alpha))
    bet = betting(values, margin, alpha, clusters) if any(sides.values()) else None
    by_t = Estimate(
        estimate=mean,
        low=mean - error * reach_of(reach, skewness, sizes.size),
        high=mean + error * reach_of(reach, -skewness, sizes.size),
        p=float(fit.p(margin)[0]),
        p_harm=float(fit.mirrored().p(-margin)[0]),
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


@dataclass(frozen=True, slots=True)
class Fit:
    """Means of differences over whole clusters with what t needs; an entry for each data set."""

    mean: Floats
    error: Floats
    skewness: Floats
    free: Floats
    count: int

    def p(self, margin: float) -> Floats:
        """Of a mean of at most `margin`. Where nothing varies, the mean is what it is."""
        distance = self.mean - margin
        flat = self.error == 0
        t = distance / np.where(flat, 1.0, self.error)
        return np.where(flat, distance <= 0, tail(t, self.skewness, self.count, self.free))

    def mirrored(self) -> Fit:
        """Of the same differences the other way round."""
        return replace(self, mean=-self.mean, skewness=-self.skewness)


def cluster_fit(sums: Floats, sizes: Floats) -> Fit:
    """Of the sums of each cluster's differences, a row for each data set."""
    mean = sums.sum(axis=1) / sizes.sum()
    residuals = sums - np.outer(mean, sizes)
    error, skewness = moments(residuals, sizes)
    moved = np.count_nonzero(sums, axis=1)
    free = np.minimum(np.minimum(moved, worth(sizes)), 1 + freedom(residuals))
    return Fit(mean, error, skewness, free, sizes.size)


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
