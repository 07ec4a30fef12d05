"""Answers that are JSON: valid by a schema, or field by field. A fence around is no mistake."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from evals.dataset import value_of
from evals.item import Item
from evals.scorers.text import close, normal
from policies.suite import Scorer
from telemetry import Observation

_FENCE = re.compile(r"```(?:json|JSON)?\s*\n(.*?)\n?```", re.DOTALL)
_NOTHING = object()


def parsed(text: str) -> Any:
    """The JSON of an answer, in its last fence if it has one. Raises ValueError."""
    fenced = _FENCE.findall(text)
    return orjson.loads(fenced[-1] if fenced else text.strip())


def valid(scorer: Scorer, item: Item, seen: Observation) -> float:
    """JSON, and as the scorer's schema wants it, or else the one that the request itself named."""
    try:
        answer = parsed(seen.text)
    except ValueError:
        return 0.0
    schema = schema_for(scorer, item)
    if schema is None:
        return 1.0
    from jsonschema import ValidationError
    from jsonschema.validators import validator_for

    try:
        validator_for(schema)(schema).validate(answer)
    except ValidationError:
        return 0.0
    return 1.0


def schema_for(scorer: Scorer, item: Item) -> Mapping[str, Any] | None:
    if scorer.json_schema is not None:
        return scorer.json_schema
    form = item.body.get("response_format")
    named = form.get("json_schema") if isinstance(form, dict) else None
    schema = named.get("schema") if isinstance(named, dict) else None
    return schema if isinstance(schema, dict) else None


def fields(scorer: Scorer, item: Item, seen: Observation) -> float:
    """The share of the expected fields that are right; numbers within the tolerance."""
    expected = value_of(item, scorer.field)
    if isinstance(expected, str):
        expected = orjson.loads(expected)
    try:
        answer = parsed(seen.text)
    except ValueError:
        return 0.0
    keys = scorer.keys or tuple(leaves(expected))
    if not keys:
        return float(answer == expected)
    return sum(_same(scorer, at(answer, key), at(expected, key)) for key in keys) / len(keys)


def leaves(value: Any, prefix: str = "") -> list[str]:
    """`a.b` for every field that is no mapping itself."""
    if not isinstance(value, dict):
        return [prefix] if prefix else []
    return [
        name
        for key, inner in value.items()
        for name in leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    ]


def at(value: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return _NOTHING
        value = value[part]
    return value


def _same(scorer: Scorer, got: Any, expected: Any) -> bool:
    if isinstance(expected, bool) or isinstance(got, bool):
        return got is expected
    if isinstance(expected, int | float) and isinstance(got, int | float):
        return close(float(got), float(expected), scorer)
    if isinstance(expected, str) and isinstance(got, str):
        return normal(got, scorer.ignore) == normal(expected, scorer.ignore)
    if isinstance(expected, list) and isinstance(got, list):
        pairs = zip(got, expected, strict=False)
        return len(got) == len(expected) and all(_same(scorer, a, b) for a, b in pairs)
    return bool(got == expected)
