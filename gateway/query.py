"""What stands behind the `?` of a path."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl

from starlette.types import Scope

from gateway import problems

DIGITS_MAX = 18  # of a number; int() refuses very long ones


def query(scope: Scope) -> dict[str, str]:
    """By name; the last of those that come twice."""
    return dict(parse_qsl(scope["query_string"].decode("latin-1")))


def number(asked: Mapping[str, str], name: str, usual: int, most: int) -> int:
    """From 1 to `most`. Raises Problem 400."""
    text = asked.get(name, str(usual))
    if not text.isdecimal() or len(text) > DIGITS_MAX or not 0 < int(text) <= most:
        raise problems.wrong_value(name, f"1 to {most}", problems.quote(text))
    return int(text)
