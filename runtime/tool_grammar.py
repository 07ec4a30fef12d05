"""Grammars that force calls of tools, or allow no others, in Lark's syntax.

Knows JSON schemas and which marks are special tokens; knows no vocabulary. What a grammar here lets
through, the dialect's parser reads as calls whose arguments obey their tool's schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runtime.lark import json_rule
from runtime.tool_forms import Form, Tool, form_of
from runtime.tool_python import PythonCalls
from runtime.tool_xml import TaggedCalls, argument_types, referred
from runtime.tools import Dialect

EMPTY: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# What a form that writes arguments one by one obeys of a function's schema, and of a text's.
OF_OBJECTS = frozenset({"type", "properties", "required", "additionalProperties"})
OF_TEXTS = frozenset({"type", "enum", "const", "$ref"})
ANNOTATIONS = frozenset({
    "$schema", "$defs", "definitions", "title", "description", "default", "examples", "deprecated",
})  # fmt: skip  # one short list
LINE_END = "\u2424"  # in a text to be spelled: just a newline
ANY_TEXT = "TEXT"
SPACE = "SPACE: /[ \\n]{1,12}/"


class CannotForce(Exception):
    """A dialect's form of calls cannot carry what a tool's schema demands; says which and why."""


def call_grammar(
    dialect: Dialect,
    template: str,
    tools: Sequence[Tool],
    special: Mapping[str, int],
    *,
    parallel: bool,
    instead: str | None = None,
) -> str:
    """Lark text: one call of these tools, or several where they may be `parallel` and the template
    takes them. `instead` is a rule for what the answer may be without calls; with ANY_TEXT it is
    any text, which may also stand before the calls.

    `special` has the ids of the dialect's marks that are special tokens. Raises CannotForce.
    """
    form = form_of(dialect, template)
    lark = _Lark(dialect, special)
    lead, said = lark.lead(form) if instead == ANY_TEXT else ("", "")
    heads = [form.head.replace("⟨name⟩", tool.name) for tool in tools]
    for at, (tool, head) in enumerate(zip(tools, heads, strict=True)):
        lark.rule(f"args_{at}", _arguments(f"args_{at}", tool, dialect, lark))
        lark.rule(f"end_{at}", f"args_{at} {lark.spell(form.tail)}")
        lark.rule(f"call_{at}", f"{lark.spell(head)} end_{at}")
    lark.rule("call", " | ".join(f"call_{at}" for at in range(len(tools))))
    first, start = "call", form.start.removeprefix(said)
    if said and not form.start:
        each = (f"{lark.spell(one.removeprefix(said))} end_{at}" for at, one in enumerate(heads))
        first = lark.rule("first", " | ".join(each))
    more = f"({lark.spell(form.between)} call)*" if parallel and not form.single else ""
    calls = f"{lead} {lark.spell(start)} {first} {more} {lark.spell(form.end)}"
    return lark.text(calls if instead is None else f"{calls} | {lark.rule('instead', instead)}")


class _Lark:
    """Rules of one grammar in the making, and how its texts are spelled."""

    def __init__(self, dialect: Dialect, special: Mapping[str, int]) -> None:
        self._rules: dict[str, str] = {}
        self._dialect = dialect
        self._ids = special
        marks = sorted(special, key=len, reverse=True)
        self._parts = re.compile(
            f"({'|'.join([*map(re.escape, marks), chr(10), LINE_END, '⟨index⟩'])})"
        )

    def text(self, start: str) -> str:
        rules = {"start": start, **self._rules}
        return "\n".join([*(f"{name}: {body}" for name, body in rules.items()), SPACE])

    def rule(self, name: str, body: str) -> str:
        self._rules[name] = body
        return name.partition("[")[0]

    def spell(self, text: str) -> str:
        """A text of a form: special tokens by their ids, optional whitespace, the rest as it is."""
        return " ".join(self._part(part) for part in self._parts.split(text) if part) or '""'

    def _part(self, part: str) -> str:
        if part in self._ids:
            return f"<[{self._ids[part]}]>"
        if part == "\n":
            return "SPACE?"
        if part == LINE_END:
            return quote("\n")
        return "/[0-9]{1,2}/" if part == "⟨index⟩" else quote(part)

    def text_until(self, mark: str) -> str:
        """Any text and then the mark, which is not in it."""
        if mark in self._ids:
            return f"/(?s:.*)/ <[{self._ids[mark]}]>"
        return self.rule("until[lazy]", f"/(?s:.*){pattern(mark)}/")

    def lead(self, form: Form) -> tuple[str, str]:
        """What may come before calls, and the opening mark that it ends with; defines TEXT, which
        has no opening mark in it."""
        dialect = self._dialect
        shown = [one for one in dialect.openers if one not in self._ids]
        without = "".join(f" & ~/(?s:.*){pattern(one)}(?s:.*)/" for one in shown)
        written = form.start + form.head
        opener = next((one for one in dialect.openers if written.startswith(one)), "")
        if not opener:
            self.rule("TEXT", f"/\\s*([^\\s\\{dialect.bare}](?s:.*))?/{without}")
            return "", ""
        self.rule("TEXT", f"/(?s:.*)/{without}")
        if opener not in shown:
            return "TEXT", ""
        others = "".join(f" & ~/(?s:.*){pattern(one)}(?s:.*)/" for one in shown if one != opener)
        self.rule("LEAD", f"/(?s:.*){pattern(opener)}/{others}")
        return self.rule("lead[lazy]", "LEAD"), opener


def quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def pattern(text: str) -> str:
    """A regular expression, between slashes, for just this text."""
    return re.escape(text).replace("/", r"\/")


# ---- arguments ----------------------------------------------------------------------------------


def _arguments(name: str, tool: Tool, dialect: Dialect, lark: _Lark) -> str:
    """The body of a rule for the arguments of a tool; more rules as it needs them."""
    schema = dict(EMPTY if tool.parameters is None else tool.parameters)
    schema.setdefault("type", "object")
    calls = dialect.calls
    if not isinstance(calls, TaggedCalls | PythonCalls):
        if "properties" in schema:  # a model that may invent arguments will
            schema.setdefault("additionalProperties", False)
        return json_rule(schema, lenient=not tool.strict)
    _check(tool, schema, OF_OBJECTS, "")
    if isinstance(calls, TaggedCalls):
        return _chain(name, _tagged(tool, schema, calls, lark), "", lark)
    return _chain(name, _python(tool, schema), '", "', lark)


def _chain(name: str, items: Iterator[tuple[str, bool]], between: str, lark: _Lark) -> str:
    """(argument, whether it is required)s in their order, those that are not may be left out.

    Two rules each: from this argument on, when none has been written yet, and when one has.
    """
    listed = list(items)
    first, later = '""', '""'
    for at, (item, required) in reversed(list(enumerate(listed))):
        more = lark.rule(f"{name}_{at + 1}_later", later)
        none = lark.rule(f"{name}_{at + 1}_first", first)
        one = lark.rule(f"{name}_{at}", item)
        first = f"{one} {more}" + ("" if required else f" | {none}")
        later = f"{between} {one} {more}" + ("" if required else f" | {more}")
    return first


def _tagged(
    tool: Tool, schema: Mapping[str, Any], calls: TaggedCalls, lark: _Lark
) -> Iterator[tuple[str, bool]]:
    frame = LINE_END if calls.framed else ""
    ending = frame + calls.value_end
    for key, given, required in _properties(tool, schema):
        if re.search(r"[<>\s]", key):
            raise CannotForce(f"{tool.name}: an argument named {key!r} cannot be written in tags")
        opening = f"{calls.key_open}{key}{calls.key_end}" + (frame or "\n") + calls.value_open
        one, types = _resolved(given, schema), argument_types(schema, key)
        values = [one["const"]] if "const" in one else one.get("enum")
        if isinstance(values, list):
            texts = [v if isinstance(v, str) else json.dumps(v) for v in values]
            value = f"({' | '.join(map(quote, texts))}) {lark.spell(ending)}"
        elif not types or "string" in types:
            _check(tool, one, OF_TEXTS, key)
            value = lark.text_until(calls.value_end)
        else:
            value = f"{_value(one, schema, tool)} {lark.spell(ending)}"
        yield f"{lark.spell(opening)} {value} SPACE?", required


def _python(tool: Tool, schema: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    for key, given, required in _properties(tool, schema):
        if not key.isidentifier():
            raise CannotForce(f"{tool.name}: an argument named {key!r} cannot be a Python name")
        yield f"{quote(key + '=')} {_value(_resolved(given, schema), schema, tool)}", required


def _properties(tool: Tool, schema: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    unknown = [name for name in required if name not in properties]
    if unknown:
        raise CannotForce(f"{tool.name}: required, but not among the properties: {unknown[0]!r}")
    for key, one in properties.items():
        if one is not False:
            yield key, one, key in required


def _resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema that is only a reference, as what it refers to."""
    if isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str):
        schema = referred(schema["$ref"], root)
    return schema if isinstance(schema, Mapping) else {}


def _value(schema: Mapping[str, Any], root: Mapping[str, Any], tool: Tool) -> str:
    shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
    return json_rule({**schema, **shared}, lenient=not tool.strict)


def _check(tool: Tool, schema: Mapping[str, Any], obeyed: frozenset[str], argument: str) -> None:
    """A strict tool's schema may not say what its dialect's form of calls cannot carry."""
    more = sorted(set(schema) - obeyed - ANNOTATIONS)
    if tool.strict and more:
        where = f"{tool.name}, {argument}" if argument else tool.name
        raise CannotForce(f"{where}: {more[0]!r} cannot be enforced in this model's form of calls")
