"""Answers that are text: equal, contains, pattern, number, choice, F1.

Where a row expects a list, any one of it is right.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from evals.dataset import value_of
from evals.item import Item
from policies.suite import Ignored, Scorer
from telemetry import Observation

SEARCHED_CHARS_MAX = 50_000  # of an answer, by patterns that people wrote
_ARTICLES = re.compile(r"\b(a|an|the)\b", re.IGNORECASE)
_PUNCTUATION = str.maketrans(
    "", "", string.punctuation + "\u201c\u201d\u2018\u2019«»\u2026\u2013\u2014"
)
_NUMBER = re.compile(
    "[-+\u2212]?(?:[0-9]{1,3}(?:[,\u202f][0-9]{3})+(?![0-9])|[0-9]+|(?=\\.[0-9]))"
    r"(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?%?"
)


def only_after(mark: str, seen: Observation) -> Observation:
    """Without what is said up to the last `mark`; whole where it does not occur."""
    _, found, rest = seen.text.rpartition(mark)
    return replace(seen, text=rest) if found else seen


def normal(text: str, ignore: Sequence[Ignored]) -> str:
    if "case" in ignore:
        text = text.casefold()
    if "punctuation" in ignore:
        text = text.translate(_PUNCTUATION)
    if "articles" in ignore:
        text = _ARTICLES.sub(" ", text)
    return " ".join(text.split()) if "space" in ignore else text


def wanted(scorer: Scorer, item: Item) -> list[Any]:
    """What is right, all of it."""
    expected = value_of(item, scorer.field)
    return expected if isinstance(expected, list) else [expected]


def exact(scorer: Scorer, item: Item, seen: Observation) -> float:
    got = normal(seen.text, scorer.ignore)
    return float(any(got == normal(str(one), scorer.ignore) for one in wanted(scorer, item)))


def contains(scorer: Scorer, item: Item, seen: Observation) -> float:
    """All of a list, or with `all: false` the share of it."""
    got = normal(seen.text, scorer.ignore)
    parts = wanted(scorer, item)
    share = sum(normal(str(one), scorer.ignore) in got for one in parts) / len(parts)
    return float(share == 1) if scorer.all else share


def regex(scorer: Scorer, item: Item, seen: Observation) -> float:
    """With a `pattern`: its first group, or all of its match, is what the row expects, if it
    expects anything. Without: the row's text is the pattern.
    """
    text = seen.text[:SEARCHED_CHARS_MAX]
    if scorer.pattern is None:
        return float(any(re.search(str(one), text) for one in wanted(scorer, item)))
    matches = list(re.finditer(scorer.pattern, text))
    if not matches:
        return 0.0
    if value_of(item, scorer.field) is None:
        return 1.0
    match = matches[0 if scorer.which == "first" else -1]
    found = (match[1] or "") if match.re.groups else match[0]
    ignore = scorer.ignore if "ignore" in scorer.model_fields_set else ()
    right = {normal(str(one).strip(), ignore) for one in wanted(scorer, item)}
    return float(normal(found.strip(), ignore) in right)


def numeric(scorer: Scorer, item: Item, seen: Observation) -> float:
    found = numbers(seen.text)
    if not found:
        return 0.0
    got = found[0 if scorer.which == "first" else -1]
    return float(any(close(got, one, scorer) for one in wanted(scorer, item)))


def close(got: float, expected: Any, scorer: Scorer) -> bool:
    """Within the tolerance. Of an expected text the last number counts, as in `... #### 42`."""
    if isinstance(expected, str):
        found = numbers(expected)
        if not found:
            return False
        expected = found[-1]
    return math.isclose(got, expected, rel_tol=scorer.relative, abs_tol=scorer.absolute)


def numbers(text: str) -> list[float]:
    """Every number in a text, `1,234.5` and `12%` too; 12% is 12."""
    found = []
    for match in _NUMBER.finditer(text[:SEARCHED_CHARS_MAX]):
        plain = re.sub("[,\u202f%]", "", match[0]).replace("\u2212", "-")
        before = text[match.start() - 1 : match.start()]
        # The hyphen of a range or a code, as in 2142-6111, is no sign.
        if plain[0] == "-" and before.isalnum():
            plain = plain[1:]
        found.append(float(plain))
    return found


def choice(scorer: Scorer, item: Item, seen: Observation) -> float:
    got = chosen(seen.text, scorer.choices)
    return float(got is not None and any(got == str(one).strip() for one in wanted(scorer, item)))


def chosen(text: str, choices: Sequence[str]) -> str | None:
    """Which choice an answer makes: what stands behind its last `answer is`, else what it begins
    with, else the only one that it names; None where it names none or several.
    """
    text = text[:SEARCHED_CHARS_MAX].strip()
    one_of = "|".join(re.escape(one) for one in sorted(choices, key=len, reverse=True))
    one = rf"\**[\(\[]?(?P<one>{one_of})[\)\]]?\**(?!\w)"
    said = list(re.finditer(rf"(?i:answer(?:\s+is)?\s*:?)\s*{one}", text))
    if said:
        return said[-1]["one"]
    first = re.match(one + r"(?=[\s.,:;)]|$)", text)
    if first and (len(text) == first.end() or text[first.end()] in ".,:;)\n"):
        return first["one"]
    named = {match["one"] for match in re.finditer(rf"(?<!\w){one}", text)}
    return named.pop() if len(named) == 1 else None


def f1(scorer: Scorer, item: Item, seen: Observation) -> float:
    """Overlap of words as SQuAD 1.1 counts it, the best of all expected answers. By default it
    also ignores case, punctuation and articles, as SQuAD does.
    """
    ignore = scorer.ignore
    if "ignore" not in scorer.model_fields_set:
        ignore = ("case", "punctuation", "articles", "space")
    got = normal(seen.text, ignore).split()
    return max(_overlap(got, normal(str(one), ignore).split()) for one in wanted(scorer, item))


def _overlap(got: list[str], expected: list[str]) -> float:
    if not got or not expected:
        return float(got == expected)
    common = sum((Counter(got) & Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(got), common / len(expected)
    return 2 * precision * recall / (precision + recall)
