"""Training rows: dense chats that put many answers behind one prompt, encoded with a loss mask.

Three kinds: `echo` (random tokens that come again), `recall` (lists of keys and values with many
questions) and `study` (the product tasks, several turns behind one set of facts or tools). Only
answers carry loss. Knows the tokenizer and the tasks, nothing of the model.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pocket.desks import BRIEF_PROMPTS, DESKS
from pocket.errands import (
    Exchange,
    add_up,
    draw_classify,
    draw_extract,
    draw_remember,
    draw_repeat,
    draw_rewrite,
    draw_total,
)
from pocket.facts import ask, draw_missing, draw_sheet, follow_up, state, tell
from pocket.tasks import TASKS, ask_about, behind, chat, row
from pocket.tools import describe, draw_tool_call, draw_tool_names
from pocket.words import Draw, numbers_fit

_ERRANDS: tuple[Callable[[Draw], Exchange], ...] = (
    draw_extract,
    draw_extract,
    draw_classify,
    draw_classify,
    draw_total,
    draw_total,
    draw_rewrite,
    draw_rewrite,
    draw_rewrite,
    draw_repeat,
)


_EMPTY_TURN = "<|im_start|>user\n<|im_end|>\n"


@dataclass(frozen=True, slots=True)
class Stage:
    """What is drawn until the share `until` of all training tokens is reached."""

    until: float
    kinds: dict[str, float]
    lengths: dict[int, float]
    desk_share: float


STAGES: tuple[Stage, ...] = (
    Stage(
        until=0.5,
        kinds={"drill": 0.12, "recall": 0.04, "study": 0.84},
        lengths={256: 0.7, 512: 0.3},
        desk_share=0.2,
    ),
    Stage(
        until=0.85,
        kinds={"drill": 0.08, "study": 0.77, "single": 0.15},
        lengths={256: 0.25, 512: 0.55, 768: 0.2},
        desk_share=0.5,
    ),
    Stage(
        until=1.01,
        kinds={"drill": 0.04, "sheet": 0.5, "study": 0.36, "single": 0.1},
        lengths={256: 0.15, 512: 0.4, 1024: 0.45},
        desk_share=0.4,
    ),
)


LONGEST_ROW = max(length for stage in STAGES for length in stage.lengths)


def stage_at(progress: float) -> Stage:
    return next(stage for stage in STAGES if progress < stage.until)


@dataclass(slots=True)
class Line:
    """Token ids of one training row; `loss` marks the ids that have to be predicted."""

    ids: list[int] = field(default_factory=list)
    loss: list[bool] = field(default_factory=list)

    def add(self, ids: list[int], loss: bool) -> None:
        self.ids += ids
        self.loss += [loss] * len(ids)


class Scribe:
    """Writes chats as token ids, exactly as the chat template does (a test compares the two)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.vocabulary = len(tokenizer)
        self._newline = self.encode("\n")
        self._end = self.encode("<|im_end|>")
        self._assistant = self.encode("<|im_start|>assistant\n")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def head(self, system: str | None, tools: list[dict[str, Any]] | None) -> Line:
        line = Line()
        if system or tools:
            messages = [*chat(system, []), {"role": "user", "content": ""}]
            offered: list[Any] | None = tools
            text = self._tokenizer.apply_chat_template(messages, tools=offered, tokenize=False)
            line.add(self.encode(str(text).removesuffix(_EMPTY_TURN)), False)
        return line

    def turn(self, exchange: Exchange, asker: str = "user") -> Line:
        line = Line()
        line.add(self.encode(f"<|im_start|>{asker}\n{exchange.user}<|im_end|>\n"), False)
        line.add(self._assistant, False)
        line.add(self.encode(exchange.answer) + self._end, True)
        line.add(self._newline, False)
        return line


def draw_echo(scribe: Scribe, rng: random.Random, length: int) -> Line:
    """Random tokens, then the same tokens again and again."""
    motif = [rng.randrange(3, scribe.vocabulary) for _ in range(rng.randint(8, length // 3))]
    line = Line()
    line.add(motif, False)
    while len(line.ids) < length:
        line.add(motif[: length - len(line.ids)], True)
    return line


def draw_drill(scribe: Scribe, rng: random.Random, length: int) -> Line:
    """Sums of two numbers as a bill writes them; only the results carry loss."""
    draw = Draw(rng, "train")
    line = Line()
    while len(line.ids) < length - 24:
        first, second = draw.number(2, 110), draw.number(2, 49)
        if numbers_fit(str(first + second), "train"):
            line.add(scribe.encode(f"{first} + {second}"), False)
            line.add(scribe.encode(f" {add_up(first, second)}, "), True)
    return line


def _fill(line: Line, turns: Callable[[], Line], length: int) -> Line:
    """Add turns while they fit; a first turn is always kept, and cut where it is too long."""
    while True:
        turn = turns()
        if len(line.ids) + len(turn.ids) > length and any(line.loss):
            return line
        line.ids += turn.ids
        line.loss += turn.loss
        if len(line.ids) >= length:
            return Line(line.ids[:length], line.loss[:length])


def draw_recall(scribe: Scribe, rng: random.Random, length: int) -> Line:
    """A list of keys and values, then keys in random order."""
    draw = Draw(rng, "train")
    makers: list[Callable[[], str]] = [
        draw.name,
        draw.code,
        lambda: str(draw.number(10, 9999)),
        draw.good,
        draw.order_code,
    ]
    key_maker, value_maker = rng.choice(makers), rng.choice(makers)
    count = rng.randint(3, length // 32 + 2)
    pairs = list({key_maker(): value_maker() for _ in range(count)}.items())
    sheet = "\n".join(f"{key}: {value}" for key, value in pairs)
    pending: list[tuple[str, str]] = []
    first = True

    def turn() -> Line:
        nonlocal pending, first
        if not pending:
            pending = rng.sample(pairs, len(pairs))
        key, value = pending.pop()
        opening = f"{sheet}\n\n" if first else ""
        first = False
        return scribe.turn(Exchange(f"{opening}{key}?", value))

    return _fill(Line(), turn, length)


def _study_facts(scribe: Scribe, draw: Draw, head: Line, length: int) -> Line:
    room = max(3, (length - len(head.ids)) // draw.rng.randint(18, 36))
    facts = draw_sheet(draw, draw.rng.randint(3, min(32, room)))
    sheet = state(facts)
    last = None
    first = True

    def turn() -> Line:
        nonlocal last, first
        chance = draw.rng.random()
        step = follow_up(draw, facts, last) if last is not None and chance < 0.3 else None
        if step is not None:
            question, last = step
            exchange = Exchange(question, tell(facts, last.entity, last.attribute))
        elif chance > 0.82:
            missing, last = draw_missing(draw, facts), None
            exchange = Exchange(ask(draw, *missing), tell(facts, *missing))
        else:
            last = draw.rng.choice(facts)
            exchange = ask_about(draw, facts, last)
        if first:
            exchange = behind(sheet, exchange)
            first = False
        return scribe.turn(exchange)

    return _fill(head, turn, length)


def _study_errands(scribe: Scribe, draw: Draw, head: Line, length: int) -> Line:
    queue = draw_remember(draw)[::-1] if draw.rng.random() < 0.35 else []

    def turn() -> Line:
        if queue and (len(queue) > 3 or draw.rng.random() < 0.7):
            return scribe.turn(queue.pop())
        return scribe.turn(draw.rng.choice(_ERRANDS)(draw))

    return _fill(head, turn, length)


def draw_study(
    scribe: Scribe, rng: random.Random, length: int, desk_share: float, sheet: bool = False
) -> Line:
    """The product tasks, several turns behind one prompt; questions about facts with `sheet`."""
    draw = Draw(rng, "train")
    system = None
    if rng.random() < desk_share and length > 256:
        system = rng.choice(DESKS)
    elif rng.random() < 0.3:
        system = rng.choice(BRIEF_PROMPTS)
    chance = rng.random()
    if sheet or chance < 0.4:
        return _study_facts(scribe, draw, scribe.head(system, None), length)
    if chance < 0.87:
        return _study_errands(scribe, draw, scribe.head(system, None), length)
    names = draw_tool_names(draw)[: 4 if length > 256 else 2]
    head = scribe.head(system, [describe(name) for name in names])
    return _fill(head, lambda: scribe.turn(draw_tool_call(draw, names)), length)


def draw_single(scribe: Scribe, rng: random.Random, length: int) -> Line:
    """One row as the evaluation asks it, from the training split."""
    while True:
        item = row(rng.choice(TASKS), "train", 0, rng.getrandbits(40))
        messages = list(item.messages)
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        line = scribe.head(system, item.tools)
        contents = [message["content"] for message in messages] + [item.answer]
        for user, answer in zip(contents[::2], contents[1::2], strict=True):
            turn = scribe.turn(Exchange(user, answer))
            line.ids += turn.ids
            line.loss += turn.loss
        if len(line.ids) <= length:
            return line


def draw_line(scribe: Scribe, rng: random.Random, stage: Stage, length: int) -> Line:
    kind = rng.choices(list(stage.kinds), list(stage.kinds.values()))[0]
    if kind == "echo":
        return draw_echo(scribe, rng, length)
    if kind == "drill":
        return draw_drill(scribe, rng, length)
    if kind == "recall":
        return draw_recall(scribe, rng, length)
    if kind == "single" and length > 256:
        return draw_single(scribe, rng, length)
    return draw_study(scribe, rng, length, stage.desk_share, sheet=kind == "sheet")


def draw_batch(
    scribe: Scribe, seed: str, progress: float, batch_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] padded on the right, and the flat positions whose next token has loss."""
    rng = random.Random(seed)
    stage = stage_at(progress)
    length = rng.choices(list(stage.lengths), list(stage.lengths.values()))[0]
    ids = torch.zeros(batch_tokens // length, length, dtype=torch.long)
    loss = torch.zeros(ids.shape, dtype=torch.bool)
    for index in range(len(ids)):
        line = draw_line(scribe, rng, stage, length)
        ids[index, : len(line.ids)] = torch.tensor(line.ids)
        loss[index, : len(line.loss)] = torch.tensor(line.loss)
    loss[:, :-1] = loss[:, 1:].clone()  # position t predicts token t + 1
    loss[:, -1] = False
    return ids, loss.flatten().nonzero().squeeze(1)
