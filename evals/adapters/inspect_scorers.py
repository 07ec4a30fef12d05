"""Scorers of inspect_ai in ours, and the tries by which it is seen whether both agree. Pure.

What inspect_ai's do is in its `scorer/`: `match`, `includes`, `pattern`, `answer`, `exact`, `f1`
and `choice`, at 0.3. What has no counterpart, or none that agrees, is left out and named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# inspect_ai's `_util/pattern.py`.
_ANSWERS: Mapping[str, str] = {
    "letter": r"(?is)ANSWER\s*:\s*([A-Za-z])(?:[^\w]|\n|$)(?!.*ANSWER\s*:)",
    "word": r"(?is)ANSWER\s*:\s*(\S+?)(?=[.,;:!?]?\s*(?:\n|$))(?!.*ANSWER\s*:)",
    "line": r"(?i)ANSWER\s*:\s*([^\n]+)\s*\Z",
}
_SEARCHED = ("match", "includes")  # by patterns that each row has
_EDGE = r"[\s!-/:-@\[-`{-~]*"  # space and punctuation, which `match` strips from both ends
# What it trims from a word or leaves out of it before it reads a number.
_LOOSE = r"[!?:;()\[\]{}'\"`$€£*_,]*"
_BEFORE, _BEHIND = r"(?:^|(?<=\s))", r"(?=\s|$)"
_NUMBER = rf"{_BEFORE}{_LOOSE}[-+\u2212]?[0-9,]*\.?[0-9][0-9.,]*{_LOOSE}{_BEHIND}"
_SQUAD = ("case", "punctuation", "articles", "space")


@dataclass(frozen=True, slots=True)
class Theirs:
    """A scorer as a log tells it; `metric` names it among the task's scorers, in ours."""

    kind: str
    name: str  # as its samples have it
    options: Mapping[str, Any]
    metric: str

    @property
    def short(self) -> str:
        return self.kind.rpartition("/")[2]

    @property
    def field(self) -> str:
        """Of the rows, with their patterns for it."""
        return f"inspect_{self.metric}"

    @property
    def ours(self) -> dict[str, Any]:
        """As a suite file has it; `{}` where there is none."""
        found = self._kind()
        return found and (found if self.metric == found["kind"] else {**found, "name": self.metric})

    def _kind(self) -> dict[str, Any]:
        options, short = self.options, self.short
        cased = {} if options.get("ignore_case", True) is False else {"ignore": ["case", "space"]}
        if short in _SEARCHED:
            return {"kind": "regex", "field": self.field}
        if short == "pattern" and isinstance(options.get("pattern"), str):
            pattern = ("(?i)" if cased else "") + options["pattern"]
            return {"kind": "regex", "pattern": pattern, "which": "first", **cased}
        if short == "answer" and options.get("pattern") in _ANSWERS:
            return {"kind": "regex", "pattern": _ANSWERS[options["pattern"]], "which": "first",
                    "ignore": ["case", "space"]}  # fmt: skip
        if short == "choice":
            return {"kind": "regex", "pattern": _ANSWERS["letter"], "which": "first"}
        if short == "exact":
            return {"kind": "exact", "ignore": list(_SQUAD)}
        return {"kind": "f1"} if short == "f1" and not options else {}

    def row_fields(self, targets: Sequence[str]) -> dict[str, Any]:
        """What a row needs beside `expected`: where it searches, a pattern for each target."""
        if self.short not in _SEARCHED:
            return {}
        return {self.field: [_pattern(self.short, self.options, one) for one in targets]}


def theirs(scorers: Sequence[Mapping[str, Any]]) -> list[Theirs]:
    """Of a log's header. Two of one kind are told apart by a number, as in its samples."""
    seen: Counter[str] = Counter()
    found = []
    for one in scorers:
        name = str(one.get("name"))
        count = seen[name]
        seen[name] += 1
        short = re.sub(r"[^a-z0-9_]+", "_", name.rpartition("/")[2].lower()).strip("_") or "score"
        metric = f"{short}{count}" if count else short
        named = f"{name}{count}" if count else name
        found.append(Theirs(name, named, one.get("options") or {}, metric))
    return found


def _pattern(short: str, options: Mapping[str, Any], target: str) -> str:
    flags = "(?s)" if options.get("ignore_case", True) is False else "(?is)"
    if short == "includes":
        return flags + re.escape(target)
    place = options.get("location", "end")
    if options.get("numeric") and (number := _digits(target)):
        return _number_pattern(number, place)
    bare = re.escape(target.strip().strip("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"))
    begin = "" if place in ("end", "any") else r"\A" + _EDGE
    end = "" if place in ("begin", "any") else _EDGE + r"\Z"
    return f"{flags}{begin}{bare}{end}"


def _digits(target: str) -> re.Match[str] | None:
    """Sign, whole and fraction of a target that is a number."""
    plain = re.sub(r"[,$€£*_\s]", "", target).strip("!?:;()[]{}'\"`").replace("\u2212", "-")
    return re.fullmatch(r"([-+]?)0*([0-9]+)(?:\.([0-9]*?)0*)?", plain)


def _number_pattern(number: re.Match[str], place: str) -> str:
    """Finds the number as the first, the last, or any word that is one."""
    sign, whole, fraction = number.groups()
    minus = r"[-\u2212]" if sign == "-" else r"\+?"
    part = rf"\.{fraction}0*\.?" if fraction else r"(?:\.0*)?"
    digits = ",?".join(whole)
    right = rf"{_BEFORE}{_LOOSE}{minus}{_LOOSE}0*{digits}{part}{_LOOSE}{_BEHIND}"
    if place == "begin":
        return rf"(?s)\A(?:(?!{_NUMBER}).)*{right}"
    if place == "exact":
        return rf"(?s)\A\s*{right}\s*\Z"
    return rf"(?s){right}" + ("" if place == "any" else rf"(?!.*{_NUMBER})")


def tries(targets: Sequence[str], wrong: str) -> list[str]:
    """Answers by which two scorers show whether they are the same: right ones in several forms,
    wrong ones, both at once, none."""
    right = targets[0]
    both = (
        f"ANSWER: {wrong}\n\nANSWER: {right}",
        f"Not {right} but {wrong}",
        f"{wrong}, so {right}!",
    )
    said = f"The answer is {right}.", f"ANSWER: {right}", f"{right}\n\nThat is all.", f"**{right}**"
    return [right, right.upper(), *said, wrong, f"ANSWER: {wrong}", *both, f"x{right}", ""]
