"""How many pairs a question needs, by what is known of its noise. Pure; reads no file.

The noise is that of the baseline against itself in an earlier run, else what is assumed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from evals import ratios, shares
from evals.battery import null_of
from evals.design import Block
from evals.metrics import UNWANTED
from evals.pairs import Pair, by_source
from evals.questions import Question, questions
from evals.stats.estimate import (
    ASSUMED_CORRELATION,
    FEWEST_CLUSTERS,
    FEWEST_MOVED,
    Floats,
    cluster_sums,
)
from evals.stats.power import (
    block_pairs_needed,
    pairs_needed,
    testable_margin,
    testable_ratio,
)
from evals.stats.rates import trials_needed
from evals.stats.ratio import FEWEST_BLOCK_PAIRS
from evals.texts import differs
from policies.hypothesis import Hypothesis, Stats

# What is assumed where no run has measured it.
FLIPS, BLOCK_SPREAD, TOKEN_SPREAD, CORRELATION = 0.06, 0.10, 0.30, 0.1
# Of the time that one request of a replay takes: the same request meets other ones in either arm.
REQUEST_SPREAD = 0.7
# Flips of what hardly ever happens: an answer that is empty or looped, a request that fails.
RARE_FLIPS = 0.005
_RARE = ("served", *UNWANTED)
_MEANS = ("mean_max", "law_max")
# Tests of how often something happens.
_COUNTED = ("rate_max", "percentile_max", "identical")
# Looking all the time takes more pairs than one look at the end.
_SEQUENTIAL = 1.5
NEVER = 10**9
_REPLAYS = "replay:"
FINENESS = 1e-3


@dataclass(frozen=True, slots=True)
class Supply:
    """What a source has, as the design will ask it: rows, repeats not counted, that fall into so
    many clusters and blocks; `crowd`: requests of a block that come at the times of a replay.
    """

    rows: int
    clusters: int
    blocks: int
    crowd: float = math.inf


def supply_of(blocks: Sequence[Block]) -> Supply:
    """What the blocks of a source have, repeats not counted."""
    items = [item for block in blocks if block.repeat == 0 for item in block.items]
    timed = [block.size for block in blocks if block.source.startswith(_REPLAYS)]
    crowd = sum(timed) / len(timed) if timed else math.inf
    return Supply(len(items), len({item.cluster for item in items}), len(blocks), crowd)


@dataclass(frozen=True, slots=True)
class Noise:
    """What one metric does without any change: `flips`, share of rows that change between right
    and wrong; `spread`, standard deviation of a log ratio, of a pair of blocks or of a row;
    `rate` of what nobody wants; `correlation` of rows of a cluster.
    """

    flips: float = FLIPS
    spread: float | None = None
    rate: float = 0.0
    correlation: float = CORRELATION
    measured: bool = False


def measured(hypothesis: Hypothesis, floor: Sequence[Pair]) -> dict[str, Noise]:
    """The noise of each question, from pairs of the baseline with itself, of an earlier run."""
    sources = by_source(floor)
    found = {}
    for question in questions(hypothesis):
        pairs = sources.get(question.source, ())
        if pairs and (known := _noise(question, pairs)) is not None:
            found[question.name] = known
    return found


def _noise(question: Question, pairs: Sequence[Pair]) -> Noise | None:
    kind = question.metric.kind
    if kind in ("time", "rate"):
        logs = ratios.block_logs(question.metric, pairs)
        return Noise(spread=float(np.std(logs, ddof=1)), measured=True) if len(logs) > 2 else None
    if kind == "tokens":
        logs = [one.log for one in ratios.counted(question.metric, pairs)]
        return Noise(spread=float(np.std(logs, ddof=1)), measured=True) if len(logs) > 2 else None
    if kind == "divergence":
        rate = sum(differs(one) for one in pairs) / len(pairs)
        return Noise(flips=rate, rate=rate, measured=True)
    seen = shares.units(null_of(question).metric, pairs) if kind in ("share", "flip") else []
    if not seen:
        return None
    diffs = np.array([one.candidate - one.baseline for one in seen])
    flips = float((diffs**2).mean())
    rate = float(np.mean([one.baseline for one in seen]))
    sums, sizes = cluster_sums(diffs, [one.cluster for one in seen])
    return Noise(
        flips=flips,
        rate=flips / 2 if kind == "flip" else rate,
        correlation=_correlation(sums, sizes, flips),
        measured=True,
    )


def _correlation(sums: Floats, sizes: Floats, square: float) -> float:
    """Of differences within a cluster, from how much more their sums vary than alone."""
    room = float((sizes**2 - sizes).sum()) * square
    extra = float((sums**2).sum()) - float(sizes.sum()) * square
    return min(1.0, max(0.0, extra / room)) if room > 0 else CORRELATION


@dataclass(frozen=True, slots=True)
class Needs:
    """`what` counts, how much of it is `there`, how much of it a bound needs; `near`: about the
    smallest bound that what is there can show.
    """

    what: str
    there: int
    of: Callable[[float], int]
    near: float

    @property
    def testable(self) -> float | None:
        """The smallest bound that what is there can show, to a tenth of a point; None: none."""
        last = round(1 / FINENESS) - 1
        if not self.there or self.of(last * FINENESS) > self.there:
            return None
        at = min(max(round(self.near / FINENESS), 1), last)
        return _smallest(lambda step: self.of(step * FINENESS) <= self.there, at, last) * FINENESS


def _smallest(enough: Callable[[int], bool], near: int, last: int) -> int:
    """The first of 1 .. last from which on it is enough, as `last` is: steps away from `near` that
    double, then halves, since each look costs.
    """
    step = 1
    if enough(near):
        low, high = near - 1, near
        while low > 0 and enough(low):
            step *= 2
            low, high = max(low - step, 0), low
    else:
        low, high = near, min(near + 1, last)
        while high < last and not enough(high):
            step *= 2
            low, high = high, min(high + step, last)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def needs(question: Question, supply: Supply, noise: Noise, stats: Stats, power: float) -> Needs:
    """What a question needs, by what is known of its noise."""
    alpha = stats.alpha
    if question.metric.kind in ("time", "rate"):
        spread = max(_spread(question, supply, noise), FINENESS)

        def blocks(bound: float) -> int:
            ratio = 1 + bound if question.metric.better == "lower" else 1 - bound
            try:
                need = block_pairs_needed(spread, ratio, alpha, power)
            except ValueError:  # more than a million
                return NEVER
            return max(FEWEST_BLOCK_PAIRS, need)

        near = testable_ratio(max(supply.blocks, 2), spread, alpha, power)
        return Needs("pairs of blocks", supply.blocks, blocks, near)
    size = supply.rows / max(supply.clusters, 1)
    effect = (1 + (size - 1) * _correlated(question, supply, noise)) * (
        _SEQUENTIAL if stats.mode == "sequential" else 1
    )
    few = size > 1 and supply.clusters < FEWEST_CLUSTERS

    def pairs(bound: float) -> int:
        return NEVER if few else math.ceil(effect * _pairs(question, noise, bound, alpha, power))

    worth = int(supply.rows / effect)
    near = testable_margin(worth, _flips(question, noise), alpha, power) if worth else 1.0
    return Needs("pairs", supply.rows, pairs, near)


def _spread(question: Question, supply: Supply, noise: Noise) -> float:
    """Of answers, or of pairs of blocks; unmeasured, more where a time rests on few requests."""
    metric = question.metric
    if metric.kind == "tokens":
        return _answer_spread(noise)
    if noise.spread is not None:
        return noise.spread
    if metric.kind != "time" or not supply.crowd:
        return BLOCK_SPREAD
    q, one = metric.quantile, REQUEST_SPREAD / math.sqrt(supply.crowd)
    if q is not None and 0 < q < 1:  # of requests whose logarithms are normal
        density = math.exp(-(float(special.ndtri(q)) ** 2) / 2) / math.sqrt(2 * math.pi)
        one *= math.sqrt(q * (1 - q)) / density
    return math.hypot(BLOCK_SPREAD, one)


def _answer_spread(noise: Noise) -> float:
    """Of answers' tokens, from one to the next."""
    return TOKEN_SPREAD if noise.spread is None else noise.spread


def _correlated(question: Question, supply: Supply, noise: Noise) -> float:
    """Of rows in a cluster; where few clusters will have an event, what the tests assume."""
    if question.test in _MEANS or question.metric.kind == "tokens":
        return noise.correlation
    size = supply.rows / max(supply.clusters, 1)
    counted = question.test in _COUNTED
    share = _rate(question, noise) if counted else noise.flips
    with_event = supply.clusters * (1 - (1 - min(share, 1.0)) ** size)
    few = with_event < FEWEST_MOVED
    return max(noise.correlation, ASSUMED_CORRELATION) if few else noise.correlation


def _pairs(question: Question, noise: Noise, bound: float, alpha: float, power: float) -> int:
    """Of independent rows."""
    if question.test in _COUNTED:
        return _rate_pairs(_rate(question, noise), bound, alpha, power)
    if question.metric.kind == "tokens":
        tails = (1 - power) / 2 if question.test == "tost" else 1 - power
        z = float(-special.ndtri(alpha) - special.ndtri(tails))
        spread = _answer_spread(noise)
        return max(FEWEST_CLUSTERS, math.ceil((z * spread / math.log1p(bound)) ** 2))
    if question.test in _MEANS:
        return FEWEST_CLUSTERS
    return pairs_needed(_flips(question, noise), min(bound, 0.999), alpha, power)


def _flips(question: Question, noise: Noise) -> float:
    rare = not noise.measured and question.metric.name in _RARE
    return min(noise.flips, RARE_FLIPS) if rare else noise.flips


def _rate(question: Question, noise: Noise) -> float:
    """Of events that come without any change. Half of the flips are losses, until they have been
    counted; of what nobody wants none is assumed.
    """
    lost = not noise.measured and question.metric.kind == "flip"
    return noise.flips / 2 if lost else noise.rate


def _rate_pairs(rate: float, maximum: float, alpha: float, power: float) -> int:
    """With which as many events as chance may bring still prove a rate below the maximum."""
    if rate >= maximum:
        return NEVER
    count = trials_needed(maximum, alpha)
    while rate > 0:
        events = int(special.bdtrik(power, count, rate)) + 1
        wanted = trials_needed(maximum, alpha, events)
        if wanted <= count:
            break
        count = max(wanted, count + max(1, count // 50))
        if count > NEVER // 100:
            return NEVER
    return count


def note(question: Question, supply: Supply, noise: Noise) -> str:
    kind = question.metric.kind
    if kind in ("time", "rate") and supply.blocks < FEWEST_BLOCK_PAIRS:
        return (
            f"{supply.blocks} pairs of blocks, and at least {FEWEST_BLOCK_PAIRS} are needed: "
            "smaller ones (design.block_items, design.block) or repeats make more of the same rows"
        )
    if (
        kind not in ("time", "rate")
        and supply.rows > supply.clusters
        and supply.clusters < FEWEST_CLUSTERS
    ):
        return (
            f"{supply.clusters} clusters, and at least {FEWEST_CLUSTERS} are needed; "
            "more rows of the same ones do not help"
        )
    how = "measured" if noise.measured else "assumed"
    if kind in ("time", "rate", "tokens"):
        return f"spread {_spread(question, supply, noise):.1%} {how}"
    if question.test in _MEANS:
        return f"{FEWEST_CLUSTERS} texts at least; how many more depends on them"
    if question.test in _COUNTED:
        return f"rate {_rate(question, noise):.1%} {how}"
    return f"{_flips(question, noise):.1%} flips {how}"
