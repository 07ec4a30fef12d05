"""Differences of pairs: which test fits, and the one for pairs that come in clusters.

A difference is the candidate's score less the baseline's of the same item, both in [0, 1].
Sources: Miller 2024 (arXiv 2411.00640) for clustered errors.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from evals.stats.estimate import Estimate, Floats, TooFewClusters, check_alpha, finite
from evals.stats.tango import tango

__all__ = ["FEWEST_CLUSTERS", "TooFewClusters", "cluster_sums", "cluster_t", "t_tail", "tango"]
FEWEST_CLUSTERS = 20


def cluster_t(
    diffs: ArrayLike, clusters: Sequence[Hashable] | None, margin: float, alpha: float = 0.05
) -> Estimate:
    """Mean difference, with errors of whole clusters and t(G - 1). `clusters` names each
    difference's, or is None when each is its own. Raises TooFewClusters below 20.
    """
    check_alpha(alpha)
    values = finite(diffs, "differences")
    sums, sizes = cluster_sums(values, clusters)
    count = sizes.size
    if count < FEWEST_CLUSTERS:
        raise TooFewClusters(count, FEWEST_CLUSTERS)
    mean = float(values.mean())
    residuals = sums - sizes * mean
    error = float(np.sqrt(count / (count - 1) * (residuals @ residuals))) / values.size
    reach = float(special.stdtrit(count - 1, 1 - alpha)) * error
    p = t_tail(mean - margin, error, count - 1)
    return Estimate(
        estimate=mean,
        low=mean - reach,
        high=mean + reach,
        p=p,
        p_harm=1 - p,
        n=values.size,
        clusters=count,
        method="cluster_t",
        detail={"standard_error": error},
    )


def cluster_sums(values: Floats, clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Sum and number of the values of each cluster, in order of first appearance."""
    if clusters is None:
        return values, np.ones(values.size)
    if len(clusters) != values.size:
        raise ValueError(f"{values.size} differences and {len(clusters)} clusters: one for each")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(name, len(numbers)) for name in clusters])
    return np.bincount(index, values).astype(np.float64), np.bincount(index).astype(np.float64)


def t_tail(distance: float, error: float, freedom: int) -> float:
    """P(T >= distance / error); all or nothing where nothing varies."""
    if error == 0:
        return 0.0 if distance > 0 else 1.0
    return float(special.stdtr(freedom, -distance / error))
