"""Several changes together: what each adds to the others, and whether they get in each other's way.

A verdict is of a whole configuration, so passes of A and of B say nothing of both. All of them are
set against the baseline, and against all but one, for each one. Pure; knows no server.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from evals import ratios, shares
from evals.battery import answer, null_of
from evals.pairs import BASELINE, CANDIDATE, Pair, by_arm, by_source, pair
from evals.questions import Question, questions
from evals.stats.divergence import mean_below
from evals.stats.estimate import TooFewClusters
from evals.stats.ratio import block_t
from policies.hypothesis import Hypothesis, Stats
from telemetry import Observation

FULL = CANDIDATE  # the arm with every change
TOGETHER = "together"
_JUDGED = ("share", "flip", "time", "rate", "tokens", "drift")


@dataclass(frozen=True, slots=True)
class Effect:
    """Difference or ratio of two arms in one metric, with one-sided bounds at alpha each; None
    where too few independent units tell, and `why`.
    """

    source: str
    metric: str
    of: str  # a hypothesis, or all of them
    unit: Literal["difference", "ratio", "share"]
    pairs: int
    estimate: float | None
    low: float | None
    high: float | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Matrix:
    """`total`: all changes against none. `marginal`: all against all but one. `interaction`: the
    sum of the marginals less the total, which is what changes do only together: 0 (or a ratio of 1)
    where each adds what it adds alone.
    """

    names: tuple[str, ...]
    alpha: float
    total: tuple[Effect, ...]
    marginal: tuple[Effect, ...]
    interaction: tuple[Effect, ...]

    def payload(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """A line a metric and change, then all together, then what they do only together."""
        lines: list[str] = []
        for one in self.total:
            key = (one.source, one.metric)
            lines.append(f"{one.source.partition(':')[2]} {one.metric}")
            parts = [each for each in self.marginal if (each.source, each.metric) == key]
            left = [each for each in self.interaction if (each.source, each.metric) == key]
            lines += [f"  {each.of:<32}{_said(each)}" for each in parts]
            lines += [f"  {'all together':<32}{_said(one)}"]
            lines += [f"  {'only together':<32}{_said(each)}" for each in left]
        return "\n".join(lines)


def without(name: str) -> str:
    """The arm that has every change but one."""
    return f"without {name}"


def arms_of(names: Sequence[str]) -> tuple[str, ...]:
    """None, all, and all but each: k + 2 arms for k changes."""
    return (BASELINE, FULL, *(without(name) for name in names))


def matrix(hypotheses: Sequence[Hypothesis], observations: Iterable[Observation]) -> Matrix:
    """Of observations whose arms are those of `arms_of`. Raises Unanswerable, DuplicateRows."""
    arms = by_arm(observations)
    stats = hypotheses[0].stats.model_copy(update={"mode": "fixed"})
    names = tuple(one.name for one in hypotheses)
    full = arms.get(FULL, [])
    whole = pair(arms.get(BASELINE, []), full)
    parts = {name: pair(arms.get(without(name), []), full) for name in names}
    asked = _asked(hypotheses)
    return Matrix(
        names=names,
        alpha=stats.alpha,
        total=tuple(_effect(one, whole, stats, TOGETHER) for one in asked),
        marginal=tuple(_effect(one, parts[name], stats, name) for one in asked for name in names),
        interaction=tuple(_interaction(one, whole, parts, stats) for one in asked),
    )


def _asked(hypotheses: Sequence[Hypothesis]) -> list[Question]:
    """Each metric of each source once, whichever of the hypotheses names it."""
    found: dict[tuple[str, str], Question] = {}
    for hypothesis in hypotheses:
        for question in questions(hypothesis):
            if question.metric.kind in _JUDGED:
                null = null_of(question)
                found.setdefault((null.source, null.metric.name), null)
    return list(found.values())


def _effect(question: Question, pairs: Sequence[Pair], stats: Stats, of: str) -> Effect:
    rows = by_source(pairs).get(question.source, ())
    if question.metric.kind == "drift":
        return _drift(question, rows, stats, of)
    finding = answer(question, rows, stats)
    return Effect(
        source=question.source,
        metric=question.metric.name,
        of=of,
        unit=finding.unit,
        pairs=len(rows),
        estimate=finding.estimate,
        low=finding.low,
        high=finding.high,
        why=str(finding.detail.get("why", "")),
    )


def _drift(question: Question, pairs: Sequence[Pair], stats: Stats, of: str) -> Effect:
    """Of what is not bounded: KL of the baseline's law, perplexity; of what both arms answered."""
    one = Effect(question.source, question.metric.name, of, "share", len(pairs), None, None, None)
    changes = _by_item(question, pairs).values()
    if not changes:
        return one
    try:
        diffs, clusters = zip(*changes, strict=True)
        found = mean_below(np.array(diffs), 1.0, clusters, stats.alpha)
    except TooFewClusters as error:
        return replace(one, why=str(error))
    return replace(one, estimate=found.estimate, low=found.low, high=found.high)


def _interaction(
    question: Question, whole: Sequence[Pair], parts: Mapping[str, Sequence[Pair]], stats: Stats
) -> Effect:
    """Item by item, or block by block, so that what all arms share cancels."""
    none = _effect(question, (), stats, "interaction")  # of no pairs: nothing, in the right unit
    kind = question.metric.kind
    values = _by_block if kind in ("time", "rate") else _by_item
    total = values(question, _of(whole, question))
    each = [values(question, _of(rows, question)) for rows in parts.values()]
    keys = sorted(set(total).intersection(*each))
    if not keys:
        return none
    left = [math.fsum(part[key][0] for part in each) - total[key][0] for key in keys]
    clusters = [total[key][1] for key in keys]
    try:
        if kind in ("time", "rate"):
            found = block_t(left, 1.0, stats.alpha)
        else:
            found = mean_below(np.array(left), 1.0, clusters, stats.alpha)
    except TooFewClusters as error:
        return replace(none, why=str(error))
    bounds = (found.estimate, found.low, found.high)
    if kind == "tokens":
        bounds = (math.exp(bounds[0]), math.exp(bounds[1]), math.exp(bounds[2]))
    return replace(none, pairs=len(keys), estimate=bounds[0], low=bounds[1], high=bounds[2], why="")


def _of(pairs: Sequence[Pair], question: Question) -> tuple[Pair, ...]:
    return by_source(pairs).get(question.source, ())


def _by_item(question: Question, pairs: Sequence[Pair]) -> dict[str, tuple[float, str]]:
    """Change of each item, and its cluster."""
    if question.metric.kind == "tokens":
        return {one.id: (one.log, one.cluster) for one in ratios.counted(question.metric, pairs)}
    if question.metric.kind == "drift":
        pairs = [one for one in pairs if one.complete]
    return {
        one.id: (one.candidate - one.baseline, one.cluster)
        for one in shares.units(question.metric, pairs)
    }


def _by_block(question: Question, pairs: Sequence[Pair]) -> dict[str, tuple[float, str]]:
    """Log ratio of each block, known by the one that the full stack ran it in."""
    blocks: dict[int, list[Pair]] = {}
    for one in pairs:
        blocks.setdefault(one.candidate.block, []).append(one)
    found = {}
    for block, rows in blocks.items():
        logs = ratios.block_logs(question.metric, rows)
        if len(logs) == 1:
            found[f"{block:09}"] = (logs[0], f"{block:09}")
    return found


def _said(effect: Effect) -> str:
    if effect.estimate is None or effect.low is None or effect.high is None:
        return effect.why or "nothing measured"
    if effect.unit == "ratio":
        return "{:+.1f} % [{:+.1f}, {:+.1f}]".format(
            *(100 * (one - 1) for one in (effect.estimate, effect.low, effect.high))
        )
    if effect.unit == "share":  # unbounded: no points
        return f"{effect.estimate:+.4g} [{effect.low:+.4g}, {effect.high:+.4g}]"
    return "{:+.2f} points [{:+.2f}, {:+.2f}]".format(
        *(100 * one for one in (effect.estimate, effect.low, effect.high))
    )
