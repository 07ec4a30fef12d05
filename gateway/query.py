"""What stands behind the `?` of a path."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import parse_qsl

from starlette.types import Scope

from gateway import problems

DIGITS_MAX = 18  # of a number; int() refuses very long ones
CURSOR = re.compile(r"\d{1,18}(?:-\d{1,18})?", re.ASCII)  # as stores make them


def query(scope: Scope) -> dict[str, str]:
    """By name; the last of those that come twice."""
    return dict(parse_qsl(scope["query_string"].decode("latin-1")))


def refuse_unknown(asked: Mapping[str, str], known: Sequence[str]) -> None:
    """Raises Problem 400 for a name that asks for nothing."""
    for name in asked:
        if name not in known:
            raise problems.unknown_query(name, known)


def one_of(asked: Mapping[str, str], name: str, allowed: Sequence[str]) -> str:
    """The first of those allowed where nothing is said. Raises Problem 400."""
    value = asked.get(name, allowed[0])
    if value not in allowed:
        named = ", ".join(one for one in allowed if one)
        raise problems.wrong_value(name, f"one of {named}", problems.quote(value))
    return value


def number(asked: Mapping[str, str], name: str, usual: int, most: int) -> int:
    """From 1 to `most`. Raises Problem 400."""
    text = asked.get(name, str(usual))
    if not text.isdecimal() or len(text) > DIGITS_MAX or not 0 < int(text) <= most:
        raise problems.wrong_value(name, f"1 to {most}", problems.quote(text))
    return int(text)


def cursor(asked: Mapping[str, str], name: str) -> str:
    """Where to go on, "" for the begin. Raises Problem 400 for what no answer has told."""
    text = asked.get(name, "")
    if text and CURSOR.fullmatch(text) is None:
        raise problems.wrong_value(name, "the cursor of an answer before", problems.quote(text))
    return text
