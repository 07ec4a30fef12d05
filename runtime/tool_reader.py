"""Reading text that comes in pieces: generators that wait, and JSON whose end is not there yet.

A reading step yields an event as soon as it is certain, and None when it needs more text than has
come. Knows no dialect of tool calls. Positions count from the start of `Reader.rest`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

NAME_CHARS_MAX = 256
SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Text:
    """Content, as generated."""

    text: str


@dataclass(frozen=True, slots=True)
class Opened:
    """A call begins; it cannot become content any more."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the last call's arguments: a piece of JSON text."""

    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The last call is complete."""


Event = Text | Opened | Arguments | Closed
Result = TypeVar("Result")
Steps = Generator[Event | None, None, Result]


class Malformed(Exception):
    """What began like a call is none."""


class Unfinished(Exception):
    """The answer ended before it was certain."""


class Reader:
    """`rest` is what has come and is not used up yet; `over` says that no more will come."""

    __slots__ = ("over", "rest")

    def __init__(self) -> None:
        self.rest = ""
        self.over = False

    def use(self, count: int) -> str:
        """Takes `count` characters off the start."""
        used, self.rest = self.rest[:count], self.rest[count:]
        return used


# ---- looking ahead ------------------------------------------------------------------------------


def wait_for(reader: Reader, count: int) -> Steps[None]:
    """Until `count` characters are there. Raises Unfinished when they will never be."""
    while len(reader.rest) < count:
        if reader.over:
            raise Unfinished
        yield None


def char_at(reader: Reader, at: int) -> Steps[str]:
    yield from wait_for(reader, at + 1)
    return reader.rest[at]


def skip_space(reader: Reader, at: int) -> Steps[int]:
    while (yield from char_at(reader, at)) in SPACE:
        at += 1
    return at


def expect(reader: Reader, at: int, wanted: str) -> Steps[int]:
    """The position behind `wanted`. Raises Malformed as soon as another character stands there."""
    for offset, char in enumerate(wanted):
        if (yield from char_at(reader, at + offset)) != char:
            raise Malformed
    return at + len(wanted)


def one_of(reader: Reader, at: int, markers: tuple[str, ...]) -> Steps[str]:
    """The longest of the markers that stands at `at`; "" when none does."""
    found, length = "", 0
    possible = markers
    while possible:
        length += 1
        try:
            yield from wait_for(reader, at + length)
        except Unfinished:
            break
        here = reader.rest[at : at + length]
        possible = tuple(marker for marker in possible if marker.startswith(here))
        if here in possible:
            found = here
            possible = tuple(marker for marker in possible if marker != here)
    return found


def half_come(reader: Reader, at: int, markers: tuple[str, ...]) -> bool:
    """Whether the answer ended within one of the markers at `at`."""
    return reader.over and any(marker.startswith(reader.rest[at:]) for marker in markers)


def safe_chars(text: str, markers: tuple[str, ...]) -> int:
    """How many characters of the text surely are no part of a marker that is still coming."""
    found = _half(markers).search(text)
    return found.start() if found else len(text)


@lru_cache(maxsize=64)
def _half(markers: tuple[str, ...]) -> re.Pattern[str]:
    """Matches the beginning of a marker at the end of a text, but not all of it."""
    patterns = []
    for marker in markers:
        pattern = ""
        for char in reversed(marker[:-1]):
            pattern = re.escape(char) + (f"(?:{pattern})?" if pattern else "")
        patterns.append(pattern or "(?!)")
    return re.compile(rf"(?:{'|'.join(patterns) or '(?!)'})\Z")


def until(reader: Reader, at: int, ends: str, limit: int) -> Steps[int]:
    """The position of the first of the characters `ends`. Raises Malformed beyond `limit`."""
    start = at
    while (yield from char_at(reader, at)) not in ends:
        at += 1
        if at - start > limit:
            raise Malformed
    return at


# ---- JSON ---------------------------------------------------------------------------------------

_INSIDE = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'["{}\[\]]|[^\s\w:,.+-]')


class ValueScan:
    """Finds the end of a JSON object, array or string that comes in pieces; keeps none of them.

    `broken` when it met a character that JSON has only within strings: the value ends before it.
    """

    __slots__ = ("_depth", "_escaped", "_quoted", "broken")

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False
        self.broken = False

    def find_end(self, text: str, at: int) -> int | None:
        """The position behind the value in `text`, read from `at` on; None when it goes on."""
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            match = (_INSIDE if self._quoted else _OUTSIDE).search(text, at)
            if match is None:
                return None
            at = match.end()
            if self._meets(match[0]):
                return match.start() if self.broken else at
        return None

    def _meets(self, char: str) -> bool:
        """Whether the value ends with this character."""
        if char == "\\" and self._quoted:
            self._escaped = True
        elif char == '"':
            self._quoted = not self._quoted
            return not self._quoted and self._depth == 0
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth <= 0
        else:
            self.broken = True
        return self.broken


def value_end(reader: Reader, at: int) -> Steps[int]:
    """The position behind the JSON value that begins at `at`. Raises Malformed."""
    first = yield from char_at(reader, at)
    if first not in '"{[':
        start = at
        while (yield from char_at(reader, at)) not in SPACE + ",]}":
            at += 1
        parse_json(reader.rest[start:at])
        return at
    scan, seen = ValueScan(), at
    while True:
        end = scan.find_end(reader.rest, seen)
        if scan.broken:
            raise Malformed
        if end is not None:
            return end
        seen = len(reader.rest)
        yield from wait_for(reader, seen + 1)


def parse_json(text: str) -> Any:
    """Raises Malformed."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Malformed from None


_SURROGATE = re.compile("[\ud800-\udfff]")


def dump_json(value: Any) -> str:
    """JSON text that is Unicode text too: half a surrogate pair stays an escape."""
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if _SURROGATE.search(text) else text


def string_at(reader: Reader, at: int) -> Steps[tuple[str, int]]:
    """The JSON string at `at`, decoded, and the position behind it. Raises Malformed."""
    if (yield from char_at(reader, at)) != '"':
        raise Malformed
    end = yield from value_end(reader, at)
    text = parse_json(reader.rest[at:end])
    assert isinstance(text, str), "a quoted JSON value is a string"
    return text, end


def stream_value(reader: Reader) -> Steps[None]:
    """The JSON object at the start of `rest` as Arguments, piece by piece, and uses it up.

    Raises Unfinished when the answer ends within it.
    """
    scan = ValueScan()
    while True:
        end = scan.find_end(reader.rest, 0)
        piece = reader.use(len(reader.rest) if end is None else end)
        if piece:
            yield Arguments(piece)
        if end is not None:
            return
        yield from wait_for(reader, 1)
