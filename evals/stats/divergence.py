"""Whether two arms say the same: token by token, in distribution, and in what they think of a text.

Knows token ids and logarithms of probabilities, no tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

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
    freedom,
    moments,
    worth,
)
from evals.stats.paired import mean_diff, reach_of, tail


def first_divergence(one: Sequence[object], other: Sequence[object]) -> int | None:
    """Place of the first token that differs, from 0; an answer that ends earlier differs there.
    None for the same answer.
    """
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))


@dataclass(frozen=True, slots=True)
class Curve:
    """Share of answers that are still the same after so many tokens, with its interval."""

    tokens: tuple[int, ...]
    share: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def kaplan_meier(tokens: Sequence[int], diverged: Sequence[bool], alpha: float = 0.05) -> Curve:
    """`tokens`: how many were the same, until they differed or the answer ended (not diverged).
    Intervals by the logarithm of the cumulative hazard: Kalbfleisch and Prentice 2002, 1.4.
    """
    check_alpha(alpha)
    z = float(-special.ndtri(alpha))
    times, events = np.asarray(tokens), np.asarray(diverged, dtype=bool)
    share, variance = 1.0, 0.0
    rows = [(0, 1.0, 1.0, 1.0)]
    for time in np.unique(times[events]):
        at_risk = int((times >= time).sum())
        here = int((events & (times == time)).sum())
        share *= 1 - here / at_risk
        variance += here / (at_risk * (at_risk - here)) if at_risk > here else math.inf
        if share > 0:
            wide = math.exp(z * math.sqrt(variance) / abs(math.log(share)))
            rows.append((int(time), share, share**wide, share ** (1 / wide)))
        else:
            rows.append((int(time), 0.0, 0.0, rows[-1][3]))
    columns = tuple(zip(*rows, strict=True))
    return Curve(columns[0], columns[1], columns[2], columns[3])


def divergence(
    candidate: ArrayLike,
    control: ArrayLike,
    margin: float,
    clusters: Sequence[Hashable] | None = None,
    alpha: float = 0.05,
) -> Estimate:
    """Whether candidate answers differ from the baseline's no more often than the baseline's own
    second answers (`control`) do: item by item, true where they differ; `margin` as -0.02.
    """
    changed = np.asarray(candidate, dtype=bool).reshape(-1)
    noise = np.asarray(control, dtype=bool).reshape(-1)
    if changed.size != noise.size:
        raise ValueError(f"{changed.size} items of the candidate, {noise.size} of the control")
    return mean_diff(noise.astype(float) - changed, margin, clusters, alpha)


# ---- in distribution -----------------------------------------------------------------------------


def same_law(
    baseline: Sequence[ArrayLike],
    candidate: Sequence[ArrayLike],
    rng: np.random.Generator,
    permutations: int = 999,
) -> float:
    """p of "both arms draw the next token by the same law", entry i being the tokens drawn after
    prefix i: chi-square, with the arms swapped at random in each pair of draws. Small: they differ.

    Draws at the same place of both arms may have one seed, and be alike by it.
    """
    found, drawn = 0.0, np.zeros(permutations)
    for one, other in zip(baseline, candidate, strict=True):
        left, right = _drawn(one, other)
        total = left.sum(axis=0) + right.sum(axis=0)
        signs = rng.choice([-1.0, 1.0], (permutations, len(left)))
        found += float(((left - right).sum(axis=0) ** 2 / total).sum())
        drawn += ((signs @ (left - right)) ** 2 / total).sum(axis=1)
    return float((np.count_nonzero(drawn >= found - 1e-9) + 1) / (permutations + 1))


def law_distance(
    baseline: Sequence[ArrayLike],
    candidate: Sequence[ArrayLike],
    maximum: float,
    alpha: float = 0.05,
    clusters: Sequence[Hashable] | None = None,
) -> Estimate:
    """Mean squared distance between the laws of the next token, over prefixes, without the bias of
    few draws: how often two draws of one arm agree, less how often one of each does (the energy
    distance of equal or not). `p` is of a distance of at least `maximum`.

    Draws at the same place of both arms may have one seed, which makes them agree whatever their
    laws: they are not compared with each other.
    """
    values = [
        _squared_distance(*_drawn(one, other))
        for one, other in zip(baseline, candidate, strict=True)
    ]
    return mean_below(values, maximum, clusters, alpha)


def mean_below(
    values: ArrayLike,
    maximum: float,
    clusters: Sequence[Hashable] | None = None,
    alpha: float = 0.05,
) -> Estimate:
    """Mean of what should be small (KL of a token, loss of log likelihood on a text) and its upper
    bound, over whole clusters. Raises TooFewClusters below 20.
    """
    check_alpha(alpha)
    found = finite(values, "values")
    sums, sizes = cluster_sums(found, clusters)
    count = sizes.size
    if count < FEWEST_CLUSTERS:
        raise TooFewClusters(count, FEWEST_CLUSTERS)
    mean = float(found.mean())
    residuals = (sums - sizes * mean)[None, :]
    error, skewness = (float(part[0]) for part in moments(residuals, sizes))
    free = min(worth(sizes), 1 + float(freedom(residuals)[0]) / 2)  # no bets guard this one
    reach = float(special.stdtrit(max(free, 1.01) - 1, 1 - alpha))
    distance = maximum - mean
    return Estimate(
        estimate=mean,
        low=mean - error * reach_of(reach, skewness, count),
        high=mean + error * reach_of(reach, -skewness, count),
        p=float(tail(distance / error, -skewness, count, free)) if error else float(distance <= 0),
        p_harm=float(tail(-distance / error, skewness, count, free))
        if error
        else float(distance >= 0),
        n=found.size,
        clusters=count,
        method="cluster_t",
        detail={"standard_error": error, "skewness": skewness},
    )


def _drawn(one: ArrayLike, other: ArrayLike) -> tuple[Floats, Floats]:
    """A row for each draw of either arm: 1 at its token."""
    left, right = np.asarray(one).reshape(-1), np.asarray(other).reshape(-1)
    if left.size != right.size:
        raise ValueError(f"{left.size} draws of the baseline, {right.size} of the candidate")
    if left.size < 2:
        raise ValueError("fewer than two draws after a prefix: nothing can be said of their law")
    tokens, places = np.unique(np.concatenate([left, right]), return_inverse=True)
    rows = np.eye(tokens.size)[places]
    return rows[: left.size], rows[left.size :]


def _squared_distance(left: Floats, right: Floats) -> float:
    one, other = left.sum(axis=0), right.sum(axis=0)
    apart = len(left) * (len(left) - 1)  # pairs of draws that have not one place
    within = one @ (one - 1) + other @ (other - 1)
    across = one @ other - (left * right).sum()
    return float((within - 2 * across) / apart)
