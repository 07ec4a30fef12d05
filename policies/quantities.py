"""Quantities as people write them in a hypothesis: `8%`, `60s`, `30d`, `1 block`, `500 pairs`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_PERCENT = re.compile(rf"({_NUMBER})\s*%")
_DURATION = re.compile(rf"({_NUMBER})\s*(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _share(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _PERCENT.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"expected a share such as 0.02 or 2%, got {value[:40]!r}")
    return float(match[1]) / 100


def _duration(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"expected seconds, or a time such as 30s, 10m or 7d, got {value[:40]!r}")
    return float(match[1]) * _SECONDS[match[2]]


def _counted(unit: str) -> BeforeValidator:
    """`3 blocks` is 3 where blocks are counted."""

    def count(value: object) -> object:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(rf"([0-9]+)\s+{unit}s?", value.strip())
        if match is None:
            raise ValueError(f"expected a number of {unit}s such as 3 {unit}s, got {value[:40]!r}")
        return int(match[1])

    return BeforeValidator(count)


def _or_text(kind: str, pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": kind}, {"type": "string", "pattern": pattern}]})


Share = Annotated[float, BeforeValidator(_share), _or_text("number", f"^{_NUMBER}\\s*%$")]
Duration = Annotated[
    float, BeforeValidator(_duration), _or_text("number", f"^{_NUMBER}\\s*(ms|s|m|h|d)$")
]
Blocks = Annotated[int, _counted("block"), _or_text("integer", "^[0-9]+\\s+blocks?$")]
Pairs = Annotated[int, _counted("pair"), _or_text("integer", "^[0-9]+\\s+pairs?$")]
