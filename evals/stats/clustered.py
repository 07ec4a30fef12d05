"""Right or wrong in both arms, of pairs that come in clusters: as many pairs as they are worth.

Counts are divided by how much more their mean varies than with pairs on their own. Functions of
arrays take a row, or an entry, for each data set.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from evals.stats import tango as score
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

# Lost, gained, of so many pairs, and the margin -> p.
Exact = Callable[[float, float, int, float], float]


def cluster_tango(
    diffs: ArrayLike, clusters: Sequence[Hashable] | None, margin: float, alpha: float = 0.05
) -> Estimate:
    """Tango's statistic on as many pairs as the clusters are worth (Rao and Scott 1992, Biometrics
    48:577): counts are divided by how much more the mean varies than with pairs on their own.
    Raises TooFewClusters below 20 clusters.
    """
    check_alpha(alpha)
    values = finite(diffs, "differences")
    losses, sizes = cluster_sums((values < 0).astype(np.float64), clusters)
    gains, _ = cluster_sums((values > 0).astype(np.float64), clusters)
    if sizes.size < FEWEST_CLUSTERS:
        raise TooFewClusters(sizes.size, FEWEST_CLUSTERS)
    lost, gained = int(losses.sum()), int(gains.sum())
    known = cluster_worth(losses[None, :], gains[None, :], sizes)
    effect, effective, moved = float(known.effect[0]), int(known.pairs[0]), int(known.moved[0])
    part = effective / values.size
    told, free = moved >= FEWEST_MOVED, float(known.free[0])
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


@dataclass(frozen=True, slots=True)
class Worth:
    """What pairs in clusters are worth; an entry for each data set. `pairs` on their own would say
    as much, `effect` times fewer; `free` clusters carry the variance, `moved` have a flip.
    """

    pairs: Floats
    effect: Floats
    free: Floats
    moved: Floats


def cluster_worth(lost: Floats, gained: Floats, sizes: Floats) -> Worth:
    """Of losses and gains in each cluster, a row for each data set."""
    sums, n = gained - lost, float(sizes.sum())
    moved = np.count_nonzero(lost + gained, axis=1)
    effect = design_effect(sums, sizes, (lost + gained).sum(axis=1), moved)
    residuals = sums - np.outer(sums.sum(axis=1) / n, sizes)
    free = np.minimum(np.minimum(moved, worth(sizes)), 1 + freedom(residuals))
    return Worth(np.maximum(np.floor(n / effect), 1), effect, free, moved.astype(np.float64))


def cluster_p(
    lost: Floats, gained: Floats, sizes: Floats, margin: float, exact: Exact = score.p_value
) -> Floats:
    """p of `cluster_tango`, of losses and gains in each cluster, a row for each data set; `exact`
    as for `worth_p`.
    """
    known = cluster_worth(lost, gained, sizes)
    part = known.pairs / sizes.sum()
    return worth_p(
        lost.sum(axis=1) * part,
        gained.sum(axis=1) * part,
        known.pairs,
        known.free,
        known.moved >= FEWEST_MOVED,
        margin,
        exact,
    )


def worth_p(
    lost: Floats,
    gained: Floats,
    n: Floats,
    free: Floats,
    told: NDArray[np.bool_],
    margin: float,
    exact: Exact = score.p_value,
) -> Floats:
    """p of counts that are worth `n` pairs: by t of the clusters that carry the variance, or
    `exact` where too few moved to have `told` it. An entry for each data set.
    """
    p = scaled_p(lost, gained, n, free, margin)
    for row in np.flatnonzero(~told):
        p[row] = exact(float(lost[row]), float(gained[row]), int(n[row]), margin)
    return p


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
    row = np.array([[lost], [gained], [n], [free]], dtype=np.float64)
    p = float(worth_p(row[0], row[1], row[2], row[3], np.array([told]), margin)[0])
    if not told:
        low = score.bound(lost, gained, n, alpha)
        return (max(low, float(np.nextafter(margin, 1))) if p <= alpha else min(low, margin)), p
    reach = float(special.stdtrit(max(free, 1.01) - 1, 1 - alpha))

    def beyond(diff: float) -> float:
        return float(score.statistic(lost, gained, n, diff)) - reach

    mean, least = (gained - lost) / n, -1 + 1e-9
    low = (
        float(optimize.brentq(beyond, least, mean)) if mean > least and beyond(least) > 0 else -1.0
    )
    return low, p
