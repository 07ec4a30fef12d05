"""Calls whose arguments are tagged one by one: Qwen3-Coder and GLM-4.5.

The values are plain text, so what they are in JSON is told by the tool's own schema. Text values
are sent as they come, others when they are complete.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
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
    expect,
    half_come,
    one_of,
    safe_chars,
    skip_space,
    until,
    wait_for,
)

# (function, argument) -> the JSON types that its schema allows; none when it does not say.
Types = Callable[[str, str], frozenset[str]]


@dataclass(frozen=True, slots=True)
class TaggedCalls:
    """`name_open` NAME, up to one of `name_ends`; `key_open` KEY `key_end` `value_open` VALUE
    `value_end` for each argument; `call_end`. With `framed`, a newline at either end of a value is
    not part of it."""

    name_open: str
    name_ends: str
    key_open: str
    key_end: str
    value_open: str
    value_end: str
    call_end: str
    closers: tuple[str, ...] = ()
    framed: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        inner = (self.key_open, self.key_end, self.value_open, self.value_end, self.call_end)
        return (self.name_open, *inner, *self.closers)

    def read(self, reader: Reader, at: int, known: Known, types: Types) -> Steps[None]:
        """One opening marker's call. Raises Malformed or Unfinished before it."""
        at = yield from skip_space(reader, at)
        at = yield from expect(reader, at, self.name_open)
        end = yield from until(reader, at, self.name_ends, NAME_CHARS_MAX)
        name = reader.rest[at:end].strip()
        if NOT_IN_NAMES.search(name):
            raise Malformed
        check_name(name, known)
        yield Opened(name)
        reader.use(end + (reader.rest[end] == ">"))
        try:
            yield from self._arguments(reader, name, types)
            yield from close(reader, self.closers)
        except Unfinished:
            reader.use(len(reader.rest))

    def _arguments(self, reader: Reader, name: str, types: Types) -> Steps[None]:
        """All arguments as one JSON object; text that is no argument ends the call."""
        before, tags = "{", (self.key_open, self.call_end)
        while True:
            at = yield from skip_space(reader, 0)
            tag = yield from one_of(reader, at, tags)
            if tag != self.key_open:
                break
            start = at + len(tag)
            end = yield from find(reader, start, self.key_end)
            key = reader.rest[start:end].strip()
            reader.use(end + len(self.key_end))
            if self.value_open:
                reader.use((yield from find(reader, 0, self.value_open)) + len(self.value_open))
            yield Arguments(f"{before}{dump_json(key)}: ")
            before = ", "
            yield from self._value(reader, types(name, key))
        if not tag and half_come(reader, at, tags):
            raise Unfinished
        if tag:
            reader.use(at + len(tag))
        yield Arguments("{}" if before == "{" else "}")
        yield Closed()

    def _value(self, reader: Reader, types: frozenset[str]) -> Steps[None]:
        if self.framed and (yield from char_at(reader, 0)) == "\n":
            reader.use(1)
        if types == {"string"}:
            yield from self._text(reader)
            return
        end = yield from find(reader, 0, self.value_end)
        text = reader.use(end + len(self.value_end)).removesuffix(self.value_end)
        value = to_json(text.removesuffix("\n") if self.framed else text, types)
        yield Arguments(dump_json(value))

    def _text(self, reader: Reader) -> Steps[None]:
        """A text value, as it comes: all but what may still be its end."""
        ends = (f"\n{self.value_end}", self.value_end) if self.framed else (self.value_end,)
        yield Arguments('"')
        while True:
            found = [(at, end) for end in ends if (at := reader.rest.find(end)) >= 0]
            at, end = min(found) if found else (safe_chars(reader.rest, ends), "")
            if at:
                yield Arguments(dump_json(reader.use(at))[1:-1])
            if end:
                reader.use(len(end))
                yield Arguments('"')
                return
            yield from wait_for(reader, len(reader.rest) + 1)


NOT_IN_NAMES = re.compile(r"[\s<>{}\"]")


def find(reader: Reader, at: int, wanted: str) -> Steps[int]:
    """The position of `wanted`, from `at` on."""
    while (found := reader.rest.find(wanted, at)) < 0:
        at = max(at, len(reader.rest) - len(wanted))
        yield from wait_for(reader, len(reader.rest) + 1)
    return found


def to_json(text: str, types: frozenset[str]) -> Any:
    """What a tagged value is in JSON: by the types that are allowed, else by its looks."""
    value = _literal(text.strip())
    if value is None and text.strip() not in ("null", "None"):
        return text
    if not types:
        return value
    kind = JSON_TYPES[type(value)]
    fits = kind in types or (kind == "integer" and "number" in types)
    return value if fits or "string" not in types else text


JSON_TYPES = {
    str: "string", int: "integer", float: "number", bool: "boolean", list: "array",
    dict: "object", type(None): "null",
}  # fmt: skip  # one short table


def _literal(text: str) -> Any:
    """A JSON value, or one of Python's names for them; None when the text is neither."""
    names = {"True": True, "False": False, "None": None}
    if text in names:
        return names[text]
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def _finite(text: str) -> float:
    """Raises ValueError for what JSON cannot say."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


# ---- schemas ------------------------------------------------------------------------------------


def argument_types(parameters: Mapping[str, Any], argument: str) -> frozenset[str]:
    """The JSON types that a function's parameters allow for one argument; none: it does not say."""
    properties = parameters.get("properties")
    schema = properties.get(argument) if isinstance(properties, Mapping) else None
    return _types_of(schema, parameters, _DEPTH_MAX)


def _types_of(schema: Any, root: Mapping[str, Any], depth: int) -> frozenset[str]:
    if not isinstance(schema, Mapping) or depth == 0:
        return frozenset()
    if isinstance(schema.get("$ref"), str):
        return _types_of(referred(schema["$ref"], root), root, depth - 1)
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset({kind})
    if isinstance(kind, list):
        return frozenset(one for one in kind if isinstance(one, str))
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return frozenset(JSON_TYPES.get(type(value), "null") for value in values)
    for name in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(name), list):
            found = [_types_of(one, root, depth - 1) for one in schema[name]]
            return frozenset().union(*found) if all(found) else frozenset()
    return frozenset()


def referred(path: str, root: Mapping[str, Any]) -> Any:
    """What `#/$defs/Name` points to within a schema; None for anything else."""
    found: Any = root
    for part in path.removeprefix("#/").split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


_DEPTH_MAX = 8  # of references and alternatives within each other
