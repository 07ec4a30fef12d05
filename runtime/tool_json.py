"""Calls whose arguments are a JSON object: within a JSON call object, or behind a bare name.

Knows Hermes, Llama, Mistral, Granite, Phi and Command-R (`JsonCalls`), and DeepSeek, Kimi and the
newer Mistral (`NamedCalls`). Both read from behind an opening marker, which they are told.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    expect,
    half_come,
    one_of,
    parse_json,
    skip_space,
    stream_value,
    string_at,
    until,
    value_end,
)

Known = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Head:
    """A call whose name is certain. `arguments` is None while they stand in `rest` at `at`;
    else they have been read, and `at` is behind the call."""

    name: str
    at: int
    arguments: str | None = None


@dataclass(frozen=True, slots=True)
class JsonCalls:
    """`{"name": ..., "arguments": {...}}`, one, several behind each other, or in a list.

    `closers` are swallowed behind calls, `fence` may stand before them. A call object without
    arguments is a call with `{}`; not so where calls come `unmarked`, and any other JSON must be
    told apart early.
    """

    closers: tuple[str, ...] = ()
    fence: str = ""
    separator: str = ""
    name_keys: frozenset[str] = frozenset({"name"})
    arguments_keys: frozenset[str] = frozenset({"arguments", "parameters"})
    unmarked: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        return self.closers

    def read(self, reader: Reader, at: int, known: Known) -> Steps[None]:
        """One opening marker's calls. Raises Malformed or Unfinished before the first of them."""
        at = yield from skip_space(reader, at)
        if self.fence and (yield from char_at(reader, at)) == self.fence[0]:
            at = yield from expect(reader, at, self.fence)
            at = yield from skip_space(reader, at)
        listed = (yield from char_at(reader, at)) == "["
        if listed:
            at += 1
        head = yield from self._head(reader, at, known)
        try:
            yield from self._calls(reader, head, listed, known)
        except Unfinished:
            reader.use(len(reader.rest))

    def _calls(self, reader: Reader, head: Head, listed: bool, known: Known) -> Steps[None]:
        """What follows a first head; what cannot be read as calls is left in `rest`."""
        between = "," if listed else self.separator
        while True:
            yield from self._call(reader, head)
            at = yield from skip_space(reader, 0)
            if not between or (yield from char_at(reader, at)) != between:
                break
            try:
                head = yield from self._head(reader, at + 1, known)
            except (Malformed, Unfinished):
                return
        if listed:
            if (yield from char_at(reader, at)) != "]":
                return
            reader.use(at + 1)
        yield from close(reader, self.closers)

    def _call(self, reader: Reader, head: Head) -> Steps[None]:
        yield Opened(head.name)
        reader.use(head.at)
        if head.arguments is not None:
            yield Arguments(head.arguments)
            yield Closed()
            return
        yield from stream_value(reader)
        yield Closed()
        try:
            at = yield from self._members(reader, 0)
        except Malformed:
            return
        reader.use(at)

    def _members(self, reader: Reader, at: int) -> Steps[int]:
        """The rest of a call object behind its arguments; the position behind it."""
        while (yield from char_at(reader, (at := (yield from skip_space(reader, at))))) == ",":
            at = yield from skip_space(reader, at + 1)
            _, at = yield from string_at(reader, at)
            at = yield from expect(reader, (yield from skip_space(reader, at)), ":")
            at = yield from value_end(reader, (yield from skip_space(reader, at)))
        return (yield from expect(reader, at, "}"))

    def _head(self, reader: Reader, at: int, known: Known) -> Steps[Head]:
        """A call object up to its arguments, or all of it when they come first or not at all."""
        at = yield from skip_space(reader, at)
        at = yield from expect(reader, at, "{")
        name, arguments, first = "", None, True
        while True:
            at = yield from skip_space(reader, at)
            key, at = yield from string_at(reader, at)
            if self.unmarked and first and key not in self.name_keys:
                raise Malformed
            first = False
            at = yield from expect(reader, (yield from skip_space(reader, at)), ":")
            at = yield from skip_space(reader, at)
            if key in self.name_keys:
                name, at = yield from string_at(reader, at)
                check_name(name, known)
            elif key in self.arguments_keys:
                if name and (yield from char_at(reader, at)) == "{":
                    return Head(name, at)
                end = yield from value_end(reader, at)
                arguments, at = _object_text(reader.rest[at:end]), end
            else:
                at = yield from value_end(reader, at)
            at = yield from skip_space(reader, at)
            if (yield from char_at(reader, at)) == "}":
                break
            at = yield from expect(reader, at, ",")
        if not name or (arguments is None and self.unmarked):
            raise Malformed
        return Head(name, at + 1, arguments or "{}")


@dataclass(frozen=True, slots=True)
class NamedCalls:
    """A name and marks, then the arguments as a JSON object.

    `header` matches all from the marker to the object, with the name as its group `name`; `again`
    are the markers that begin a further call, `inner` those within the header. A list of objects is
    read by `listed`, if given.
    """

    header: re.Pattern[str]
    again: tuple[str, ...]
    inner: tuple[str, ...]
    closers: tuple[str, ...] = ()
    listed: JsonCalls | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        return (*self.again, *self.inner, *self.closers)

    def read(self, reader: Reader, at: int, known: Known) -> Steps[None]:
        """One opening marker's calls. Raises Malformed or Unfinished before the first of them."""
        if self.listed is not None:
            start = yield from skip_space(reader, at)
            if (yield from char_at(reader, start)) in "[{":
                yield from self.listed.read(reader, start, known)
                return
        opener = yield from one_of(reader, (yield from skip_space(reader, at)), self.again)
        if opener:
            at = (yield from skip_space(reader, at)) + len(opener)
        head = yield from self._head(reader, at, known)
        try:
            yield from self._calls(reader, head, known)
        except Unfinished:
            reader.use(len(reader.rest))

    def _calls(self, reader: Reader, head: Head, known: Known) -> Steps[None]:
        while True:
            yield Opened(head.name)
            reader.use(head.at)
            yield from stream_value(reader)
            yield Closed()
            yield from close(reader, self.closers)
            at = yield from skip_space(reader, 0)
            opener = yield from one_of(reader, at, self.again)
            if not opener:
                return
            try:
                head = yield from self._head(reader, at + len(opener), known)
            except (Malformed, Unfinished):
                return

    def _head(self, reader: Reader, at: int, known: Known) -> Steps[Head]:
        brace = yield from until(reader, at, "{", NAME_CHARS_MAX)
        found = self.header.fullmatch(reader.rest, at, brace)
        if found is None:
            raise Malformed
        check_name(found["name"], known)
        return Head(found["name"], brace)


def check_name(name: str, known: Known) -> None:
    """Raises Malformed for what cannot be the name of a called function."""
    if not 0 < len(name) <= NAME_CHARS_MAX or not name.isprintable() or not known(name):
        raise Malformed


def close(reader: Reader, closers: tuple[str, ...]) -> Steps[None]:
    """Uses up the closing markers that come next, with the whitespace before them."""
    while closers:
        at = yield from skip_space(reader, 0)
        closer = yield from one_of(reader, at, closers)
        if not closer:
            if half_come(reader, at, closers):
                raise Unfinished
            return
        reader.use(at + len(closer))


def _object_text(text: str) -> str:
    """Arguments that were read before they could be sent: an object, or one spelled as a string.

    Raises Malformed.
    """
    value: Any = parse_json(text)
    if isinstance(value, str):
        value = parse_json(value)
        text = dump_json(value)
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise Malformed
    return text
