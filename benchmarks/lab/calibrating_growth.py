"""Ratios of items, differences that grow, live traffic watched for harm that comes late: more of
what `calibrating.py` counts, on simulated gates where the truth is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
from scipy import special

from benchmarks.lab.calibrating import ALPHA, Rates, count, rate
from benchmarks.lab.gates import Floats
from evals.metrics import metric
from evals.monitor import ANEW, Monitor, Signal
from evals.pairs import BASELINE, CANDIDATE
from evals.stats import rates, ratio, tango, trend
from evals.stats.estimate import Estimate, TooFewClusters, moments
from evals.texts import identity
from telemetry import Observation

Flags = np.ndarray[tuple[int], np.dtype[np.bool_]]
_Law = Callable[[np.random.Generator, int, int, float], Floats]


def _dense(rng: np.random.Generator, number: int, rows: int, mean: float) -> Floats:
    own = np.repeat(rng.standard_t(5, number) * 0.1, rows)
    return mean + own + rng.normal(0, 0.2, number * rows)


def _some(share: float) -> _Law:
    """Only so many clusters change, all rows of one alike, on average to what makes the mean."""

    def drawn(rng: np.random.Generator, number: int, rows: int, mean: float) -> Floats:
        size = rng.gamma(4, mean / share / 4, number)
        return np.repeat((rng.random(number) < share) * size, rows)

    return drawn


def mean_ratios(rng: np.random.Generator, share: float) -> Mapping[str, Rates]:
    """Longer by the margin of 10 % on average: all a little, or some by up to twice and more."""
    false_pass: Rates = {}
    plain: Rates = {}
    laws = {
        "all": _dense,
        "a half": _some(0.5),
        "three in ten": _some(0.3),
        "one in seven": _some(0.14),
    }
    for number, rows in ((20, 10), (40, 5), (60, 5), (300, 1)):
        names, sizes = np.repeat(np.arange(number), rows).tolist(), np.full(number, float(rows))
        for named, law in laws.items():
            passed, usual = [], []
            for _ in range(count(1500, share)):
                logs = law(rng, number, rows, math.log(1.10))
                passed.append(ratio.mean_ratio(logs, 1.10, names, ALPHA).p <= ALPHA)
                sums = logs.reshape(number, rows).sum(axis=1)
                error = float(moments((sums - rows * logs.mean())[None, :], sizes)[0][0])
                reach = float(special.stdtrit(number - 1, 1 - ALPHA)) * error
                usual.append(logs.mean() + reach < math.log(1.10))
            name = f"{number} x {rows}, {named}"
            false_pass[name], plain[name] = rate(passed), rate(usual)
    return {"false_pass": false_pass, "usual, t by clusters": plain}


# ---- the same answers ----------------------------------------------------------------------------

ROWS, CONTROLLED = 1000, 240  # of which the second baseline is asked so many


@lru_cache(maxsize=10_000)
def _rate(events: int, margin: float) -> Estimate:
    return rates.clopper_pearson(events, ROWS, margin, ALPHA)


@lru_cache(maxsize=10_000)
def _excess(lost: int, gained: int, margin: float) -> Estimate:
    """Of the rows that are controlled; without its bounds, which are searched for and not used."""
    p = tango.p_value(lost, gained, CONTROLLED, -margin)
    p_harm = tango.p_value(gained, lost, CONTROLLED, margin)
    nothing, share = math.nan, (lost - gained) / CONTROLLED
    return Estimate(share, nothing, nothing, p, p_harm, CONTROLLED, None, "tango")


def identities(rng: np.random.Generator, share: float) -> Mapping[str, Rates]:
    """A baseline that differs from itself in some answers, and a candidate in the margin more; and
    how often one that differs no more fails: by what decides in a gate, `texts.identity`.
    """
    false_pass: Rates = {}
    failed: Rates = {}
    for margin in (0.01, 0.02, 0.05):
        for own in (0.0, 0.001, 0.005, 0.01, 0.03):
            number = count(4000, share)
            again = rng.random((number, CONTROLLED)) < own
            worse = rng.random((number, ROWS)) < own + margin
            same = rng.random((number, ROWS)) < own
            name = f"{100 * margin:g} points, the baseline wavers in {100 * own:g} %"
            p = [_identity(*gate, margin).p for gate in zip(again, worse, strict=True)]
            harm = [_identity(*gate, margin).p_harm for gate in zip(again, same, strict=True)]
            false_pass[name], failed[name] = (
                rate(np.array(p) <= ALPHA),
                rate(np.array(harm) <= ALPHA),
            )
    return {"false_pass": false_pass, "false_alarm": failed}


def _identity(again: Flags, differs: Flags, margin: float) -> Estimate:
    """Of one gate: which of the controlled rows differ in the second baseline, and which of all do
    in the candidate.
    """
    both = differs[:CONTROLLED]
    lost, gained = int((both & ~again).sum()), int((again & ~both).sum())
    return identity(
        int(again.sum()),
        CONTROLLED,
        int(both.sum()),
        margin,
        lambda: _rate(int(differs.sum()), margin),
        lambda: _excess(lost, gained, margin),
    )


# ---- what grows ----------------------------------------------------------------------------------


def _turns(
    rng: np.random.Generator, talks: int, turns: int, flips: float, grown: float
) -> tuple[Floats, Floats]:
    """Losses less gains of talks of which a half flip as one; and the place of each turn."""
    place = np.tile(np.arange(turns) / (turns - 1), talks)
    own = rng.random(talks * turns)
    alike = np.repeat(rng.random(talks), turns)
    drawn = np.where(np.repeat(rng.random(talks) < 0.5, turns), alike, own)
    lost = (drawn < flips / 2) | (own < grown * place)
    return lost.astype(np.float64) - (drawn > 1 - flips / 2), place


def _blocks(rng: np.random.Generator, blocks: int, grown: float) -> tuple[Floats, Floats]:
    """Log ratios of times, 20 a block, whose blocks vary by 5 %; and when each was asked."""
    place = np.arange(blocks * 20) / (blocks * 20 - 1)
    shared = np.repeat(rng.normal(0, 0.05, blocks), 20)
    return shared + rng.standard_t(4, blocks * 20) * 0.2 + math.log1p(grown) * place, place


def trends(rng: np.random.Generator, share: float) -> Mapping[str, Rates]:
    alarms: Rates = {}
    found: Rates = {}

    def flagged(draw: Callable[[], tuple[Floats, Floats]], size: int) -> tuple[float, int]:
        told = []
        for _ in range(count(2000, share)):
            worse, place = draw()
            names = np.repeat(np.arange(worse.size // size), size).tolist()
            try:
                told.append(trend.growth(worse, place, names, ALPHA).p_harm <= ALPHA)
            except TooFewClusters:
                told.append(False)
        return rate(told)

    for talks, turns in ((40, 5), (200, 5), (100, 10)):
        for flips in (0.02, 0.06, 0.2):
            name = f"{talks} talks of {turns} turns, {100 * flips:g} % flips"
            alarms[name] = flagged(lambda: _turns(rng, talks, turns, flips, 0.0), turns)  # noqa: B023  # called at once
        found[f"{talks} talks of {turns} turns, 6 % flips, 15 points more in the last"] = flagged(
            lambda: _turns(rng, talks, turns, 0.06, 0.15),  # noqa: B023  # called at once
            turns,
        )
    for blocks in (12, 25, 50):
        alarms[f"{blocks} blocks of times"] = flagged(lambda: _blocks(rng, blocks, 0.0), 20)  # noqa: B023  # called at once
        found[f"{blocks} blocks, 20 % slower in the end"] = flagged(
            lambda: _blocks(rng, blocks, 0.2),  # noqa: B023  # called at once
            20,
        )
    return {"false_alarm": alarms, "found": found}


# ---- live ----------------------------------------------------------------------------------------

LIVE = 2000  # requests of each arm


def watched(rng: np.random.Generator, share: float) -> Mapping[str, Rates]:
    """Requests that fail at 5 % in both arms, for a rollout's whole life; then at 15 points more in
    the candidate for the last third, and in its late turns alone.
    """
    number = count(60, share)
    alarms = [_alarmed(rng, 0.0, 0.0) for _ in range(number)]
    late = [_alarmed(rng, 0.15, 0.0) for _ in range(number)]
    turns = [_alarmed(rng, 0.0, 0.15) for _ in range(number)]
    return {
        "false_alarm": {f"{LIVE} requests each, margin 2 points": rate(alarms)},
        "found": {
            f"worse after {2 * LIVE // 3} (anew every {ANEW})": rate(late),
            "worse from the sixth turn on": rate(turns),
        },
    }


def _alarmed(rng: np.random.Generator, late: float, late_turns: float) -> bool:
    monitor = Monitor([Signal("served", metric("served"), 0.02)], ALPHA)
    drawn = rng.random((LIVE, 2, 2))
    for at in range(LIVE):
        for arm, name in enumerate((BASELINE, CANDIDATE)):
            for turn in (0, 1):
                added = late * (at > 2 * LIVE // 3) + late_turns * turn if arm else 0.0
                ok = drawn[at, arm, turn] >= 0.05 + added
                told = Observation(
                    f"{at} {arm} {turn}", "live", name, f"{at} {arm}", turn=6 * turn,
                    outcome="ok" if ok else "error",
                )  # fmt: skip
                monitor.saw(told)
        if monitor.harm is not None:
            return True
    return False


PARTS: Mapping[str, Callable[[np.random.Generator, float], Mapping[str, Rates]]] = {
    "mean ratio": mean_ratios,
    "trend": trends,
    "rollout": watched,
    "identity": identities,
}
