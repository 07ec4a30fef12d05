"""How often the gate is wrong: simulated gates where the truth is known, for every test in use."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.lab import calibrating, calibrating_growth
from benchmarks.lab.calibrating import ALPHA, Rates
from benchmarks.lab.report import About, Goal, Measured, Settings, run

ABOUT = About(
    name="gate_calibration",
    measures=(
        "Simulates gates in which the truth is known, thousands for each test and setting, with "
        "fixed seeds, and counts verdicts (alpha 0.05). `false_pass`: how often a candidate passes "
        "whose loss is just the margin: right or wrong answers on their own and in clusters, "
        "graded scores, bets for few, latency quantiles on a machine that drifts, equality of "
        "tokens, ratios of items, rare events, distance of laws, e-processes looked at after every "
        "pair. `false_alarm`: how often a candidate that stays as it is is said to get worse with "
        "its turns or with time, in a run or in a rollout; `found`: one that does. `power`: "
        "how often a plan's pairs pass when nothing is lost (planned: 0.8). `flagged`: how often "
        "an arm is told from itself (two sides, 0.1). `usual`: what other tests would have done, "
        "which no goal counts. `worst` is the worst of so many settings, `beyond error` that less "
        "three standard errors of the simulation."
    ),
    goals=(
        Goal("false_pass", ALPHA, "at most", "false pass at the margin at most alpha, every test"),
        Goal("false_alarm", ALPHA, "at most", "what stays as it is is called worse at most alpha"),
        Goal("power_off", 0.03, "at most", "power within 3 points of the plan, from 200 pairs on"),
        Goal("power_short", 0.01, "at most", "power nowhere more than a point below the plan"),
        Goal("aa_flagged", 2 * ALPHA, "at most", "an arm told from itself at the nominal rate"),
    ),
)
SEED = 1998
PLANNED = 0.8


def main(argv: Sequence[str] | None = None) -> int:
    return run(ABOUT, measure, argv)


def measure(settings: Settings) -> Measured:
    found: dict[str, Rates] = {}
    parts = {**calibrating.PARTS, **calibrating_growth.PARTS}
    for number, (name, part) in enumerate(parts.items()):
        settings.progress(name)
        rng = np.random.default_rng([SEED, number])
        found |= {
            f"{name}.{kind}": rates
            for kind, rates in part(rng, 0.02 if settings.quick else 1.0).items()
        }
    return Measured(
        {name: told(rates) for name, rates in found.items()}, goals(found), {"seed": SEED}
    )


def told(rates: Rates) -> dict[str, Any]:
    """The worst of many settings, or each of few."""
    if len(rates) <= 8:
        return {name: round(rate, 4) for name, (rate, _) in rates.items()}
    worst = max(rates, key=lambda name: rates[name][0])
    rate, gates = rates[worst]
    return {
        "settings": len(rates),
        "gates": sum(count for _, count in rates.values()),
        "mean": round(sum(one for one, _ in rates.values()) / len(rates), 4),
        "worst": round(rate, 4),
        "worst_beyond_error": round(beyond_error(rate, gates), 4),
        "worst_at": worst,
    }


def goals(found: Mapping[str, Rates]) -> dict[str, float]:
    power = found["plan.power"]
    large = [pair for name, pair in power.items() if pairs_of(name) >= 200]
    short = [PLANNED - rate - 3 * error(rate, count) for rate, count in power.values()]
    return {
        "false_pass": worst_beyond_error(found, ".false_pass"),
        "false_alarm": worst_beyond_error(found, ".false_alarm"),
        "power_off": max(abs(rate - PLANNED) - 3 * error(rate, count) for rate, count in large),
        "power_short": max(0.0, *short),
        "aa_flagged": worst_beyond_error(found, ".flagged"),
    }


def worst_beyond_error(found: Mapping[str, Rates], ending: str) -> float:
    return max(
        beyond_error(*pair)
        for name, rates in found.items()
        if name.endswith(ending)
        for pair in rates.values()
    )


def pairs_of(name: str) -> int:
    """From `2 points, 6 % flips: 975 pairs`."""
    return int(name.rpartition(": ")[2].split()[0])


def error(rate: float, gates: int) -> float:
    return float(np.sqrt(rate * (1 - rate) / gates))


def beyond_error(rate: float, gates: int) -> float:
    return max(rate - 3 * error(rate, gates), 0.0)


if __name__ == "__main__":
    sys.exit(main())
