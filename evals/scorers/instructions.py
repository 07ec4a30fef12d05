"""Constraints on the form of an answer that a program can check, as in IFEval (Zhou et al. 2023).

A row has `instruction_id_list` and `kwargs`, as IFEval's have, or expects a list of `{"id": ...,
...}`. Sentences and languages are told by rules of ours, where the original uses nltk and
langdetect: scores are comparable between two arms, not with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from evals.dataset import value_of
from evals.item import Item
from evals.scorers.languages import is_in
from policies.suite import Scorer
from telemetry import Observation

_Arguments = Mapping[str, Any]
_Check = Callable[[str, _Arguments], bool]
_WORD = re.compile("\\b[\\w'\u2019-]+\\b")
_SENTENCE = re.compile("[.!?\u2026\u3002\uff01\uff1f]+(?=[\\s\"'\u201d\u2019)\\]*]|$)")
_BULLET = re.compile(r"^\s*(?:\*[^*\n]|-\s|•).*$", re.MULTILINE)
_HIGHLIGHT = re.compile(r"\*\*[^*\n]+\*\*|\*[^*\n]+\*")


class UnknownInstruction(ValueError):
    """A constraint that there is no check for."""


def followed(scorer: Scorer, item: Item, seen: Observation) -> float:
    """All of a row's constraints, or with `all: false` the share of them."""
    kept = [CHECKS[name](seen.text, arguments) for name, arguments in wanted(scorer, item)]
    share = sum(kept) / len(kept)
    return float(share == 1) if scorer.all else share


def wanted(scorer: Scorer, item: Item) -> list[tuple[str, _Arguments]]:
    """The constraints of a row. Raises UnknownInstruction, ValueError for another shape."""
    names, arguments = item.meta.get("instruction_id_list"), item.meta.get("kwargs")
    expected = value_of(item, scorer.field)
    if names is None:
        listed = expected if isinstance(expected, list) else [expected]
        if not listed or not all(isinstance(one, dict) and "id" in one for one in listed):
            raise ValueError(
                "expected a list of constraints such as {'id': 'punctuation:no_comma'}"
            )
        names, arguments = [one["id"] for one in listed], listed
    if not names or not isinstance(arguments, list) or len(arguments) != len(names):
        raise ValueError("expected as many `kwargs` as `instruction_id_list` has entries")
    for name in names:
        if name not in CHECKS:
            raise UnknownInstruction(str(name))
    return list(zip(names, arguments, strict=True))


def _relation(count: int, arguments: _Arguments, limit: str, relation: str = "relation") -> bool:
    wanted = int(arguments[limit])
    return count < wanted if arguments.get(relation) == "less than" else count >= wanted


def _word_count(text: str, word: str) -> int:
    return len(re.findall(rf"\b{re.escape(word)}\b", text, re.IGNORECASE))


def _paragraphs(text: str) -> list[str]:
    return [one.strip() for one in re.split(r"\s?\*\*\*\s?", text) if one.strip()]


def _nth_paragraph(text: str, arguments: _Arguments) -> bool:
    parts = [one.strip() for one in text.split("\n\n") if one.strip()]
    at = int(arguments["nth_paragraph"]) - 1
    if len(parts) != int(arguments["num_paragraphs"]) or at >= len(parts):
        return False
    first = _WORD.search(parts[at])
    return first is not None and first[0].lower() == str(arguments["first_word"]).lower()


def _sections(text: str, arguments: _Arguments) -> bool:
    mark = re.escape(str(arguments["section_spliter"]))
    found = re.findall(rf"^\W*{mark}\s?\d+", text, re.MULTILINE)
    return len(found) >= int(arguments["num_sections"])


def _json(text: str, _arguments: _Arguments) -> bool:
    inner = re.sub(r"^```(?:json|JSON|Json)?|```$", "", text.strip()).strip()
    try:
        orjson.loads(inner)
    except orjson.JSONDecodeError:
        return False
    return True


def _two_responses(text: str, _arguments: _Arguments) -> bool:
    parts = [one.strip() for one in text.split("******")]
    parts = [one for at, one in enumerate(parts) if one or 0 < at < len(parts) - 1]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _constrained(text: str, _arguments: _Arguments) -> bool:
    allowed = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
    return any(one in text for one in allowed)


def _capital_words(text: str, arguments: _Arguments) -> bool:
    count = sum(word.isupper() for word in _WORD.findall(text))
    return _relation(count, arguments, "capital_frequency", "capital_relation")


def _letters(text: str, arguments: _Arguments) -> bool:
    count = text.lower().count(str(arguments["letter"]).lower())
    return _relation(count, arguments, "let_frequency", "let_relation")


def _postscript(text: str, arguments: _Arguments) -> bool:
    mark = str(arguments["postscript_marker"])
    letters = [re.escape(one) for one in mark if one.isalpha()]
    loose = r"\.?\s?".join(letters)
    return re.search(rf"^\s*{loose}", text, re.IGNORECASE | re.MULTILINE) is not None


def _sentences(text: str, arguments: _Arguments) -> bool:
    return _relation(len(_SENTENCE.findall(text)), arguments, "num_sentences")


def _repeated(text: str, arguments: _Arguments) -> bool:
    prompt = str(arguments["prompt_to_repeat"]).strip().lower()
    return text.strip().lower().startswith(prompt)


def _ends(text: str, arguments: _Arguments) -> bool:
    end = str(arguments["end_phrase"]).strip().lower()
    return text.strip().strip('"').lower().endswith(end)


def _all_in(text: str, words: list[str]) -> bool:
    return all(_word_count(text, one) for one in words)


CHECKS: Mapping[str, _Check] = {
    "punctuation:no_comma": lambda text, _: "," not in text,
    "keywords:existence": lambda text, given: _all_in(text, given["keywords"]),
    "keywords:forbidden_words": lambda text, given: (
        not any(_word_count(text, one) for one in given["forbidden_words"])
    ),
    "keywords:frequency": lambda text, given: _relation(
        _word_count(text, given["keyword"]), given, "frequency"
    ),
    "keywords:letter_frequency": _letters,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_words": lambda text, given: _relation(
        len(_WORD.findall(text)), given, "num_words"
    ),
    "length_constraints:number_paragraphs": lambda text, given: (
        len(_paragraphs(text)) == int(given["num_paragraphs"])
    ),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_format:number_highlighted_sections": lambda text, given: (
        len(_HIGHLIGHT.findall(text)) >= int(given["num_highlights"])
    ),
    "detectable_format:number_bullet_lists": lambda text, given: (
        len(_BULLET.findall(text)) == int(given["num_bullets"])
    ),
    "detectable_format:title": lambda text, _: any(
        one.strip(" <>") for one in re.findall(r"<<[^\n]+>>", text)
    ),
    "detectable_format:json_format": _json,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:multiple_sections": _sections,
    "detectable_content:number_placeholders": lambda text, given: (
        len(re.findall(r"\[[^\]\n]+\]", text)) >= int(given["num_placeholders"])
    ),
    "detectable_content:postscript": _postscript,
    "change_case:english_lowercase": lambda text, _: text == text.lower(),
    "change_case:english_capital": lambda text, _: text == text.upper(),
    "change_case:capital_word_frequency": _capital_words,
    "combination:repeat_prompt": _repeated,
    "combination:two_responses": _two_responses,
    "startend:quotation": lambda text, _: (
        len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'
    ),
    "startend:end_checker": _ends,
    "language:response_language": lambda text, given: is_in(str(given["language"]), text),
}
