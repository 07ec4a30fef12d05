"""Scores that need both arms' answers to a request: KL, and a judge that compares the two.

Run over all observations, after the last was made; `score` leaves these scorers out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from evals.dataset import Suite, scorer_takes
from evals.item import Item
from evals.pairs import BASELINE
from evals.scorers.judge import TIE, answer_of, compare
from evals.scorers.likelihood import divergence
from policies.suite import Scorer
from telemetry import Observation

CORRECT = "correct"
AT_ONCE = 8  # judgements
_Key = tuple[str, str, int]


def needs_pairs(scorers: Iterable[Scorer]) -> bool:
    return any(map(_is_paired, scorers))


async def score_pairs(
    suites: Mapping[str, Suite], observations: Sequence[Observation]
) -> tuple[Observation, ...]:
    """The same observations in the same order, with what a comparison of their answers says.

    `suites` by source, as `suite:NAME`. The baseline is compared with itself: it is a tie there,
    and no distance. A request that failed in the other arm only is lost to the baseline.
    """
    base = {_key(one): one for one in observations if one.arm == BASELINE}
    items = {(source, item.id): item for source, suite in suites.items() for item in suite.items}
    limit = asyncio.Semaphore(AT_ONCE)

    async def scored(seen: Observation) -> Observation:
        suite, item = suites.get(seen.source), items.get((seen.source, seen.id))
        other = base.get(_key(seen))
        if suite is None or item is None or other is None:
            return seen
        scores = dict(seen.scores)
        for scorer in filter(_is_paired, suite.scorers):
            if scorer_takes(scorer, item):
                async with limit:
                    scores |= await _scores(scorer, item, other, seen)
        first = next((one for one in suite.scorers if scorer_takes(one, item)), None)
        if first is not None and first.kind == "judge" and first.called in scores:
            scores[CORRECT] = scores[first.called]
        return replace(seen, scores=scores)

    return tuple(await asyncio.gather(*map(scored, observations)))


def _is_paired(scorer: Scorer) -> bool:
    return scorer.kind == "kl" or (scorer.kind == "judge" and scorer.against == "baseline")


async def _scores(
    scorer: Scorer, item: Item, baseline: Observation, seen: Observation
) -> dict[str, float]:
    if scorer.kind == "kl":
        if not (seen.ok and baseline.ok):
            return {}
        apart = divergence(baseline.logprobs or (), seen.logprobs or ())
        return {} if apart is None else {scorer.called: apart}
    if seen.arm == BASELINE:
        return {scorer.called: TIE if seen.ok else 0.0}
    if not seen.ok:
        return {scorer.called: 0.0}
    if not baseline.ok:
        return {scorer.called: 1.0}
    judged = await compare(scorer, item, answer_of(seen), answer_of(baseline))
    return judged.scores(scorer.called)


def _key(one: Observation) -> _Key:
    return one.source, one.id, one.repeat
