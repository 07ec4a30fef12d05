"""What became of each answer: right or wrong in both arms, which were lost worst, how texts differ.

Knows pairs of observations, not how they were judged or are shown.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from evals.metrics import Metric, metric, share_of
from evals.pairs import BASELINE, CANDIDATE, Pair, by_arm, pair, pair_control
from evals.verdict import Verdict
from telemetry import Observation

Fate = Literal["lost", "gained", "wrong", "right"]
Part = tuple[Literal["same", "gone", "new"], str]
# Answers are compared by words up to here; comparing costs the square of it.
_WORDS = 400
_WORD = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Lost:
    """An item that the candidate got wrong, with the pair that shows it best and its scores."""

    pair: Pair
    before: float
    after: float


def paired(rows: Iterable[Observation], source: str = "", arm: str = CANDIDATE) -> list[Pair]:
    """Requests of both arms in the order in which they were sent; of a control, those it has."""
    arms = by_arm(row for row in rows if not source or row.source == source)
    make = pair if arm == CANDIDATE else pair_control
    pairs = make(arms.get(BASELINE, ()), arms.get(arm, ()))
    return sorted(pairs, key=lambda one: one.baseline.at_s)


def judged(verdict: Verdict) -> list[tuple[str, Metric]]:
    """Source and metric of each suite whose answers are right or wrong, each once."""
    found: dict[tuple[str, str], Metric] = {}
    for one in verdict.findings:
        read = metric(one.metric)
        if read.kind == "flip":
            read = metric("correct")
        if one.lost is not None and read.scorer:
            found[one.source, read.name] = read
    return [(source, read) for (source, _), read in found.items()]


def score(row: Observation, by: Metric) -> float:
    """From 0, wrong or failed, to 1: of scores of which less is better, what is left to one."""
    value = share_of(by, row) or 0.0
    return value if by.better == "higher" else 1 - value


def scored(pairs: Sequence[Pair], by: Metric) -> bool:
    """Whether any answer has that score."""
    return any(by.scorer in row.scores for one in pairs for row in (one.baseline, one.candidate))


def fates(pairs: Sequence[Pair], by: Metric) -> Mapping[Fate, int]:
    """How many pairs there are of each fate, all four named."""
    counts: dict[Fate, int] = {"lost": 0, "gained": 0, "wrong": 0, "right": 0}
    for one in pairs:
        counts[fate(one, by)] += 1
    return counts


def fate(one: Pair, by: Metric) -> Fate:
    """Right from a score of one half on."""
    before, after = (score(row, by) >= 0.5 for row in (one.baseline, one.candidate))
    if before:
        return "right" if after else "lost"
    return "gained" if after else "wrong"


def worst(pairs: Sequence[Pair], by: Metric, count: int) -> list[Lost]:
    """Items that lost most, over their repeats; the pair that lost stands for the item."""
    items: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for one in pairs:
        items[one.source, one.id].append(one)
    found = []
    for group in items.values():
        before, after = (
            fmean(score(getattr(one, arm), by) for one in group)
            for arm in ("baseline", "candidate")
        )
        if before > after:
            shown = max(group, key=lambda one: _fall(one, by))
            found.append(Lost(shown, before, after))
    # Of equal losses those come first that failed outright, then the ones that differ most.
    found.sort(key=lambda lost: (lost.after - lost.before, lost.pair.candidate.ok, _alike(lost)))
    return found[:count]


def _fall(one: Pair, by: Metric) -> float:
    return score(one.baseline, by) - score(one.candidate, by)


def _alike(lost: Lost) -> float:
    one, two = _words(lost.pair.baseline.text), _words(lost.pair.candidate.text)
    return difflib.SequenceMatcher(None, one, two, autojunk=False).quick_ratio()


def difference(before: str, after: str) -> tuple[list[Part], list[Part]]:
    """Both texts in parts: what is the same, what is gone from the first, new in the second."""
    one, two = _words(before), _words(after)
    matcher = difflib.SequenceMatcher(None, one, two, autojunk=False)
    left: list[Part] = []
    right: list[Part] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            left.append(("same", "".join(one[a:b])))
            right.append(("same", "".join(two[c:d])))
            continue
        if b > a:
            left.append(("gone", "".join(one[a:b])))
        if d > c:
            right.append(("new", "".join(two[c:d])))
    return left, right


def _words(text: str) -> list[str]:
    """Words, spaces and marks; what follows the first few hundred is one last word."""
    words: list[str] = []
    for match in _WORD.finditer(text):
        if len(words) == _WORDS:
            return [*words, text[match.start() :]]
        words.append(match[0])
    return words
