"""What a row expects, checked before anything is asked: an expectation that no answer can meet
would count against both arms alike, and hide what is between them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from evals.dataset import value_of
from evals.item import Item
from evals.scorers.instructions import CHECKS, UnknownInstruction, wanted
from evals.scorers.json_answers import schema_for
from evals.scorers.languages import KNOWN
from evals.scorers.text import numbers
from evals.scorers.tool_calls import wanted_calls
from policies.problems import closest
from policies.suite import Scorer, ScorerKind

Unmeetable = tuple[str, str | None]  # why, and what was meant


def unmeetable(scorer: Scorer, item: Item) -> Unmeetable | None:
    if scorer.kind in _ANY_OF and value_of(item, scorer.field) == []:
        return "is an empty list: no answer could be right", None
    check = _CHECKS.get(scorer.kind)
    return None if check is None else check(scorer, item)


def _regex(scorer: Scorer, item: Item) -> Unmeetable | None:
    for one in [] if scorer.pattern is not None else _listed(value_of(item, scorer.field)):
        try:
            re.compile(str(one))
        except re.error as error:
            return f"{one!r} is no regular expression: {error}", None
    return None


def _json(scorer: Scorer, item: Item) -> Unmeetable | None:
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    schema = schema_for(scorer, item)
    try:
        if schema is not None:
            validator_for(schema).check_schema(dict(schema))
    except SchemaError as error:
        return f"{scorer.called}: the JSON Schema is none: {error.message}", None
    return None


def _code(scorer: Scorer, item: Item) -> Unmeetable | None:
    is_source = isinstance(value_of(item, scorer.field), str)
    return None if is_source else ("expected the source of the tests, a text", None)


def _numeric(scorer: Scorer, item: Item) -> Unmeetable | None:
    for one in _listed(value_of(item, scorer.field)):
        is_number = isinstance(one, int | float) and not isinstance(one, bool)
        if not is_number and not (isinstance(one, str) and numbers(one)):
            return f"{one!r} holds no number", None
    return None


def _choice(scorer: Scorer, item: Item) -> Unmeetable | None:
    for one in _listed(value_of(item, scorer.field)):
        if str(one).strip() not in scorer.choices:
            return f"{one!r} is none of the choices {', '.join(scorer.choices)}", None
    return None


def _fields(scorer: Scorer, item: Item) -> Unmeetable | None:
    expected = value_of(item, scorer.field)
    if isinstance(expected, str):
        try:
            expected = orjson.loads(expected)
        except orjson.JSONDecodeError as error:
            return f"is not JSON: {error}", None
    return None if isinstance(expected, dict) else ("expected a mapping of fields", None)


def _tool_calls(scorer: Scorer, item: Item) -> Unmeetable | None:
    try:
        wanted_calls(value_of(item, scorer.field))
    except ValueError as error:
        return str(error), None
    return None


def _instructions(scorer: Scorer, item: Item) -> Unmeetable | None:
    try:
        listed = wanted(scorer, item)
    except UnknownInstruction as error:
        name = str(error)
        return f"there is no check for {name!r}", closest(name, list(CHECKS))
    except ValueError as error:
        return str(error), None
    for name, arguments in listed:
        try:
            CHECKS[name]("A text.", arguments)
            if name == _LANGUAGE and arguments["language"] not in KNOWN:
                return f"languages that are told: {', '.join(sorted(KNOWN))}", None
        except (KeyError, TypeError, ValueError) as error:
            return f"{name} lacks an argument: {error!r}", None
    return None


def _listed(expected: Any) -> list[Any]:
    return expected if isinstance(expected, list) else [expected]


_LANGUAGE = "language:response_language"
_ANY_OF: tuple[ScorerKind, ...] = ("exact", "contains", "regex", "numeric", "choice", "f1")
_CHECKS: Mapping[ScorerKind, Callable[[Scorer, Item], Unmeetable | None]] = {
    "numeric": _numeric,
    "choice": _choice,
    "fields": _fields,
    "tool_calls": _tool_calls,
    "instructions": _instructions,
    "regex": _regex,
    "json": _json,
    "code": _code,
}
