"""Scores of an answer, by what its suite says: `score` is the way in.

A scorer is a function of (Scorer, Item, Observation); knows no files and no arms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from evals.dataset import Suite, scorer_takes
from evals.item import Item
from evals.scorers import code, instructions, json_answers, judge, likelihood, text, tool_calls
from evals.scorers.bad_output import bad_output, refusal
from evals.scorers.paired import CORRECT, needs_pairs, score_pairs
from policies.suite import Scorer, ScorerKind
from telemetry import Observation

__all__ = ["CORRECT", "needs_pairs", "score", "score_pairs", "score_recorded"]

_Scored = Callable[[Scorer, Item, Observation], float]
_AT_ONCE: Mapping[ScorerKind, _Scored] = {
    "exact": text.exact,
    "contains": text.contains,
    "regex": text.regex,
    "numeric": text.numeric,
    "choice": text.choice,
    "f1": text.f1,
    "json": json_answers.valid,
    "fields": json_answers.fields,
    "tool_calls": tool_calls.called,
    "instructions": instructions.followed,
    "bad_output": lambda _scorer, item, seen: bad_output(item, seen),
    "refusal": lambda _scorer, _item, seen: refusal(seen),
}
_UNWANTED = ("bad_output", "refusal")  # of these 1 is the worst
_OF_THE_MODEL = ("perplexity", "kl")  # say nothing of a request that failed


async def score(suite: Suite, item: Item, seen: Observation) -> Mapping[str, float]:
    """Each scorer that takes the row, by its name, and `correct`.

    A request that failed is as wrong as can be. What a scorer cannot tell it leaves out.
    """
    scores: dict[str, float] = {}
    for scorer in suite.scorers:
        if not scorer_takes(scorer, item):
            continue
        said = await _scores(scorer, item, seen)
        scores |= said
        if scorer.called in said and scorer.kind not in (*_UNWANTED, *_OF_THE_MODEL):
            scores.setdefault(CORRECT, said[scorer.called])
    return scores


async def score_recorded(item: Item, seen: Observation) -> Mapping[str, float]:
    """What can be said of any answer: recorded traffic has no scorers. Where what was answered
    then is known, also how alike the two are (`f1`).
    """
    scores = {"bad_output": 1.0, "refusal": 0.0}
    if seen.ok:
        scores = {"bad_output": bad_output(item, seen), "refusal": refusal(seen)}
    if isinstance(item.expected, str | list) and item.expected:
        scores["f1"] = text.f1(Scorer(kind="f1"), item, seen) if seen.ok else 0.0
    return scores


async def _scores(scorer: Scorer, item: Item, seen: Observation) -> dict[str, float]:
    name = scorer.called
    if scorer.kind == "perplexity":
        value = likelihood.perplexity(seen)
        return {} if value is None else {name: value}
    if scorer.kind == "kl" or (scorer.kind == "judge" and scorer.against == "baseline"):
        return {}  # `score_pairs` has them
    if not seen.ok:
        return {name: 1.0 if scorer.kind == "bad_output" else 0.0}
    if scorer.after is not None:
        seen = text.only_after(scorer.after, seen)
    if scorer.kind == "judge":
        judged = await judge.against_expected(scorer, item, seen)
        return judged.scores(name)
    if scorer.kind == "code":
        return {name: await code.passes(scorer, item, seen)}
    return {name: _AT_ONCE[scorer.kind](scorer, item, seen)}
