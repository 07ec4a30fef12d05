"""A model whose whole law is known: the next token depends on the last two, by a table.

It keeps tokens where a real one keeps keys and values, in the pool's slots, and looks them up
there: a block that is stale, foreign or overwritten shows at once.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from cache.tokens import Tokenizer
from runtime.engine import Engine
from runtime.inbox import Order
from runtime.kv import BLOCK_TOKENS
from runtime.sequence import Sampling, Sequence
from runtime.step_layout import StepLayout
from runtime.tally import Tally
from tests.runtime.tiny_models import VOCAB, write_tokenizer

LETTERS = "abcd"
NEVER = -1e9


class TableModel:
    """Quacks like `runtime.model.Model`, as far as an engine needs it."""

    device = torch.device("cpu")
    vocab_size = VOCAB
    context_tokens = 4096

    def __init__(
        self, ids: list[int], seed: int, *, blocks: int = 256, spread: float = 1.5
    ) -> None:
        rng = random.Random(seed)
        self.ids = ids
        self.learn({(one, two): [rng.gauss(0, spread) for _ in ids] for one in ids for two in ids})
        self.blocks = blocks
        self.scratch_slot = blocks * BLOCK_TOKENS
        self.rows = 0  # computed so far
        self._kept: dict[int, tuple[int, int]] = {}

    def learn(self, table: dict[tuple[int, int], list[float]]) -> None:
        self.table = table
        self._row_of = {pair: row for row, pair in enumerate(table)}
        self._logits = torch.full((len(table), VOCAB), NEVER)
        self._logits[:, self.ids] = torch.tensor(list(table.values()))

    def logits_behind(self, one: int, two: int) -> list[float]:
        return self.table[one, two]

    def like(self, noise: float, seed: int) -> TableModel:
        """Another model that says about the same."""
        other = TableModel(self.ids, seed, blocks=self.blocks)
        rng = random.Random(seed)
        other.learn(
            {pair: [one + rng.gauss(0, noise) for one in row] for pair, row in self.table.items()}
        )
        return other

    def forward(
        self, ids: list[int], positions: list[int], layout: StepLayout, keep: list[int]
    ) -> torch.Tensor:
        self.rows += len(ids)
        for slot, token, position in zip(layout.slots.tolist(), ids, positions, strict=True):
            if slot != self.scratch_slot:
                self._kept[slot] = (position, token)
        rows = []
        owners = [
            (start, span)
            for start, span in zip(layout.starts, layout.spans, strict=True)
            for _ in range(span.count)
        ]
        for row in keep:
            start, span = owners[row]
            at = positions[row]
            if span.parents is not None and row > start:
                pair = [ids[start + 1 + span.parents[row - start - 1]], ids[row]]
            else:
                pair = [self._token(span.blocks, max(place, 0)) for place in (at - 1, at)]
            rows.append(self._row_of[pair[0], pair[1]])
        return self._logits[rows]

    def move(self, origins: list[int], targets: list[int]) -> None:
        moved = [self._kept[slot] for slot in origins]
        self._kept.update(zip(targets, moved, strict=True))

    def _token(self, blocks: list[int], at: int) -> int:
        slot = blocks[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS
        position, token = self._kept[slot]
        assert position == at, f"position {at} is looked up where {position} was written"
        return token

    def wipe(self, blocks: list[int]) -> None:
        for block in blocks:
            for at in range(BLOCK_TOKENS):
                self._kept.pop(block * BLOCK_TOKENS + at, None)


class Checked(Tally):
    """Fails the step in which an answer ends whose tokens do not add up."""

    def ended(self, sequence: Sequence, reason: str, now: float) -> None:
        super().ended(sequence, reason, now)
        assert not any(self.violations.values()), self.violations


class World:
    """A table model with a tokenizer, and engines over it."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        write_tokenizer(folder)
        self.tokenizer = Tokenizer.load(folder)
        self.ids = [self.tokenizer.encode(letter, special=False)[0] for letter in LETTERS]
        self.model = TableModel(self.ids, seed)

    def encode(self, text: str) -> list[int]:
        return [self.ids[LETTERS.index(letter)] for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(LETTERS[self.ids.index(token)] for token in tokens)

    def engine(self, speculation: Any = None, **limits: Any) -> Engine:
        model: Any = self.model
        more = {"listeners": [Checked(model.context_tokens)], "speculation": speculation, **limits}
        return Engine(model, self.tokenizer, emit=lambda _: None, **more)


def answers(
    engine: Engine, prompts: list[list[int]], samplings: list[Sampling], **order: Any
) -> list[list[int]]:
    """What each prompt is answered, all at once; random rows draw by generators of their own
    number."""
    keys = engine.submit(
        [
            Order(prompt, sampling, **order)
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
    )
    engine.take_orders(wait=False)
    for number, key in enumerate(keys):
        sequence, _ = engine._replies[key]
        if sequence.rng is not None and sequence.sampling.seed is None:
            sequence.rng = random.Random(number)
    said: dict[int, list[int]] = {key: [] for key in keys}
    while engine.load().running or engine.load().waiting:
        for output in engine.step():
            assert output.error is None, output.error
            said[output.key] += output.token_ids
    engine.check()
    counts = engine.load().blocks
    assert counts.in_use == 0
    return [said[key] for key in keys]
