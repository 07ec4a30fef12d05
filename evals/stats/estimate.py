"""The answer of every test here: an estimate, its bounds, what speaks against each hypothesis."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FEWEST_CLUSTERS = 20
FEWEST_MOVED = 10  # clusters with an event, below which the data do not tell how events cluster
ASSUMED_CORRELATION = 0.5  # of events within a cluster, where the data do not tell


@dataclass(frozen=True, slots=True)
class Estimate:
    """`low` and `high` are one-sided at alpha each: together the 1 - 2 alpha interval.

    Differences are candidate less baseline and harm is a fall; ratios are candidate over baseline
    and harm is a rise; rates are of events nobody wants. `p` is of the hypothesis that harm is at
    least the margin (small: pass), `p_harm` of the hypothesis that it is at most the margin
    (small: fail). `p <= alpha` says the same as the bound on the margin's side clearing it.
    """

    estimate: float
    low: float
    high: float
    p: float
    p_harm: float
    n: int
    clusters: int | None
    method: str
    detail: Mapping[str, Any] = field(default_factory=dict)


class TooFewClusters(ValueError):
    """Fewer independent units than the test can work with: gather more conversations."""

    def __init__(self, found: int, needed: int, what: str = "clusters") -> None:
        super().__init__(
            f"{found} {what}, and at least {needed} are needed; add independent ones "
            "(more rows of the same ones do not help)"
        )
        self.found = found
        self.needed = needed


def check_alpha(alpha: float) -> None:
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha is {alpha}; a one-sided error rate lies between 0 and 0.5")


def finite(values: object, what: str) -> Floats:
    """As a flat array of floats. Raises ValueError for what is empty or not finite."""
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if not array.size:
        raise ValueError(f"no {what}: nothing can be estimated from nothing")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} hold {np.count_nonzero(~np.isfinite(array))} that are not finite")
    return array


def cluster_sums(values: Floats, clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Sum and number of the values of each cluster, in order of first appearance."""
    if clusters is None:
        return values, np.ones(values.size)
    if len(clusters) != values.size:
        raise ValueError(f"{values.size} values and {len(clusters)} clusters: one for each")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(name, len(numbers)) for name in clusters])
    sizes = np.bincount(index).astype(np.float64)
    return np.bincount(index, values).astype(np.float64), sizes


def worth(sizes: Floats) -> float:
    """How many clusters of one size say as much as these: fewer where a few hold most rows."""
    return float(sizes.sum() ** 2 / (sizes @ sizes))


def moments(residuals: Floats, sizes: Floats) -> tuple[Floats, Floats]:
    """Standard error of the mean and skewness, from each cluster's sum less what the mean would
    give; one row for each data set.
    """
    units, n = worth(sizes), float(sizes.sum())
    square = (residuals**2).mean(axis=1)
    error = np.sqrt(square * sizes.size * units / (units - 1)) / n
    cube = (residuals**3).mean(axis=1)
    safe = np.where(square > 0, square, 1.0)
    return error, np.where(square > 0, cube / safe**1.5, 0.0)


def freedom(residuals: Floats) -> Floats:
    """Degrees of freedom of their variance, by their own fourth moment (Satterthwaite): as many as
    clusters less one for a normal law, few where few clusters make up all the variance. A row for
    each data set; residuals as for `moments`.
    """
    square = (residuals**2).sum(axis=1)
    variation = (residuals**4).sum(axis=1) - square**2 / residuals.shape[1]
    found: Floats = 2 * square**2 / np.maximum(variation, 1e-9 * np.maximum(square**2, 1e-300))
    return np.clip(found, 0.01, residuals.shape[1] - 1)


def assumed_effect(sizes: Floats) -> float:
    """How many times more a mean varies than without clusters, where the data do not tell."""
    return 1 + (float(sizes @ sizes / sizes.sum()) - 1) * ASSUMED_CORRELATION
