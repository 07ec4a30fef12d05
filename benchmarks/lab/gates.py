"""Laws that simulated gates draw from: flips, clusters, scores, latencies of a machine that drifts.

Arrays hold one gate a row. Knows no test.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def flips(
    rng: np.random.Generator, gates: int, n: int, share: float, diff: float
) -> tuple[Ints, Ints]:
    """Lost and gained of `n` pairs on their own, when a share of them flips."""
    loss, gain = (share - diff) / 2, (share + diff) / 2
    drawn = rng.multinomial(n, [loss, gain, 1 - share], size=gates)
    return drawn[:, 0], drawn[:, 1]


def clustered_flips(
    rng: np.random.Generator, gates: int, sizes: Ints, share: float, diff: float, correlation: float
) -> tuple[Ints, Ints]:
    """Lost and gained of every cluster: its own chances are drawn from a Beta law, so that two of
    its items flip alike with this correlation.
    """
    loss, gain = (share - diff) / 2, (share + diff) / 2
    scale = (1 - correlation) / correlation
    shape = (gates, sizes.size)
    losing = rng.beta(loss * scale, (1 - loss) * scale, shape)
    lost = rng.binomial(sizes, losing)
    if gain <= 0:
        return lost, np.zeros_like(lost)
    gaining = rng.beta(gain * scale, (1 - gain) * scale, shape)
    return lost, rng.binomial(sizes - lost, np.minimum(gaining / (1 - loss), 1.0))


def dense_scores(
    rng: np.random.Generator, gates: int, clusters: int, rows: int, diff: float
) -> Floats:
    """Sums of each cluster's differences, of graded scores that nearly all move, evenly."""
    own = rng.uniform(-0.3, 0.3, (gates, clusters))
    items = rng.uniform(-0.5, 0.5, (gates, clusters, rows)).sum(axis=2)
    sums: Floats = rows * (diff + own) + items
    return sums


def sparse_scores(
    rng: np.random.Generator, gates: int, clusters: int, rows: int, diff: float
) -> Floats:
    """The same where few move: losses of 0.6 in some clusters, gains of 0.2 wherever."""
    gain_share = 0.1
    loss_share = (0.2 * gain_share - diff) / 0.6
    chance = rng.beta(loss_share * 2.0, (1 - loss_share) * 2.0, (gates, clusters))
    lost = rng.binomial(rows, chance)
    gained = rng.binomial(rows - lost, gain_share / (1 - loss_share))
    return -0.6 * lost + 0.2 * gained


def few_scores(rng: np.random.Generator, gates: int, n: int, diff: float) -> Floats:
    """Differences of single items, most of them none and a few near the worst there is."""
    share = -diff / 0.9 if diff < 0 else 0.0
    return np.where(rng.random((gates, n)) < share, -0.9, 0.0)


def latency_blocks(
    rng: np.random.Generator,
    gates: int,
    order: str,
    requests: int,
    slower: float,
    drift: float,
    wander: float,
    unlike: float = 0.0,
) -> Iterator[tuple[list[Floats], list[Floats]]]:
    """Each gate's blocks of log-normal latencies, baseline's and candidate's in order of time.

    Block i of both has the same requests, which differ by `unlike` (of a logarithm) among them.

    `order` is of the whole run, as ABBAABBA. The machine becomes slower by the factor `drift` from
    the first block to the last, and wanders beside that by `wander` (of a logarithm) a block.
    """
    places = np.arange(len(order)) / max(len(order) - 1, 1)
    for _ in range(gates):
        speed = np.log(drift) * places + np.cumsum(rng.normal(0, wander, len(order)))
        blocks = np.exp(speed[:, None] + rng.normal(0, 0.5, (len(order), requests)))
        own = np.exp(rng.normal(0, unlike, (order.count("A"), requests)))
        arms = {
            arm: [block for block, of in zip(blocks, order, strict=True) if of == arm]
            for arm in "AB"
        }
        before = [block * one for block, one in zip(arms["A"], own, strict=True)]
        after = [slower * block * one for block, one in zip(arms["B"], own, strict=True)]
        yield before, after
