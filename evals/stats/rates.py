"""Rates of rare events, exactly: bounds on a rate, and how many requests prove one.

Sources: Clopper and Pearson 1934, Biometrika 26:404; MLPerf LoadGen, `early_stopping`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

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
    moments,
    worth,
)


def clopper_pearson(events: int, n: int, maximum: float, alpha: float = 0.05) -> Estimate:
    """The rate of `events` in `n`, and what speaks against a rate of at least `maximum`."""
    if n < 1 or not 0 <= events <= n:
        raise ValueError(f"{events} events of {n}: between none and all of at least one")
    return _exact(events, n, maximum, alpha)


def cluster_rate(
    values: ArrayLike, clusters: Sequence[Hashable], maximum: float, alpha: float = 0.05
) -> Estimate:
    """The mean of events (0 or 1; the mean of repeats between) that come in clusters: exactly, of
    as many trials as the clusters are worth (Korn and Graubard 1998, Survey Methodology 24:193).
    Raises TooFewClusters below 20 clusters of more than one.
    """
    found = finite(values, "events")
    if found.min() < 0 or found.max() > 1:
        raise ValueError("events beyond 0 .. 1: one happened, or did not, or in some repeats")
    sums, sizes = cluster_sums(found, clusters)
    n, share = found.size, float(found.mean())
    if sizes.size == n:
        return _exact(float(found.sum()), n, maximum, alpha)
    if sizes.size < FEWEST_CLUSTERS:
        raise TooFewClusters(sizes.size, FEWEST_CLUSTERS)
    moved = int(np.count_nonzero(sums))
    effect = float(rate_effect(sums[None, :], sizes)[0])
    inner = _exact(share * n / effect, n / effect, maximum, alpha)
    detail = {**inner.detail, "events": float(found.sum()), "design_effect": effect, "moved": moved}
    return replace(
        inner,
        estimate=share,
        n=n,
        clusters=sizes.size,
        method="cluster_clopper_pearson",
        detail={**detail, "correlation_assumed": moved < FEWEST_MOVED},
    )


def cluster_rate_p(sums: Floats, sizes: Floats, maximum: float) -> Floats:
    """p of `cluster_rate`, of the events in each cluster, a row for each data set."""
    effect = rate_effect(sums, sizes)
    return rate_p(sums.sum(axis=1) / effect, sizes.sum() / effect, maximum)


def rate_effect(sums: Floats, sizes: Floats) -> Floats:
    """How many times more a rate varies than without clusters, the few degrees of freedom
    included; a row for each data set. Assumed, where too few clusters have an event to tell.
    """
    clusters_with = np.count_nonzero(sums, axis=1)
    n = float(sizes.sum())
    share = sums.sum(axis=1) / n
    error, _ = moments(sums - np.outer(share, sizes), sizes)
    alone = share * (1 - share) / n
    effect = np.maximum(np.where(alone > 0, error**2 / np.where(alone > 0, alone, 1.0), 1.0), 1.0)
    free = np.maximum(np.minimum(clusters_with, worth(sizes)), 2.0) - 1
    wider = (special.stdtrit(free, 0.95) / special.stdtrit(n - 1, 0.95)) ** 2
    told: Floats = np.where(
        clusters_with < FEWEST_MOVED, np.maximum(effect, assumed_effect(sizes)), effect * wider
    )
    return told


def rate_p(events: ArrayLike, n: ArrayLike, maximum: float) -> Floats:
    """Probability of at most `events` in `n` at the rate `maximum`; both may be fractions."""
    k, of = np.asarray(events, dtype=np.float64), np.asarray(n, dtype=np.float64)
    p: Floats = np.where(k < of, special.betainc(np.maximum(of - k, 1e-12), k + 1, 1 - maximum), 1)
    return p


def _exact(events: float, n: float, maximum: float, alpha: float) -> Estimate:
    check_alpha(alpha)
    if not 0 < maximum < 1:
        raise ValueError(f"maximum is {maximum}; a rate to stay below lies between 0 and 1")
    low = float(special.betaincinv(events, n - events + 1, alpha)) if events else 0.0
    high = float(special.betaincinv(events + 1, n - events, 1 - alpha)) if events < n else 1.0
    detail: dict[str, float] = {"events": events}
    if not events:
        detail["rule_of_three"] = rule_of_three(n, alpha)
    return Estimate(
        estimate=events / n,
        low=low,
        high=high,
        p=float(rate_p(events, n, maximum)),
        p_harm=float(special.betainc(events, n - events + 1, maximum)) if events else 1.0,
        n=round(n),
        clusters=None,
        method="clopper_pearson",
        detail=detail,
    )


def rule_of_three(n: float, alpha: float = 0.05) -> float:
    """The largest rate that none in `n` leaves standing: about 3 / n at alpha 0.05."""
    return float(1 - alpha ** (1 / n))


def trials_needed(maximum: float, alpha: float = 0.05, events: int = 0) -> int:
    """The fewest trials with which `events` of them still prove a rate below `maximum`. Of late
    requests, 0.01 proves a p99: 299 without one late at 95 % confidence, 459 at 99 %.
    """
    check_alpha(alpha)
    low, high = events, max(2 * events, 1)
    while special.bdtr(events, high, maximum) > alpha:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if special.bdtr(events, middle, maximum) <= alpha else (middle, high)
        )
    return high
