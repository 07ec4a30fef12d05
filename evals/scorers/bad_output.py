"""Answers that nobody wants, whatever was asked: empty, looped, unprintable, cut off, broken JSON.

Knows no expected answer; works on recorded traffic too. `problem_with` says which it is.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from typing import Any

import orjson

from evals.item import Item
from telemetry import Observation

UNPRINTABLE_SHARE = 0.02
LOOP_CHARS_MIN = 120  # what repeats covers at least so much,
LOOP_TIMES_MIN = 4  # and comes at least so often, at the answer's end
LOOP_UNIT_CHARS_MAX = 400
DENSE_CHARS_MIN = 800  # of text this long,
DENSE_RATIO = 0.08  # so much is left by zlib only of what repeats itself
# How a refusal begins; English, as in the harnesses that look for it (AdvBench and others).
_REFUSAL = re.compile(
    r"^\W*(?:i(?:'m| am)(?: very| really)? sorry|sorry|apologies|i apologi[sz]e|unfortunately)?"
    r"[\s,.;:!—-]*(?:but\s+)?(?:as an? (?:ai|language model)\b.{0,80}?)?"
    r"(?:i (?:cannot|can't|can not|won't|will not|am unable to|am not able to|'m unable to)"
    r"|i'm (?:unable|not able) to)\s+(?:help|assist|comply|fulfil|fulfill|provide|answer|create"
    r"|write|do that|support|continue|engage|discuss|share|generate)",
    re.IGNORECASE,
)


def bad_output(item: Item, seen: Observation) -> float:
    return float(problem_with(item, seen) is not None)


def problem_with(item: Item, seen: Observation) -> str | None:
    """Why nobody wants this answer, in a word, or None."""
    text = seen.text
    if not text.strip():
        return None if seen.tool_calls and not _broken_calls(seen) else _empty(item, seen)
    if _unprintable(text):
        return "unprintable"
    if looped(text):
        return "looped"
    if _cut_off(item, seen):
        return "truncated"
    if _wants_json(item.body) and not _is_json(text):
        return "invalid_json"
    if _broken_calls(seen):
        return "invalid_json"
    return "refusal" if refusal(seen) else None


def refusal(seen: Observation) -> float:
    head = seen.text[:400].replace("\u2019", "'")
    return float(_REFUSAL.match(head) is not None)


def looped(text: str) -> bool:
    """Whether an answer ends in the same words again and again, or is all of one kind."""
    end = text.rstrip()
    tail = end[-LOOP_UNIT_CHARS_MAX * LOOP_TIMES_MIN :]
    for unit in range(1, min(LOOP_UNIT_CHARS_MAX, len(tail) // LOOP_TIMES_MIN) + 1):
        times = max(LOOP_TIMES_MIN, -(-LOOP_CHARS_MIN // unit))
        if len(end) >= unit * times and end[-unit * times :] == end[-unit:] * times:
            return True
    if len(end) < DENSE_CHARS_MIN:
        return False
    packed = zlib.compress(end.encode("utf-8", "surrogatepass"), 6)
    return len(packed) < DENSE_RATIO * len(end)


def _empty(item: Item, seen: Observation) -> str | None:
    """A text completion that only measures, with `max_tokens: 0`, has nothing to say."""
    asked = item.body.get("max_completion_tokens", item.body.get("max_tokens"))
    if asked == 0:
        return None
    return "invalid_json" if seen.tool_calls else "empty"


def _unprintable(text: str) -> bool:
    bad = sum(
        character == "\ufffd" or (unicodedata.category(character) in _CATEGORIES)
        for character in text
        if character not in "\n\r\t"
    )
    return bad > UNPRINTABLE_SHARE * len(text)


_CATEGORIES = ("Cc", "Cn", "Co", "Cs")  # control, unassigned, private use, half a pair


def _cut_off(item: Item, seen: Observation) -> bool:
    """Ended by the limit, where the one who asked set none: an answer that never comes to an end.
    One that had its limit set is what was asked for.
    """
    asked = item.body.get("max_completion_tokens", item.body.get("max_tokens"))
    return seen.finish_reason == "length" and asked is None


def _wants_json(body: Any) -> bool:
    form = body.get("response_format")
    return isinstance(form, dict) and form.get("type") in ("json_object", "json_schema")


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _broken_calls(seen: Observation) -> bool:
    return any(
        not _is_json((call.get("function") or {}).get("arguments") or "{}")
        for call in seen.tool_calls
    )
