"""Whether a difference grows along something: the turns of a conversation, the time since a start.

A straight line through differences of pairs, its slope's error by whole clusters. Knows no names.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from evals.stats.estimate import (
    Estimate,
    TooFewClusters,
    check_alpha,
    cluster_sums,
    finite,
    freedom,
)
from evals.stats.paired import reach_of, tail

FEWEST = 10  # clusters that say anything of a slope


def growth(
    values: ArrayLike,
    along: ArrayLike,
    clusters: Sequence[Hashable],
    alpha: float = 0.05,
) -> Estimate:
    """By how much `values`, of which more is worse, rise from the least of `along` to the most; `p`
    is of "they rise" (small: they fall), `p_harm` of "they do not" (small: they do).

    t over clusters, corrected for skewness, with the freedom of those that carry the variance.
    Raises TooFewClusters where fewer than ten do, or where nothing lies along anything.
    """
    check_alpha(alpha)
    worse, place = finite(values, "differences"), finite(along, "places")
    reach = float(place.max() - place.min())
    if not reach:
        raise TooFewClusters(1, 2, "places")
    x = (place - place.mean()) / reach
    square = float(x @ x)
    slope = float(x @ worse) / square
    scores, _ = cluster_sums(x * (worse - worse.mean() - slope * x), clusters)
    told = int(np.count_nonzero(np.abs(scores) > 1e-12))
    if told < FEWEST:
        raise TooFewClusters(told, FEWEST)
    count = scores.size
    error = float(np.sqrt((scores @ scores) * count / (count - 1))) / square
    skewness = float((scores**3).mean() / (scores**2).mean() ** 1.5)
    free = max(min(told, 1 + float(freedom(scores[None, :])[0])) - 1, 1.01)  # mean and slope
    t = float(special.stdtrit(free - 1, 1 - alpha))
    return Estimate(
        estimate=slope,
        low=slope - error * reach_of(t, skewness, count),
        high=slope + error * reach_of(t, -skewness, count),
        p=float(tail(-slope / error, -skewness, count, free)),
        p_harm=float(tail(slope / error, skewness, count, free)),
        n=worse.size,
        clusters=count,
        method="trend_t",
        detail={"standard_error": error, "skewness": skewness},
    )
