"""A few minutes at a support desk, as recorded traffic: what `headgate gate` replays.

Requests of the held-out tasks with the times that they come at: one-off questions behind the
desks' long prompts, talks that grow turn by turn, and questions that are asked again word for word.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from pocket.desks import BRIEF_PROMPTS, DESKS
from pocket.errands import Exchange, draw_repeat, draw_rewrite, draw_total
from pocket.facts import draw_sheet, state
from pocket.tasks import Message, ask_about, behind, chat, row
from pocket.words import Draw

SEED = 13
LENGTH_S = 240.0
SINGLES = 480
TALKS = 60
TALK_TURNS = 4
TURN_S = (4.0, 15.0)  # from one turn of a talk to the next
AGAIN = 0.35  # of the one-off questions were asked before
# Tier -> its share; batches are what reads long sheets.
TIERS = {"interactive": 0.6, "standard": 0.3, "batch": 0.1}
_SINGLE_TASKS = ("answer", "extract", "classify", "total", "rewrite", "repeat", "unknown")
ANSWER_TOKENS = 96

LONG_TALKS = 34
LONG_TURNS = 28


def day() -> Iterator[dict[str, Any]]:
    """Rows of a replay, by their times."""
    yield from sorted([*_singles(), *_talks()], key=lambda one: one["t_ms"])


def _singles() -> Iterator[dict[str, Any]]:
    rng = random.Random(f"singles/{SEED}")
    asked: list[dict[str, Any]] = []
    for index in range(SINGLES):
        tier = rng.choices(list(TIERS), list(TIERS.values()))[0]
        if asked and rng.random() < AGAIN:
            told = rng.choice(asked)
        else:
            made = row(
                "find" if tier == "batch" else rng.choice(_SINGLE_TASKS), "test", SEED, index
            )
            messages = [one for one in made.messages if one["role"] != "system"]
            system = {"role": "system", "content": rng.choice(DESKS)}
            told = {"body": _body([system, *messages]), "expected": made.answer, "tier": tier}
            asked.append(told)
        t_ms = round(rng.uniform(0, LENGTH_S) * 1000)
        name = f"single-{index:03d}"
        yield {"id": name, "t_ms": t_ms, "session": name, "tenant": f"shop-{index % 4}", **told}


def _talks() -> Iterator[dict[str, Any]]:
    for index in range(TALKS):
        rng = random.Random(f"talks/{SEED}/{index}")
        draw = Draw(rng, "test")
        facts = draw_sheet(draw, rng.randint(6, 14))
        said: list[Exchange] = [
            ask_about(draw, facts, fact) for fact in rng.sample(facts, TALK_TURNS)
        ]
        said[0] = behind(state(facts), said[0])
        messages = chat(rng.choice(DESKS), said)
        at_s = rng.uniform(0, LENGTH_S - TALK_TURNS * TURN_S[1])
        for turn, exchange in enumerate(said):
            yield {
                "id": f"talk-{index:03d}-{turn}",
                "t_ms": round(at_s * 1000),
                "session": f"talk-{index:03d}",
                "turn": turn,
                "tenant": f"shop-{index % 4}",
                "body": _body(messages[: 2 + 2 * turn]),
                "expected": exchange.answer,
                "tier": "interactive",
            }
            at_s += rng.uniform(*TURN_S)


def _body(messages: list[Message]) -> dict[str, Any]:
    return {"messages": messages, "max_tokens": ANSWER_TOKENS, "temperature": 0}


def long_talks() -> Iterator[dict[str, Any]]:
    """Rows of a suite: talks of many short errands, each of which says all that it needs."""
    for index in range(LONG_TALKS):
        rng = random.Random(f"long/{SEED}/{index}")
        draw = Draw(rng, "test")
        errands = (draw_repeat, draw_rewrite, draw_total)
        said = [rng.choice(errands)(draw) for _ in range(LONG_TURNS)]
        yield {
            "id": f"long-{index:03d}",
            "conversation": f"long-{index:03d}",
            "system": rng.choice(BRIEF_PROMPTS),
            "turns": [{"user": one.user, "expected": one.answer} for one in said],
        }
