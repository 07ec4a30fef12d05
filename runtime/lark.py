"""Forms of an answer as requests write them -> grammars in llguidance's Lark syntax.

Knows JSON schemas, regexes, choices, Lark and GBNF as texts, and how long they may be; knows no
vocabulary and compiles nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

TEXT_MAX = 65_536  # characters of a schema, regex, list of choices or grammar
GBNF_MAX = 16_384  # its conversion takes time with the square of the length
LITERAL_MAX = 8_192  # characters of one text or regex within; these, too, take squared time

# Forcing would tokenize bytes that can only come out one way, all of them at once, by calling back
# into Python: a regex like a{1000}{1000} then takes 8 s for its first token.
UNFORCED = '\n%llguidance {"no_forcing": true}\n'
# Whitespace without an end is a favourite of small models: one blank, or a new line's indentation.
WHITESPACE = r" |\n[ \t]{0,20}"
# A quoted text or a regex of Lark, or an escaped character outside.
LITERALS = re.compile(r'"(?:[^"\\]|\\.)*"|/(?:[^/\\\n]|\\.)*/|\\.', re.DOTALL)

Kind = Literal["json_schema", "regex", "choice", "grammar"]


class GrammarRefused(Exception):
    """A grammar that cannot be enforced; says why, in words for whoever wrote it."""


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What an answer must look like, as a request says it; compiled by `Grammars.compile`.

    `text` is, by kind: a JSON schema; a regular expression for the whole answer (Rust's syntax,
    no look-around); a JSON list of strings; a grammar in Lark's syntax or in GBNF. In Lark text,
    `json_rule` gives a rule for JSON, quoted strings are text, and `<[7]>` is the token of id 7:
    special tokens match by id only, never as text. A call of a tool in tags of plain text is thus
    `GrammarSpec("grammar", f'start: "<tool_call>" {json_rule(schema)} "</tool_call>"')`.

    `lenient` leaves out the keywords of a JSON schema that cannot be enforced, instead of refusing
    the schema. `param` is the request's field, for refusals.
    """

    kind: Kind
    text: str
    lenient: bool = False
    param: str | None = field(default=None, compare=False)


def json_rule(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """A JSON schema as an expression of a Lark grammar. Properties come in the schema's order."""
    options = {"whitespace_pattern": WHITESPACE, "lenient": lenient}
    return "%json " + json.dumps({**schema, "x-guidance": options})


def lark_of(spec: GrammarSpec) -> str:
    """The grammar in llguidance's own syntax. Raises GrammarRefused."""
    if not spec.text:
        raise GrammarRefused("it is empty")
    if len(spec.text) > TEXT_MAX:
        raise GrammarRefused(f"it has {len(spec.text)} characters, at most {TEXT_MAX} are accepted")
    lark = _written(spec)
    if any(len(found[0]) > LITERAL_MAX + 2 for found in LITERALS.finditer(lark)):
        raise GrammarRefused(f"at most {LITERAL_MAX} characters are accepted in one text or regex")
    return lark + UNFORCED


def _written(spec: GrammarSpec) -> str:
    if spec.kind == "json_schema":
        return "start: " + json_rule(_schema(spec.text), lenient=spec.lenient)
    if spec.kind == "regex":
        # \d as ASCII digits: what counts as a digit in Unicode differs from library to library.
        return f"start: /{llguidance.regex_to_lark(spec.text, use_ascii='d')}/"
    if spec.kind == "choice":
        return "start: " + " | ".join(map(json.dumps, json.loads(spec.text)))
    return spec.text if is_lark_syntax(spec.text) else _from_gbnf(spec.text)


def _schema(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise GrammarRefused(f"it is not valid JSON: {error}") from None
    except RecursionError:
        raise GrammarRefused("it is nested too deeply") from None
    if not isinstance(schema, dict):
        raise GrammarRefused("a JSON schema must be an object here")
    return schema


def _from_gbnf(text: str) -> str:
    if len(text) > GBNF_MAX:
        raise GrammarRefused(f"in GBNF at most {GBNF_MAX} characters are accepted; use Lark syntax")
    try:
        return gbnf_to_lark(text)
    except RecursionError:
        raise GrammarRefused("it is nested too deeply") from None
    except Exception as error:  # noqa: BLE001 - it raises bare Exception for whatever is wrong
        raise GrammarRefused(f"it is neither Lark (no `start:` rule) nor GBNF: {error}") from None
