"""The conversation with an engine's process: one JSON object a line, in and out.

Runs in the environment of any engine, so that it knows the standard library alone. Wall and CPU
time are taken here, the same way for all.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

Tokens = list[list[int]]


@dataclass(frozen=True, slots=True)
class Answers:
    """Greedy continuations in the order of the prompts; what the engine tells of the run."""

    tokens: Tokens
    facts: dict[str, float] = field(default_factory=dict)


class Opened(Protocol):
    """A loaded model."""

    facts: dict[str, Any]

    def answer(self, prompts: Tokens, new: int, threads: int) -> Answers:
        """`new` greedy tokens for each prompt, end tokens ignored, all prompts at once."""
        ...


Open = Callable[[str, str, int], Opened]  # model folder, format, threads


def serve(open_engine: Open) -> None:
    """Answers until the other side closes. What an engine prints goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    opened: Opened | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        told: dict[str, Any]
        try:
            if asked["do"] == "load":
                opened = open_engine(asked["model"], asked["format"], asked["threads"])
                told = {"facts": opened.facts}
            else:
                assert opened is not None, "load comes before run"
                told = _run(opened, asked)
        except Exception as error:  # noqa: BLE001 - of others, of any type; the other side judges
            traceback.print_exc()
            said = str(error).strip().splitlines() or [""]
            told = {"error": f"{type(error).__name__}: {said[0][:300]}"}
        _say(out, told)


def _run(opened: Opened, asked: dict[str, Any]) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), _cpu_s()
    answers = opened.answer(asked["prompts"], asked["new"], asked["threads"])
    wall_s, cpu_s = time.perf_counter() - wall, _cpu_s() - cpu
    return {"wall_s": wall_s, "cpu_s": cpu_s, "tokens": answers.tokens, "facts": answers.facts}


def _cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _say(out: TextIO, told: dict[str, Any]) -> None:
    out.write(json.dumps(told) + "\n")
    out.flush()
