"""Answers that should be the same -> an estimate: how often they are not, beyond what chance does.

Servers that batch do not repeat themselves to the bit; how often the baseline differs from itself
is the floor that the candidate is held against. Knows no decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from evals.pairs import Pair
from evals.questions import Question
from evals.shares import Answer, NotMeasured, negated
from evals.stats.divergence import divergence, law_distance, same_law
from evals.stats.estimate import Estimate
from evals.stats.rates import cluster_rate
from policies.hypothesis import Stats
from telemetry import Observation

SAME_LAW = "p_same_law"  # in the detail of a distance: of "both draw by the same law"
SELDOM = 0.5  # of the margin: what the baseline does to itself is small beside it


def identical(
    question: Question, pairs: Sequence[Pair], floor: Sequence[Pair], stats: Stats
) -> Answer:
    """Share of answers that differ. Where the baseline never differs from itself, the share is
    bounded by itself, and where one of the floor's requests differs it does not pass. Where it
    seldom does, the share is bounded by itself, too, over all requests, which are more than the
    floor's: what is below the margin is below it whatever the floor is. Else its excess over the
    floor is bounded, on the floor's requests. Which of these it is, the floor alone says.

    Raises TooFewClusters.
    """
    noise = {_key(one): differs(one) for one in floor}
    differ = [differs(one) for one in pairs]
    both = [(one, differs(one), noise[_key(one)]) for one in pairs if _key(one) in noise]
    rate, own = sum(differ) / len(pairs), sum(moved for _, _, moved in both)
    detail = {"floor_pairs": len(both), "floor_differ": own}
    broken = {one.cluster for one, moved, _ in both if moved and one.complete} if not own else set()
    found = identity(
        own,
        len(both),
        len(broken),
        question.bound,
        lambda: _rate(differ, pairs, question, stats),
        lambda: _excess(both, question, stats),
    )
    if not own:
        if broken:
            again = sum(moved and one.complete for one, moved, _ in both)
            detail["differ_where_identical"] = again
        return Answer(_with(found, detail), 0.0 if both else None, rate, sum(differ), 0)
    lost = sum(moved and not chance for _, moved, chance in both)
    gained = sum(chance and not moved for _, moved, chance in both)
    return Answer(_with(found, detail), own / len(both), rate, lost, gained)


def identity(
    own: int,
    of: int,
    broken: int,
    margin: float,
    rate: Callable[[], Estimate],
    excess: Callable[[], Estimate],
) -> Estimate:
    """What decides whether answers are the same: `rate` of those that differ, `excess` over the
    floor, or neither. The floor alone says which: it differs from itself in `own` `of` its
    requests. `broken`: clusters of these in which the candidate differs.
    """
    if not own:
        found = rate()
        if not broken:
            return found
        # The same requests, asked of the baseline again, were answered to the letter. If chance
        # did it, each cluster of them would have been as likely there.
        return replace(found, p=1.0, p_harm=0.5**broken, method="identity")
    found = excess()
    if own / of > margin * SELDOM:
        return found
    by_rate = rate()
    return replace(
        found,
        estimate=min(found.estimate, by_rate.high),
        high=by_rate.high,
        p=by_rate.p,
        n=by_rate.n,
        method=f"{by_rate.method}, {found.method}",
    )


def _excess(both: Sequence[tuple[Pair, bool, bool]], question: Question, stats: Stats) -> Estimate:
    found = divergence(
        [moved for _, moved, _ in both],
        [chance for _, _, chance in both],
        -question.bound,
        [one.cluster for one, _, _ in both],
        stats.alpha,
    )
    return negated(found)


def _rate(
    differ: Sequence[bool], pairs: Sequence[Pair], question: Question, stats: Stats
) -> Estimate:
    values = np.array(differ, dtype=np.float64)
    return cluster_rate(values, [one.cluster for one in pairs], question.bound, stats.alpha)


def law(question: Question, pairs: Sequence[Pair], stats: Stats) -> Answer:
    """How far the laws are apart by which both arms draw an answer's first token, its prompt being
    asked again and again (`design.repeats`) at a temperature above 0. A failure is a token, too.

    Raises NotMeasured where nothing was asked twice, TooFewClusters.
    """
    draws: dict[str, tuple[list[int], list[int], str]] = {}
    numbers: dict[object, int] = {}
    for one in pairs:
        left, right, _ = draws.setdefault(one.id, ([], [], one.cluster))
        for drawn, seen in ((left, one.baseline), (right, one.candidate)):
            drawn.append(numbers.setdefault(_first_token(seen), len(numbers)))
    known = [one for one in draws.values() if len(one[0]) > 1]
    if not known:
        raise NotMeasured(question.metric.name)
    lefts, rights, clusters = zip(*known, strict=True)
    found = law_distance(lefts, rights, question.bound, stats.alpha, clusters)
    same = same_law(lefts, rights, np.random.default_rng(stats.seed))
    return Answer(replace(found, detail={**found.detail, SAME_LAW: same}))


def _first_token(seen: Observation) -> object:
    if not seen.ok:
        return seen.outcome, "failed"
    return seen.token_ids[0] if seen.token_ids else seen.text


def differs(pair: Pair) -> bool:
    """Token by token where both arms tell them, else by text and tool calls, of which a server
    makes up the ids; failures differ.
    """
    left, right = pair.baseline, pair.candidate
    if not pair.complete:
        return True
    if left.token_ids is not None and right.token_ids is not None:
        return left.token_ids != right.token_ids
    return (left.text, _calls(left)) != (right.text, _calls(right))


def _calls(seen: Observation) -> list[object]:
    return [call.get("function", call) for call in seen.tool_calls]


def _key(pair: Pair) -> tuple[str, str, int]:
    return pair.source, pair.id, pair.baseline.repeat


def _with(found: Estimate, detail: dict[str, int]) -> Estimate:
    return replace(found, detail={**found.detail, **detail})
