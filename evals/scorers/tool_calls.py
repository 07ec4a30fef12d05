"""Answers that are tool calls, compared as BFCL's syntax-tree check does (Patil et al. 2024).

A row expects calls as `{"name": ..., "arguments": {...}}`, or as BFCL writes them: `{name:
{argument: [allowed values]}}`, where "" among them makes the argument optional. Order is free; an
empty list expects no call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from evals.dataset import value_of
from evals.item import Item
from policies.suite import Scorer
from telemetry import Observation

_LOOSE = re.compile(r"[ ,./\-_*^]")  # BFCL compares texts without these, and without case
_NAME = re.compile(r"[^A-Za-z0-9_-]")  # OpenAI's names have no dots, BFCL's have
_OPTIONAL = ""
_Allowed = Mapping[str, Sequence[Any]]  # argument -> values


def called(scorer: Scorer, item: Item, seen: Observation) -> float:
    """Every expected call, and no other."""
    expected = wanted_calls(value_of(item, scorer.field))
    got = [read_call(call) for call in seen.tool_calls]
    if len(got) != len(expected) or any(one is None for one in got):
        return 0.0
    left = [one for one in got if one is not None]
    return float(_all_matched(expected, left))


def wanted_calls(expected: Any) -> list[tuple[str, _Allowed]]:
    """Name and allowed values of each expected call. Raises ValueError for another shape."""
    calls: list[tuple[str, _Allowed]] = []
    for one in expected if isinstance(expected, list) else [expected]:
        if not isinstance(one, dict):
            raise ValueError("expected calls such as {'name': ..., 'arguments': {...}}")
        if isinstance(one.get("arguments"), dict) and "name" in one:
            calls.append((str(one["name"]), {k: [v] for k, v in one["arguments"].items()}))
            continue
        for name, allowed in one.items():
            if not isinstance(allowed, dict) or not all(
                isinstance(values, list) for values in allowed.values()
            ):
                raise ValueError(f"expected lists of allowed values for the arguments of {name}")
            calls.append((name, allowed))
    return calls


def read_call(call: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a call as OpenAI's answers have it, None where they are not JSON."""
    function = call.get("function") or {}
    try:
        arguments = orjson.loads(function.get("arguments") or "{}")
    except orjson.JSONDecodeError:
        return None
    if not isinstance(arguments, dict):
        return None
    return str(function.get("name", "")), arguments


def _all_matched(
    expected: list[tuple[str, _Allowed]], got: list[tuple[str, dict[str, Any]]]
) -> bool:
    """Whether each expected call has one of its own among those made, in any order."""
    if not expected:
        return True
    first, *rest = expected
    return any(
        _matches(first, one) and _all_matched(rest, got[:at] + got[at + 1 :])
        for at, one in enumerate(got)
    )


def _matches(expected: tuple[str, _Allowed], got: tuple[str, dict[str, Any]]) -> bool:
    name, allowed = expected
    if _NAME.sub("_", name) != _NAME.sub("_", got[0]):
        return False
    arguments = got[1]
    if any(one not in allowed for one in arguments):
        return False
    return all(
        any(same(arguments[one], value) for value in values)
        if one in arguments
        else _OPTIONAL in values
        for one, values in allowed.items()
    )


def same(got: Any, expected: Any) -> bool:
    """Whether a value is the one that is allowed. Within a mapping BFCL lists values again."""
    if isinstance(expected, bool) or isinstance(got, bool):
        return got is expected
    if isinstance(expected, str) and isinstance(got, str):
        return _loose(got) == _loose(expected)
    if isinstance(expected, list) and isinstance(got, list):
        return len(got) == len(expected) and all(
            same(a, b) for a, b in zip(got, expected, strict=True)
        )
    if isinstance(expected, dict) and isinstance(got, dict):
        return set(got) <= set(expected) and all(
            _inside(got, key, value) for key, value in expected.items()
        )
    return bool(got == expected)


def _inside(got: Mapping[str, Any], key: str, value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    if key not in got:
        return _OPTIONAL in values
    return same(got[key], value) or any(same(got[key], one) for one in values)


def _loose(text: str) -> str:
    return _LOOSE.sub("", text).lower().replace("'", '"')
