"""Suites of held-out rows and a replay, as `headgate gate` reads them: `python -m pocket.suites`.

Writes the .jsonl files of evals/data again, byte for byte; `--out` writes elsewhere. The
seed is one that no training and no choice of the recipe has looked at.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pocket.errands import draw_rewrite, draw_total
from pocket.facts import draw_sheet, state
from pocket.tasks import TASKS, ask_about, behind, draw_system, row
from pocket.traffic import day, long_talks
from pocket.words import Draw

SEED = 11
ROWS_A_TASK = 100
CONVERSATIONS = 160
TURNS = 6
TEXTS = 240
_PLAIN = tuple(task for task in TASKS if task != "tool")  # whose template has no list of tools
_OUT = Path(__file__).parents[1] / "evals" / "data"
_Made = Iterator[dict[str, Any]]


def tasks() -> _Made:
    """Every task, its rows one conversation each; what a tool call is expected as, is a call."""
    for index in range(ROWS_A_TASK):
        for task in TASKS:
            made = row(task, "test", SEED, index)
            form = "call" if made.tools else "text"
            told: dict[str, Any] = {"id": f"{task}-{index:03d}", "task": task, "form": form}
            told["messages"] = made.messages
            if made.tools:
                told["tools"] = made.tools
                call = made.answer.removeprefix("<tool_call>").removesuffix("</tool_call>")
                told["expected"] = [json.loads(call)]
            else:
                told["expected"] = made.answer
            yield told


def conversations() -> _Made:
    """A sheet of facts, and questions about it between small errands, up to the last turn: what
    was said first is needed to the end.
    """
    for index in range(CONVERSATIONS):
        rng = random.Random(f"conversation/test/{SEED}/{index}")
        draw = Draw(rng, "test")
        facts = draw_sheet(draw, rng.randint(4, 8))
        asked = rng.sample(facts, TURNS // 2)
        exchanges = []
        for turn in range(TURNS):
            if turn % 2:
                exchanges.append(rng.choice((draw_total, draw_rewrite))(draw))
            else:
                exchanges.append(ask_about(draw, facts, asked[turn // 2]))
        exchanges[0] = behind(state(facts), exchanges[0])
        told: dict[str, Any] = {"id": f"talk-{index:03d}", "conversation": f"talk-{index:03d}"}
        if system := draw_system(rng):
            told["system"] = system
        told["turns"] = [{"user": one.user, "expected": one.answer} for one in exchanges]
        yield told


def texts() -> _Made:
    """Chats with their right answers as one text, as the model's template writes them: how likely
    it finds each token.
    """
    for index in range(TEXTS):
        made = row(_PLAIN[index % len(_PLAIN)], "test", SEED + 1, index)
        said = [*made.messages, {"role": "assistant", "content": made.answer}]
        turns = [f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>" for one in said]
        text = "\n".join(turns)
        told = {"id": f"text-{index:03d}", "prompt": text, "echo": True, "logprobs": 1}
        yield {**told, "scored_from": len(text) - len(f"{made.answer}<|im_end|>")}


FILES: dict[str, Callable[[], _Made]] = {
    "pocket.jsonl": tasks,
    "pocket-chat.jsonl": conversations,
    "pocket-text.jsonl": texts,
    "pocket-long.jsonl": long_talks,
    "replays/pocket-day.jsonl": day,
}


def text_of(name: str) -> str:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in FILES[name]())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=_OUT, help="folder to write to")
    folder: Path = parser.parse_args().out
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text_of(name), encoding="utf-8")
        print(folder / name)


if __name__ == "__main__":
    main()
