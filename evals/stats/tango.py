"""Right or wrong in both arms: Tango's score test for paired proportions, made exact.

The score statistic orders the tables (lost, gained); its p is the largest probability, over every
flip rate, of a table at least as extreme. The normal approximation alone would let a loss of the
margin through up to 6.8 % of the time where flips are few (docs/statistics.md).

Sources: Tango 1998, Statistics in Medicine 17:891; Hsueh, Liu and Chen 2001, Biometrics 57:478.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from evals.stats.estimate import Estimate, Floats, check_alpha

EXACT_PAIRS = 20_000  # beyond, the normal approximation is right to a tenth of a point
_TIE = 1e-9  # tables of the same statistic are equally extreme


def statistic(lost: ArrayLike, gained: ArrayLike, n: ArrayLike, diff: float) -> Floats:
    """Tango's z of the hypothesis that candidate less baseline is `diff`; arrays work."""
    b = np.asarray(gained, dtype=np.float64)
    c = np.asarray(lost, dtype=np.float64)
    pairs = np.asarray(n, dtype=np.float64)
    negative_b = b + c - (2 * pairs - b + c) * diff
    root = np.sqrt(np.maximum(negative_b**2 + 8 * pairs * c * diff * (1 - diff), 0.0))
    lost_share = (root + negative_b) / (4 * pairs)  # the likeliest under the hypothesis
    variance = pairs * (2 * lost_share + diff * (1 - diff))
    z: Floats = (b - c - pairs * diff) / np.sqrt(np.maximum(variance, 1e-12))
    return z


def tango(lost: int, gained: int, n: int, margin: float, alpha: float = 0.05) -> Estimate:
    """`lost`: right in the baseline and wrong in the candidate, of `n` pairs; `gained`: the other
    way round. `margin` is of the difference: -0.02 asks that no more than two points are lost.
    """
    check_alpha(alpha)
    _check(lost, gained, n, margin)
    p, p_harm = p_value(lost, gained, n, margin), p_value(gained, lost, n, -margin)
    low, high = bound(lost, gained, n, alpha), -bound(gained, lost, n, alpha)
    # bounds are searched to a step, p is not: at the margin itself the bound follows p
    low = max(low, np.nextafter(margin, 1)) if p <= alpha else min(low, margin)
    high = min(high, np.nextafter(margin, -1)) if p_harm <= alpha else max(high, margin)
    return Estimate(
        estimate=(gained - lost) / n,
        low=float(low),
        high=float(high),
        p=p,
        p_harm=p_harm,
        n=n,
        clusters=None,
        method="tango",
        detail={
            "lost": lost,
            "gained": gained,
            "z": float(statistic(lost, gained, n, margin)),
            "p_normal": float(special.ndtr(-statistic(lost, gained, n, margin))),
        },
    )


def p_value(lost: float, gained: float, n: int, diff: float) -> float:
    """Of a difference of at most `diff`; counts may be fractions, `n` is whole."""
    z = float(statistic(lost, gained, n, diff))
    if n > EXACT_PAIRS:
        return float(special.ndtr(-z))
    return size(n, diff, z)


def size(n: int, diff: float, z: float) -> float:
    """The largest probability, over flip rates, of a statistic of at least `z` at `diff`."""
    allowed = _most_lost(n, diff, z)
    return min(1.0, max(_probability(allowed, n, diff, flips) for flips in _flip_rates(diff)))


def power(n: int, flips: float, diff: float, margin: float, z: float) -> float:
    """Probability of a statistic of at least `z` for `margin` when the truth is `diff`, `flips`."""
    first, last = _likely(n, (flips + diff) / 2)
    return _probability(_most_lost(n, margin, z, first, last), n, diff, flips, first)


def critical(n: int, margin: float, alpha: float) -> float:
    """The smallest statistic that passes: somewhat above the normal one."""
    return deque(_brackets(n, margin, alpha), maxlen=1)[0][1]


def reaches(wanted: float, n: int, flips: float, diff: float, margin: float, alpha: float) -> bool:
    """Whether `power` at the critical statistic is so high, without finding just where that is."""
    for low, high in _brackets(n, margin, alpha):
        if power(n, flips, diff, margin, high) >= wanted:
            return True
        if power(n, flips, diff, margin, low) < wanted:
            return False
    return False


def _brackets(n: int, margin: float, alpha: float) -> Iterator[tuple[float, float]]:
    """Statistics that do not pass and that do, ever closer."""
    low, high = float(-special.ndtri(alpha)) - 0.2, 8.0
    rates, middle = list(_flip_rates(margin)), low + 0.3  # hardly ever is it above that
    while high - low > 1e-4:
        allowed = _most_lost(n, margin, middle)
        above = (
            at for at, one in enumerate(rates) if _probability(allowed, n, margin, one) > alpha
        )
        if (at := next(above, None)) is None:
            high = middle
        else:  # most likely the first to be above the next time as well
            low = middle
            rates.insert(0, rates.pop(at))
        yield low, high
        middle = (low + high) / 2


def _flip_rates(diff: float) -> Floats:
    """Denser at both ends, where few tables carry the probability."""
    least = max(abs(diff), 1e-6)
    upward = least + np.concatenate([[0.0], np.geomspace(1e-4, 1, 40)])
    downward = 1 - np.concatenate([[0.0], np.geomspace(1e-3, 0.3, 14)])
    rates = np.concatenate([upward, downward])
    return rates[(rates >= least) & (rates <= 1)]


def _likely(n: int, gain: float) -> tuple[int, int]:
    """How many of n are gained, but for a chance that counts for nothing."""
    spread = 9 * np.sqrt(n * gain * (1 - gain)) + 10
    return max(0, int(n * gain - spread)), min(n, int(n * gain + spread))


def _most_lost(n: int, diff: float, z: float, first: int = 0, last: int | None = None) -> Floats:
    """For each number gained, first .. last: the most that may be lost with a statistic of `z`; or
    -1. By default of 0 .. n.
    """
    gained = np.arange(first, (n if last is None else last) + 1)
    low, high = np.full(gained.size, -1), n - gained + 1
    while (high - low > 1).any():
        middle = (low + high) // 2
        extreme = statistic(np.maximum(middle, 0), gained, n, diff) >= z - _TIE
        low = np.where(extreme & (middle >= 0), middle, low)
        high = np.where(extreme & (middle >= 0), high, np.maximum(middle, low + 1))
    return low.astype(np.float64)


def _probability(most_lost: Floats, n: int, diff: float, flips: float, offset: int = 0) -> float:
    """Of the tables in the region, where pairs are gained and lost independently. `most_lost` is of
    `offset` gained and more.
    """
    gain, loss = (flips + diff) / 2, (flips - diff) / 2
    first, last = _likely(n, gain)
    k = np.arange(first, last + 1)
    log_pmf = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    log_pmf += special.xlogy(k, gain) + special.xlog1py(n - k, -gain)
    share = min(loss / (1 - gain), 1.0) if gain < 1 else 0.0
    most = most_lost[first - offset : last + 1 - offset]
    within = np.where(most >= 0, special.bdtr(np.maximum(most, 0), n - k, share), 0.0)
    return float(np.exp(log_pmf) @ within)


def bound(lost: float, gained: float, n: int, alpha: float) -> float:
    """The smallest difference that is not refused at `alpha`: the lower bound."""
    z = float(-special.ndtri(alpha))
    low = _root(lambda diff: float(statistic(lost, gained, n, diff)) - z, -1.0, (gained - lost) / n)
    if n > EXACT_PAIRS or low <= -1:
        return low
    if p_value(lost, gained, n, low) <= alpha:
        return low
    step = max(abs(low), 1 / n) * 0.02
    lower = max(low - step, -1.0)
    while lower > -1 and p_value(lost, gained, n, lower) > alpha:
        step *= 2
        lower = max(lower - step, -1.0)
    for _ in range(8):  # to a four hundredth of the last step; the lower end is refused for sure
        middle = (lower + low) / 2
        refused = p_value(lost, gained, n, middle) <= alpha
        lower, low = (middle, low) if refused else (lower, middle)
    return lower


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    low, high = low + 1e-12, high - 1e-12
    if low >= high or function(low) <= 0:
        return -1.0
    return float(optimize.brentq(function, low, high, xtol=1e-10))


def _check(lost: int, gained: int, n: int, margin: float) -> None:
    if n < 1 or min(lost, gained) < 0 or lost + gained > n:
        raise ValueError(f"{lost} lost and {gained} gained of {n} pairs: counts of pairs, n >= 1")
    if not -1 < margin < 1:
        raise ValueError(f"margin is {margin}; a difference of shares lies between -1 and 1")
