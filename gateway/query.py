"""What stands behind the `?` of a path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import parse_qsl

from starlette.types import Scope

from gateway import problems

DIGITS_MAX = 18  # of a number; int() refuses very long ones
CURSOR = re.compile(r"\d{1,18}(?:-\d{1,18})?", re.ASCII)  # as stores make them


def query(scope: Scope) -> dict[str, str]:
    """By name; the last of those that come twice."""
    return dict(parse_qsl(scope["query_string"].decode("latin-1")))


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
