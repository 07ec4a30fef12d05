"""Rows of the product tasks, without limit, each made again by its task, split, seed and index.

    for row in rows("find", "test", seed=0, count=5): ...

A row is a chat that ends in a user turn, and the one right answer. Names, codes and numbers of
the test split never occur in training (see `pocket.words`). This module knows nothing of models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pocket.desks import BRIEF_PROMPTS, DESKS
from pocket.errands import (
    Exchange,
    draw_classify,
    draw_extract,
    draw_remember,
    draw_repeat,
    draw_rewrite,
    draw_total,
)
from pocket.facts import (
    Fact,
    ask,
    draw_missing,
    draw_sheet,
    follow_up,
    state,
    tell,
)
from pocket.tools import describe, draw_tool_call, draw_tool_names
from pocket.words import Draw

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One task for the model: `messages` end in the user turn that `answer` answers."""

    task: str
    messages: list[Message]
    answer: str
    tools: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class Scene:
    """The exchanges of one chat, oldest first, and the tools that it offers."""

    exchanges: list[Exchange]
    tools: list[dict[str, Any]] | None = None


def ask_about(draw: Draw, facts: list[Fact], fact: Fact) -> Exchange:
    question = ask(draw, fact.entity, fact.attribute)
    return Exchange(question, tell(facts, fact.entity, fact.attribute))


def behind(sheet: str, exchange: Exchange) -> Exchange:
    """The exchange with the sheet of facts in front of its question."""
    return Exchange(f"{sheet}\n\n{exchange.user}", exchange.answer)


def _answer(draw: Draw) -> Scene:
    facts = draw_sheet(draw, draw.rng.randint(3, 8))
    return Scene([behind(state(facts), ask_about(draw, facts, draw.rng.choice(facts)))])


def _find(draw: Draw) -> Scene:
    facts = draw_sheet(draw, draw.rng.randint(16, 32))
    return Scene([behind(state(facts), ask_about(draw, facts, draw.rng.choice(facts)))])


def _unknown(draw: Draw) -> Scene:
    facts = draw_sheet(draw, draw.rng.randint(3, 10))
    entity, attribute = draw_missing(draw, facts)
    exchange = Exchange(ask(draw, entity, attribute), tell(facts, entity, attribute))
    return Scene([behind(state(facts), exchange)])


def _talk(draw: Draw) -> Scene:
    """A question about a sheet, then one that leans on it; or a greeting, asked for later."""
    if draw.rng.random() < 0.4:
        remembered = draw_remember(draw)
        return Scene(remembered[: draw.rng.randint(2, len(remembered))])
    while True:
        facts = draw_sheet(draw, draw.rng.randint(4, 10))
        first = draw.rng.choice(facts)
        step = follow_up(draw, facts, first)
        if step is not None:
            question, fact = step
            opening = behind(state(facts), ask_about(draw, facts, first))
            return Scene([opening, Exchange(question, tell(facts, fact.entity, fact.attribute))])


def _tool(draw: Draw) -> Scene:
    names = draw_tool_names(draw)
    return Scene([draw_tool_call(draw, names)], [describe(name) for name in names])


def _alone(draw_exchange: Callable[[Draw], Exchange]) -> Callable[[Draw], Scene]:
    return lambda draw: Scene([draw_exchange(draw)])


_SCENES: dict[str, Callable[[Draw], Scene]] = {
    "answer": _answer,
    "find": _find,
    "extract": _alone(draw_extract),
    "classify": _alone(draw_classify),
    "total": _alone(draw_total),
    "rewrite": _alone(draw_rewrite),
    "repeat": _alone(draw_repeat),
    "tool": _tool,
    "unknown": _unknown,
    "talk": _talk,
}
TASKS: tuple[str, ...] = tuple(_SCENES)


def draw_system(rng: random.Random) -> str | None:
    """A desk's long prompt for three rows of five, a brief one or none for the others."""
    chance = rng.random()
    if chance < 0.6:
        return rng.choice(DESKS)
    return rng.choice(BRIEF_PROMPTS) if chance < 0.8 else None


def chat(system: str | None, exchanges: list[Exchange]) -> list[Message]:
    """The whole chat as messages, the last answer included."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for exchange in exchanges:
        messages.append({"role": "user", "content": exchange.user})
        messages.append({"role": "assistant", "content": exchange.answer})
    return messages


def row(task: str, split: str, seed: int, index: int) -> Row:
    """The row at `index`; the same four arguments always give the same row."""
    if task not in _SCENES:
        raise ValueError(f"task is {task!r}, expected one of {', '.join(TASKS)}")
    rng = random.Random(f"{task}/{split}/{seed}/{index}")
    system = draw_system(rng)
    scene = _SCENES[task](Draw(rng, split))
    messages = chat(system, scene.exchanges)
    return Row(task, messages[:-1], scene.exchanges[-1].answer, scene.tools)


def rows(task: str, split: str, seed: int, count: int) -> Iterator[Row]:
    """The first `count` rows of a task."""
    for index in range(count):
        yield row(task, split, seed, index)


__all__ = ["TASKS", "Message", "Row", "Scene", "row", "rows"]
