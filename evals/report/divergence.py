"""How long answers stay the same: Kaplan-Meier of the first token that differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evals.pairs import AA, CANDIDATE, Pair
from evals.report.answers import paired
from evals.report.markup import Markup
from evals.report.plot import Axis, Plot, Point, figure, legend
from evals.report.words import NBSP
from evals.stats.divergence import Curve, first_divergence, kaplan_meier
from telemetry import Observation

_ARMS = ((CANDIDATE, "candidate"), (AA, "A/A′, the baseline against itself"))


@dataclass(frozen=True, slots=True)
class Survival:
    """One arm against the baseline, watched up to `longest` tokens."""

    arm: str
    curve: Curve
    diverged: int
    answers: int
    longest: int


def divergences(rows: Sequence[Observation], alpha: float = 0.05) -> Markup:
    """The candidate's curve over that of the baseline against itself."""
    pairs = {arm: paired(rows, arm=arm) for arm, _ in _ARMS}
    found = [
        (survival(arm, pairs[arm], alpha), said)
        for arm, said in _ARMS
        if any(one.complete for one in pairs[arm])
    ]
    if not found or found[0][0].arm != CANDIDATE:
        return Markup()
    longest = max(one.longest for one, _ in found)
    low = max(0.0, min(min(one.curve.low) for one, _ in found) - 0.02)
    plot = Plot(Axis(0, max(longest, 1)), Axis(min(low, 0.9), 1, unit=f"{NBSP}%", scale=100))
    first = found[0][0]
    lower, upper = (
        _stairs(first.curve.tokens, ends, first.longest)
        for ends in (first.curve.low, first.curve.high)
    )
    marks = [plot.band(lower, upper, CANDIDATE)]
    marks += [
        plot.curve(_stairs(one.curve.tokens, one.curve.share, one.longest), one.arm)
        for one, _ in reversed(found)
    ]
    entries = [
        (one.arm, f"{said}: {one.diverged:,} of {one.answers:,} diverged") for one, said in found
    ]
    tokens = any(row.token_ids for row in rows)
    return figure(
        "First difference between answers",
        plot.drawn(
            *marks, label="; ".join(said for _, said in entries),
            x_name=f"{'tokens' if tokens else 'words'} since the answer began",
            y_name="answers still the same",
        ),
        legend(*entries),
        "An answer that ended without a difference was watched up to its end (Kaplan-Meier); the "
        f"band is the {100 * (1 - 2 * alpha):g}{NBSP}% interval.",
    )  # fmt: skip


def survival(arm: str, pairs: Sequence[Pair], alpha: float = 0.05) -> Survival:
    """Over pairs that both answered."""
    same = [first_difference(one) for one in pairs if one.complete]
    lengths = [length for length, _ in same]
    differs = [diverged for _, diverged in same]
    curve = kaplan_meier(lengths, differs, alpha)
    return Survival(arm, curve, sum(differs), len(same), max(lengths))


def first_difference(pair: Pair) -> tuple[int, bool]:
    """How many tokens, else words, were the same, and whether a difference ended that."""
    both = (pair.baseline, pair.candidate)
    before: Sequence[object]
    after: Sequence[object]
    if all(row.token_ids is not None for row in both):
        before, after = (row.token_ids or () for row in both)
    else:
        before, after = (row.text.split() for row in both)
    place = first_divergence(before, after)
    return (len(before), False) if place is None else (place, True)


def _stairs(tokens: Sequence[int], shares: Sequence[float], longest: int) -> list[Point]:
    points = [(0.0, 1.0)]
    for place, share in zip(tokens, shares, strict=True):
        points += [(place, points[-1][1]), (place, share)]
    return [*points, (longest, points[-1][1])]
