"""Calls written as Python: `[f(a=1, b="x"), g()]` of Llama 4, lines of calls of Olmo 3.

A call is sent when it is complete and every argument is a literal; until then it may still be
content. Nothing is evaluated.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from runtime.tool_json import Known, check_name, close
from runtime.tool_reader import (
    NAME_CHARS_MAX,
    Arguments,
    Closed,
    Malformed,
    Opened,
    Reader,
    Steps,
    Unfinished,
    char_at,
    dump_json,
    one_of,
    skip_space,
    wait_for,
)

_NAME = re.compile(r"[^\W\d][\w.-]*")
_SPACE = re.compile(r"[\s]*")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_INSIDE = {quote: re.compile(rf"[{quote}\\]") for quote in "'\""}
_OUTSIDE = re.compile(r"[()\[\]{}'\"]")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.|\n))", re.S)
_PLAIN = {
    "n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": "",
    "\\": "\\", "'": "'", '"': '"', "/": "/",
}  # fmt: skip  # one short table
_WORDS = {
    "True": True, "true": True, "False": False, "false": False,
    "None": None, "null": None,
}  # fmt: skip  # one short table
_DEPTH_MAX = 64


@dataclass(frozen=True, slots=True)
class PythonCalls:
    """Calls in a list, or with `listed` False one behind the other."""

    listed: bool = True
    closers: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        return self.closers

    def read(self, reader: Reader, at: int, known: Known) -> Steps[None]:
        """One opening marker's calls. Raises Malformed or Unfinished before the first of them."""
        at = yield from skip_space(reader, at)
        if self.listed:
            if (yield from char_at(reader, at)) != "[":
                raise Malformed
            at += 1
        call = yield from self._call(reader, at, known)
        try:
            yield from self._calls(reader, call, known)
        except Unfinished:
            reader.use(len(reader.rest))

    def _calls(self, reader: Reader, call: _Call, known: Known) -> Steps[None]:
        while True:
            reader.use(call.end)
            yield Opened(call.name)
            yield Arguments(call.arguments)
            yield Closed()
            at = yield from skip_space(reader, 0)
            char = yield from char_at(reader, at)
            if self.listed and char != ",":
                break
            if not self.listed and (yield from one_of(reader, at, self.closers)):
                break
            try:
                call = yield from self._call(reader, at + self.listed, known)
            except (Malformed, Unfinished):
                return
        if self.listed:
            if char != "]":
                return
            reader.use(at + 1)
        yield from close(reader, self.closers)

    def _call(self, reader: Reader, at: int, known: Known) -> Steps[_Call]:
        """`name(key=literal, ...)` at `at`. Raises Malformed."""
        at = yield from skip_space(reader, at)
        start = at
        while (yield from char_at(reader, at)) != "(":
            if at - start >= NAME_CHARS_MAX or not _NAME.fullmatch(reader.rest, start, at + 1):
                raise Malformed
            at += 1
        name = reader.rest[start:at]
        check_name(name, known)
        end = yield from _bracket_end(reader, at)
        literals = _Literals(reader.rest, at + 1, end - 1)
        arguments = dump_json(literals.keywords())
        return _Call(name, arguments, end)


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    arguments: str
    end: int


def _bracket_end(reader: Reader, at: int) -> Steps[int]:
    """The position behind the bracket that closes the one at `at`; brackets in texts are none."""
    depth, quote = 0, ""
    while True:
        match = (_INSIDE[quote] if quote else _OUTSIDE).search(reader.rest, at)
        if match is None:
            at = len(reader.rest)
            yield from wait_for(reader, at + 1)
            continue
        char, at = match[0], match.end()
        if char == "\\":
            yield from wait_for(reader, at + 1)
            at += 1
        elif char in "'\"":
            quote = "" if quote else char
        else:
            depth += 1 if char in "([{" else -1
            if depth == 0:
                return at


class _Literals:
    """Python's literals in a part of a text. Every method raises Malformed for anything else."""

    __slots__ = ("_at", "_depth", "_end", "_text")

    def __init__(self, text: str, at: int, end: int) -> None:
        self._text, self._at, self._end = text, at, end
        self._depth = 0

    def keywords(self) -> dict[str, Any]:
        """`key=literal, ...` up to the end."""
        found: dict[str, Any] = {}
        self._space()
        while self._at < self._end:
            key = self._match(_NAME)
            self._space()
            self._take("=")
            found[key] = self._value()
            if not self._goes_on(""):
                break
        if self._at != self._end:
            raise Malformed
        return found

    def _value(self) -> Any:
        self._space()
        char = self._text[self._at : self._at + 1]
        self._depth += 1
        if self._depth > _DEPTH_MAX:
            raise Malformed
        if char in ("'", '"'):
            value: Any = self._string(char)
        elif char == "{":
            value = self._dictionary()
        elif char in ("[", "("):
            value = self._sequence("]" if char == "[" else ")")
        elif char.isalpha():
            word = self._match(_NAME)
            if word not in _WORDS:
                raise Malformed
            value = _WORDS[word]
        else:
            value = _number(self._match(_NUMBER))
        self._depth -= 1
        self._space()
        return value

    def _sequence(self, close: str) -> list[Any]:
        self._at += 1
        self._space()
        values: list[Any] = []
        while not self._ends(close):
            values.append(self._value())
            if not self._goes_on(close):
                break
        self._take(close)
        return values

    def _dictionary(self) -> dict[str, Any]:
        self._at += 1
        self._space()
        values: dict[str, Any] = {}
        while not self._ends("}"):
            key = self._value()
            if not isinstance(key, str):
                raise Malformed
            self._take(":")
            values[key] = self._value()
            if not self._goes_on("}"):
                break
        self._take("}")
        return values

    def _string(self, quote: str) -> str:
        start = self._at = self._at + 1
        while True:
            match = _INSIDE[quote].search(self._text, self._at, self._end)
            if match is None:
                raise Malformed
            self._at = match.end()
            if match[0] == quote:
                text = self._text[start : match.start()]
                return _join_surrogates(_ESCAPE.sub(_unescape, text)) if "\\" in text else text
            self._at += 1

    def _goes_on(self, close: str) -> bool:
        """Past a comma, if there is one and something behind it."""
        if not self._ends(","):
            return False
        self._at += 1
        self._space()
        return not (close and self._ends(close))

    def _ends(self, mark: str) -> bool:
        return self._at < self._end and self._text.startswith(mark, self._at)

    def _take(self, mark: str) -> None:
        if not self._ends(mark):
            raise Malformed
        self._at += 1

    def _space(self) -> None:
        match = _SPACE.match(self._text, self._at, self._end)
        assert match is not None, "nothing is whitespace enough"
        self._at = match.end()

    def _match(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at, self._end)
        if match is None:
            raise Malformed
        self._at = match.end()
        return match[0]


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        try:
            number = float(text)
        except ValueError:
            raise Malformed from None
    if not math.isfinite(number):
        raise Malformed
    return number


def _unescape(match: re.Match[str]) -> str:
    digits = match[1] or match[2] or match[3]
    if digits is None:
        return _PLAIN.get(match[4], match[0])
    code = int(digits, 16)
    if code > 0x10FFFF:
        raise Malformed
    return chr(code)


def _join_surrogates(text: str) -> str:
    """JSON escapes a wide character as two halves; a lone half stays one."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
