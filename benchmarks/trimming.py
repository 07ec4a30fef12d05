"""Trimming: what long conversations send and prefill by each way of cutting them, measured.

Two real workers behind the real gateway, once for each way; the model is pocket with room for more
positions than it was trained for, whose answers mean nothing and whose tokens are computed all the
same.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.lab.client import ask, body_of, open_session
from benchmarks.lab.conditions import ROOT
from benchmarks.lab.report import About, Goal, Measured, MeasurementFailed, Settings, run
from benchmarks.lab.samples import four_digits, percentile
from benchmarks.lab.stack import Stack, cpu_s, serve

_TEXT = ROOT.parent / "shared" / "data" / "text" / "tinyshakespeare.txt.gz"
_POSITIONS = 16_384
_WORKERS = 2
_ANSWER_TOKENS = 8
_CACHED_PRICE = 0.1  # of a token that is prefilled

# Budgets are in the middle of what the conversations grow to.
_WAYS: dict[str, str | None] = {
    "none": None,
    "oldest, every turn": "{drop: oldest, budget_tokens: %d, keep_share: 1}",
    "middle, every turn": "{drop: middle, budget_tokens: %d, keep_share: 1}",
    "oldest, in batches": "{drop: oldest, budget_tokens: %d, keep_share: 0.5}",
    "middle, in batches": "{drop: middle, budget_tokens: %d, keep_share: 0.5}",
    "middle, long head": "{drop: middle, budget_tokens: %d, keep_share: 0.6, head_share: 0.85}",
}
_BATCHES = ("oldest, in batches", "middle, in batches", "middle, long head")

ABOUT = About(
    name="trimming",
    measures=(
        "Conversations of real dialogue (lines of a play, an answer of eight tokens to each) that "
        "grow to thousands of tokens, through the gateway and two workers with pocket, by each way "
        "of trimming. Tells tokens sent and prefilled (all that `usage` does not count as cached), "
        "the share that was cached, cost with a cached token at a tenth of the price, time to "
        "first token, and the workers' CPU time."
    ),
    goals=(
        Goal("fewer_tokens", 0.4, "at least", "share of tokens that the best batch way saves"),
        Goal("hit_points_lost", 2.0, "at most", "points of hit share that it loses"),
        Goal("cost", 0.7, "at most", "cost of the best batch way, over none"),
    ),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    sessions: int
    turns: int
    budget_tokens: int


_FULL = Sizes(sessions=3, turns=200, budget_tokens=2800)
_QUICK = Sizes(sessions=2, turns=40, budget_tokens=512)


@dataclass(slots=True)
class Sums:
    """What all requests of one way came to, in tokens and seconds."""

    sent: int = 0
    cached: int = 0
    requests: int = 0
    ttft_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0

    def figures(self, none: Sums) -> dict[str, float]:
        mine, whole = self.cost / self.requests, none.cost / none.requests
        return {
            "sent_a_turn": self.sent / self.requests,
            "prefilled_a_turn": (self.sent - self.cached) / self.requests,
            "hit_share": self.cached / self.sent,
            "cost": mine / whole,
            "ttft_p50_ms": percentile(self.ttft_s, 50) * 1e3,
            "ttft_p95_ms": percentile(self.ttft_s, 95) * 1e3,
            "cpu_ms_a_turn": self.cpu_s / self.requests * 1e3,
        }

    @property
    def cost(self) -> float:
        return self.sent - self.cached + _CACHED_PRICE * self.cached


def main(argv: Sequence[str] | None = None) -> int:
    return run(ABOUT, measure, argv)


def measure(settings: Settings) -> Measured:
    sizes = _QUICK if settings.quick else _FULL
    lines = speeches(sizes.sessions * sizes.turns)
    sums: dict[str, Sums] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = roomy_pocket(Path(folder))
        for way, cutting in _WAYS.items():
            policy = Path(folder) / "policy.yaml"
            policy.write_text(_policy(model, cutting and cutting % sizes.budget_tokens))
            with serve(policy) as stack:
                before = sum(map(cpu_s, stack.workers))
                sums[way] = asyncio.run(_converse(stack, lines, sizes))
                sums[way].cpu_s = sum(map(cpu_s, stack.workers)) - before
            settings.progress(f"{way}: {sums[way].sent / sums[way].requests:.0f} tokens a turn")
    results = {way: one.figures(sums["none"]) for way, one in sums.items()}
    none = results["none"]
    best = min((results[way] for way in _BATCHES), key=lambda one: one["cost"])
    values = {
        "fewer_tokens": 1 - best["sent_a_turn"] / none["sent_a_turn"],
        "hit_points_lost": 100 * (none["hit_share"] - best["hit_share"]),
        "cost": best["cost"],
    }
    told = {"sessions": sizes.sessions, "turns": sizes.turns, "budget_tokens": sizes.budget_tokens}
    return Measured(four_digits(results), four_digits(values), conditions=told)


def speeches(count: int) -> list[str]:
    """What the people of a play say to each other, in order. Raises MeasurementFailed."""
    if not _TEXT.is_file():
        raise MeasurementFailed("no text to converse in: ../shared/data/text is not there")
    with gzip.open(_TEXT, "rt", encoding="utf-8") as text:
        said = (
            " ".join(lines)[:200]
            for lines in (block.split("\n")[1:] for block in text.read().split("\n\n"))
            if lines
        )
        return list(islice(said, count))


def roomy_pocket(folder: Path) -> Path:
    """A copy of pocket that takes longer prompts than it understands."""
    made = folder / "pocket-long"
    made.mkdir()
    for file in (ROOT / "pocket" / "target").iterdir():
        if file.name != "config.json":
            (made / file.name).symlink_to(file)
            continue
        config = json.loads(file.read_text())
        config["max_position_embeddings"] = _POSITIONS
        (made / file.name).write_text(json.dumps(config))
    return made


def _policy(model: Path, cutting: str | None) -> str:
    trim = f"  trim: {cutting}\n" if cutting else ""
    return (
        "version: 1\n"
        f"gateway:\n  port: 0\n{trim}"
        f"runtime:\n  model: {model.name}\n  workers: {_WORKERS}\n  threads: 1\n  compile: auto\n"
        "  kv_tokens: 49152\n"
    )


async def _converse(stack: Stack, lines: Sequence[str], sizes: Sizes) -> Sums:
    sums = Sums()
    async with asyncio.TaskGroup() as group:
        for at in range(sizes.sessions):
            mine = lines[at * sizes.turns : (at + 1) * sizes.turns]
            group.create_task(_one_session(stack, f"session {at}", mine, sums))
    return sums


async def _one_session(stack: Stack, name: str, lines: Sequence[str], sums: Sums) -> None:
    """Says one line after another and hears an answer to each."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": f"A play. This is {name}."}]
    fields = {"temperature": 0, "max_tokens": _ANSWER_TOKENS, "ignore_eos": True}
    async with open_session() as client:
        for line in lines:
            messages.append({"role": "user", "content": line})
            body = body_of(stack.model, messages, **fields)
            answer = (await ask(client, stack.url, body)).answer()
            messages.append({"role": "assistant", "content": answer.text})
            sums.requests += 1
            sums.sent += answer.usage["prompt_tokens"]
            sums.cached += answer.usage["prompt_tokens_details"]["cached_tokens"]
            sums.ttft_s.append(answer.ttft_s)


if __name__ == "__main__":
    sys.exit(main())
