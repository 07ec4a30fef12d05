"""Wealth from bets against a hypothesis about a bounded mean: for any number of pairs, any law.

A difference d in [-1, 1] whose mean is at most m multiplies the wealth by 1 + bet (d - m): no
betting makes that grow in expectation, so wealth above 1/alpha happens with probability alpha at
most, at whichever time one looks (Ville). Source: Waudby-Smith and Ramdas 2024, JRSS-B 86:1.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

from evals.stats.estimate import Estimate, Floats, check_alpha, cluster_sums, finite

BETS = 10
_LEAST_BET = 0.05


def bets(margin: float) -> Floats:
    """Constant bets on a mean above `margin`, as many small as large; wealth stays positive."""
    return np.geomspace(_LEAST_BET, 0.98 / (1 + margin), BETS)


def log_mean(log_wealths: Floats) -> float:
    """Of the mixture that starts with the same stake on every bet."""
    top = float(log_wealths.max())
    return top + float(np.log(np.exp(log_wealths - top).mean()))


def log_wealth(diffs: Floats, margin: float, weights: Floats | float = 1.0) -> float:
    """Logarithm of the mixture's wealth after all of `diffs`: the evidence for a mean above.

    `weights`, at most 1, are what each difference stands for beside the heaviest.
    """
    stakes = weights * (diffs - margin)
    return log_mean(np.log1p(np.outer(bets(margin), stakes)).sum(axis=1))


def betting(
    diffs: ArrayLike,
    margin: float,
    alpha: float = 0.05,
    clusters: Sequence[Hashable] | None = None,
) -> Estimate:
    """Mean of differences in [-1, 1], without any assumption on their law: for few of them.

    Wide where the law would allow less. The order does not matter; a cluster is one bet.
    """
    check_alpha(alpha)
    values = finite(diffs, "differences")
    if np.abs(values).max() > 1:
        raise ValueError("differences beyond -1 .. 1: bets need scores between 0 and 1")
    sums, sizes = cluster_sums(values, clusters)
    means, weights = sums / sizes, sizes / sizes.max()
    return Estimate(
        estimate=float(values.mean()),
        low=_bound(means, weights, alpha),
        high=-_bound(-means, weights, alpha),
        p=_p(log_wealth(means, margin, weights)),
        p_harm=_p(log_wealth(-means, -margin, weights)),
        n=values.size,
        clusters=None if clusters is None else sizes.size,
        method="betting",
    )


def _p(log_e: float) -> float:
    return float(min(1.0, np.exp(-log_e)))


def _bound(means: Floats, weights: Floats, alpha: float) -> float:
    """The largest mean that the bets refuse, from below."""
    target = -np.log(alpha)
    low, high = -1 + 1e-9, float(np.average(means, weights=weights))
    if high <= low or log_wealth(means, low, weights) < target:
        return -1.0
    found = optimize.brentq(lambda mean: log_wealth(means, mean, weights) - target, low, high)
    return float(found)
