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
    outside_cpu_s: float = 0.0  # of a process of its own that computed them


@dataclass(frozen=True, slots=True)
class Guess:
    """How tokens are guessed ahead, `count` at a time: by `draft`, a model that lies beside the
    target's folder under this name, by `ngram`, as `auto` decides, or `none`, which is what the
    others are compared with: as they do, it keeps nothing of a prompt for the next one."""

    proposer: str
    count: int


def guessing(form: str) -> tuple[str, Guess | None]:
    """FORMAT or FORMAT+PROPOSER/COUNT, as in fp32+draft/5."""
    rest, _, guess = form.partition("+")
    proposer, _, count = guess.partition("/")
    return rest, Guess(proposer, int(count)) if guess else None


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
    """All prompts at once; with a number of tokens for each, one after another."""
    new, prompts = asked["new"], asked["prompts"]
    groups = (
        [([one], most) for one, most in zip(prompts, new, strict=True)]
        if isinstance(new, list)
        else [(prompts, new)]
    )
    told: dict[str, Any] = {"wall_s": 0.0, "cpu_s": 0.0, "tokens": [], "facts": {}}
    for group, most in groups:
        wall, cpu = time.perf_counter(), _cpu_s()
        answers = opened.answer(group, most, asked["threads"])
        told["wall_s"] += time.perf_counter() - wall
        told["cpu_s"] += _cpu_s() - cpu + answers.outside_cpu_s
        told["tokens"] += answers.tokens
        for name, fact in answers.facts.items():
            told["facts"][name] = told["facts"].get(name, 0.0) + fact
    return told


def _cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _say(out: TextIO, told: dict[str, Any]) -> None:
    out.write(json.dumps(told) + "\n")
    out.flush()
