"""How far traffic has moved from what was replayed: population stability index.

Above 0.2 a mix is another one (the usual rule of credit scoring, where the index comes from).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable

import numpy as np
from numpy.typing import ArrayLike

from evals.stats.estimate import Floats, finite

MOVED = 0.2


def psi(before: ArrayLike, after: ArrayLike) -> float:
    """Of counts in the same bins. Half an observation is added to each bin: an empty one would
    make the index infinite.
    """
    old, new = finite(before, "counts") + 0.5, finite(after, "counts") + 0.5
    if old.size != new.size:
        raise ValueError(f"{old.size} bins before and {new.size} after: the same bins in both")
    expected, actual = old / old.sum(), new / new.sum()
    return float(((actual - expected) * np.log(actual / expected)).sum())


def psi_of_numbers(before: ArrayLike, after: ArrayLike, bins: int = 10) -> float:
    """Lengths and the like, in bins that hold equally many of `before`."""
    old, new = finite(before, "values before"), finite(after, "values after")
    edges = np.unique(np.quantile(old, np.linspace(0, 1, bins + 1)[1:-1]))
    return psi(_binned(old, edges), _binned(new, edges))


def psi_of_kinds(before: Iterable[Hashable], after: Iterable[Hashable]) -> float:
    """Tenants, tiers, prefixes: a bin for each kind that either side has."""
    old, new = Counter(before), Counter(after)
    kinds = list(dict.fromkeys([*old, *new]))
    return psi([old[kind] for kind in kinds], [new[kind] for kind in kinds])


def noise(before: int, after: int, bins: int) -> float:
    """What the index is about where nothing moved: (bins - 1) (1 / before + 1 / after)."""
    return (bins - 1) * (1 / before + 1 / after)


def _binned(values: Floats, edges: Floats) -> Floats:
    places = np.searchsorted(edges, values, side="left")
    return np.bincount(places, minlength=edges.size + 1).astype(np.float64)
