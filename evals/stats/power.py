"""What pairs can show, before they are spent: how many are needed, which margin is testable.

For binary outcomes by adding up the tables that pass; the usual (z_a + z_b)^2 flips / margin^2
promises 80 % where flips are few and gives 25 to 77 %.
"""

from __future__ import annotations

import math
from functools import lru_cache

from scipy import optimize, special

from evals.stats import tango
from evals.stats.estimate import check_alpha
from evals.stats.rates import trials_needed

_FEW_PAIRS = 1000
_EXACT_COSTS = 0.015  # what the exact critical value lies above the normal one, about


@lru_cache(maxsize=4096)
def pairs_needed(
    flips: float, margin: float, alpha: float = 0.05, power: float = 0.8, diff: float = 0.0
) -> int:
    """Pairs with which a candidate whose true difference is `diff` passes `margin` with
    probability `power`, when a share `flips` of items changes between right and wrong.
    """
    share, flips = abs(margin), min(max(flips, abs(diff), 1e-4), 1.0)
    low = min_pairs(share, alpha)
    guess = _by_score(flips, share, alpha, power, diff)
    if guess > tango.EXACT_PAIRS:
        return guess
    z = _normal(alpha) + _EXACT_COSTS

    def shown(count: int) -> bool:
        return tango.power(count, flips, diff, -share, z) >= power

    if shown(low):
        return _exactly(low, flips, share, alpha, power, diff)
    high = max(guess, low + 1)
    while not shown(high):
        low, high = high, high + high // 4 + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return _exactly(high, flips, share, alpha, power, diff)


def _exactly(
    count: int, flips: float, margin: float, alpha: float, power: float, diff: float
) -> int:
    """From there on with the critical value of just so many pairs, which is rough for few."""
    while count < _FEW_PAIRS:
        if tango.reaches(power - 0.005, count, flips, diff, -margin, alpha):
            break
        count += max(1, count // 100)
    return count


def _by_score(flips: float, margin: float, alpha: float, power: float, diff: float) -> int:
    """The same by normal approximation: right to a few points of power, at once."""
    distance = diff + margin
    if distance <= 0:
        raise ValueError(f"a candidate at {diff} cannot pass a margin of {-margin}")
    under_null, under_truth = _variances(flips, margin, diff)
    spread = _normal(alpha) * math.sqrt(under_null) + _normal(1 - power) * math.sqrt(under_truth)
    return max(math.ceil(spread**2 / distance**2), min_pairs(margin, alpha))


def pairs_by_rule(flips: float, margin: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """The textbook's (z_a + z_b)^2 flips / margin^2, to compare with: too few at few flips."""
    return math.ceil((_normal(alpha) + _normal(1 - power)) ** 2 * flips / margin**2)


def min_pairs(margin: float, alpha: float = 0.05) -> int:
    """The fewest pairs that can pass, with no flip at all: 299, 149, 59 for 1, 2, 5 points."""
    return trials_needed(abs(margin), alpha)


def testable_margin(pairs: int, flips: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest margin, a positive share, that `pairs` can pass with `power`; 1.0 for none."""
    if _by_score(flips, 0.999, alpha, power, 0.0) > pairs:
        return 1.0
    low, high = 1e-4, 0.999
    while high - low > 1e-4:
        middle = (low + high) / 2
        enough = _by_score(flips, middle, alpha, power, 0.0) <= pairs
        low, high = (low, middle) if enough else (middle, high)
    return high


def mde(pairs: int, flips: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest difference that `pairs` tell from none with `power`."""
    return min(1.0, (_normal(alpha) + _normal(1 - power)) * math.sqrt(flips / pairs))


def guardrail_power(power: float, guardrails: int) -> float:
    """What each of so many guardrails is planned at, for all of them together to have `power`."""
    return 1 - (1 - power) / max(guardrails, 1)


def block_pairs_needed(
    spread: float, margin_ratio: float, alpha: float = 0.05, power: float = 0.8, ratio: float = 1.0
) -> int:
    """ABBA block pairs for a latency ratio whose logarithm varies by `spread` (standard deviation
    from pair to pair, as A against A' shows it) when the truth is `ratio`.
    """
    distance = abs(math.log(margin_ratio) - math.log(ratio))
    if distance == 0:
        raise ValueError(f"a true ratio of {ratio} cannot be told from a margin of {margin_ratio}")
    count = 2
    while _t_power(count, distance, spread, alpha) < power:
        count = count + max(1, count // 50)
        if count > 1_000_000:
            raise ValueError(f"a spread of {spread} hides a ratio of {margin_ratio} for good")
    return count


def testable_ratio(
    block_pairs: int, spread: float, alpha: float = 0.05, power: float = 0.8
) -> float:
    """The smallest rise, 0.07 for 7 %, that so many block pairs tell from none with `power`."""
    if block_pairs < 2:
        return math.inf
    found = optimize.brentq(
        lambda distance: _t_power(block_pairs, distance, spread, alpha) - power,
        1e-9,
        50 * spread + 1,
    )
    return math.expm1(found)


def _t_power(count: int, distance: float, spread: float, alpha: float) -> float:
    """Of a one-sided t test on so many logarithms, by the noncentral t."""
    if spread == 0:
        return 1.0
    reach, far = special.stdtrit(count - 1, 1 - alpha), distance / spread * math.sqrt(count)
    power = 1 - special.nctdtr(count - 1, far, reach)
    if math.isnan(power):  # so far off the series does not converge; a normal one is as right
        power = special.ndtr((far - reach) / math.sqrt(1 + reach**2 / (2 * count - 2)))
    return float(power)


def _variances(flips: float, margin: float, diff: float) -> tuple[float, float]:
    """Of a pair's difference: under the hypothesis, as the score test fits it, and in truth."""
    lost, null = (flips - diff) / 2, -margin
    negative_b = flips - (2 - diff) * null
    root = math.sqrt(negative_b**2 + 8 * lost * null * (1 - null))
    lost_share = (root + negative_b) / 4
    return 2 * lost_share + null * (1 - null), flips - diff**2


def _normal(alpha: float) -> float:
    check_alpha(alpha)
    return float(-special.ndtri(alpha))
