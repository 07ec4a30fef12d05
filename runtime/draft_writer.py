"""Runs a draft's model ahead of the target's sequences, over the blocks that they hold.

The draft's keys and values lie in tensors of its own under the target's block numbers, so that a
block is one place of one pool for both. What a block holds of the draft is known by the hash of its
tokens: who finds the block finds both. Knows models, sequences and their laws; who writes when is
`spec_decode.draft_model`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Many
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol, cast

import torch

from runtime import sample
from runtime.attention import Span, lay_out
from runtime.costs import StepCosts, StepSize, pairs
from runtime.kv import BLOCK_TOKENS
from runtime.sequence import Sequence
from runtime.step_layout import StepLayout
from runtime.vocabulary import Vocabulary
from spec_decode.draft import Answer
from spec_decode.draft_model import Feed


class Runs(Protocol):
    """What is needed of a model."""

    @property
    def device(self) -> torch.device: ...
    @property
    def scratch_slot(self) -> int: ...
    def forward(
        self, ids: list[int], positions: list[int], layout: StepLayout, keep: list[int]
    ) -> torch.Tensor: ...


@dataclass(slots=True)
class _Read:
    """How far a sequence has been read, and how often it had given way then."""

    known: int
    preemptions: int


class ModelWriter:
    """A draft with a model of its own. `blocks` is the size of the pool that both share."""

    def __init__(
        self,
        model: Runs,
        blocks: int,
        costs: StepCosts,
        vocabulary: Vocabulary,
        *,
        timer: Callable[[], float] = perf_counter,
    ) -> None:
        self._model = model
        self._costs = costs
        self._vocabulary = vocabulary
        self._timer = timer
        self._holds: list[bytes | None] = [None] * blocks  # hash of what a block has, when complete
        self._read: dict[int, _Read] = {}
        self._context = 0  # of a sequence in the last pass, on average

    def known(self, answer: Answer) -> int:
        sequence = cast(Sequence, answer)
        read = self._read.get(sequence.key)
        if read is None or read.preemptions != sequence.preemptions:
            known = self._found(sequence)
            read = self._read[sequence.key] = _Read(known, sequence.preemptions)
        return min(read.known, len(sequence.tokens) - 1)

    def _found(self, sequence: Sequence) -> int:
        """Positions in leading blocks that somebody's draft has filled."""
        count = 0
        for block, one in zip(sequence.blocks, sequence.hashes, strict=False):
            if self._holds[block] != one:
                break
            count += 1
        return count * BLOCK_TOKENS

    def settle(self, answer: Answer, known: int) -> None:
        sequence = cast(Sequence, answer)
        self._read[sequence.key] = _Read(known, sequence.preemptions)
        full = min(known // BLOCK_TOKENS, len(sequence.hashes))
        for at in range(full - 1, -1, -1):
            block, one = sequence.blocks[at], sequence.hashes[at]
            if self._holds[block] == one:
                break
            self._holds[block] = one

    def end(self, answer: Answer) -> None:
        self._read.pop(answer.key, None)

    def read_s(self, tokens: int) -> float:
        return self._costs.prefill_s(tokens)

    def pass_s(self, rows: int) -> float:
        return self._costs.estimate(StepSize(rows, rows * self._context))

    def run(
        self, reads: Many[Feed], writes: Many[Feed]
    ) -> tuple[list[int], list[torch.Tensor | None]]:
        feeds = [*reads, *writes]
        order = sorted(range(len(feeds)), key=lambda at: len(feeds[at].tokens) > 1)
        started = self._timer()
        logits = self._forward([feeds[at] for at in order])
        rows = [0] * len(feeds)
        for row, at in enumerate(order):
            rows[at] = row
        wanted = rows[len(reads) :]
        chosen = self._choose(writes, logits if wanted == rows else logits[wanted])
        self._context = sum(feed.first for feed in feeds) // len(feeds)
        self._costs.observe(_size(feeds), self._timer() - started)
        return chosen

    def _forward(self, feeds: list[Feed]) -> torch.Tensor:
        """Logits of the last row of each feed, in the target's vocabulary."""
        ids: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        spans = []
        for feed in feeds:
            sequence = cast(Sequence, feed.answer)
            end = feed.first + len(feed.tokens)
            blocks = sequence.blocks
            spans.append(Span(end, len(feed.tokens), blocks, self._kept(sequence)))
            for at in range(feed.first // BLOCK_TOKENS, -(-end // BLOCK_TOKENS)):
                self._holds[blocks[at]] = None
            ids += self._vocabulary.to_draft(feed.tokens)
            positions += range(feed.first, end)
            keep.append(len(ids) - 1)
        layout = lay_out(spans, self._model.device, self._model.scratch_slot)
        return self._vocabulary.to_target(self._model.forward(ids, positions, layout, keep))

    def _kept(self, sequence: Sequence) -> int:  # noqa: ARG002 - others share what they write
        """Positions that are not to be written: none, what a draft writes is for itself."""
        return 0

    def _choose(
        self, writes: Many[Feed], logits: torch.Tensor
    ) -> tuple[list[int], list[torch.Tensor | None]]:
        """A token for each feed, and the law that it was drawn from where it was not certain."""
        sequences = [cast(Sequence, feed.answer) for feed in writes]
        finite = sample.finite_rows(logits)
        possible = [good and logits.shape[0] > 0 for good in finite]
        for row, (feed, sequence) in enumerate(zip(writes, sequences, strict=True)):
            if sequence.adjustment is not None and possible[row]:
                possible[row] = _adjust(feed, sequence, logits[row])
        able = [row for row, good in enumerate(possible) if good]
        tokens = [-1] * len(writes)
        laws: list[torch.Tensor | None] = [None] * len(writes)
        if not able:
            return tokens, laws
        mine = logits if len(able) == len(writes) else logits[able]
        samplings = [sequences[row].sampling for row in able]
        uniforms = [_uniform(writes[row], sequences[row]) for row in able]
        for row, token in zip(able, sample.sample(mine, samplings, uniforms), strict=True):
            tokens[row] = token
        drawn = [at for at, one in enumerate(samplings) if not one.greedy and one.seed is None]
        if drawn:
            probs = sample.laws(mine[drawn], [samplings[at] for at in drawn])
            for at, law in zip(drawn, probs, strict=True):
                laws[able[at]] = law
        return tokens, laws


class SelfWriter(ModelWriter):
    """A draft that goes on behind the target's own keys and values, in the target's own blocks.

    What it writes there lies behind the computed tokens, and verification writes over it.
    """

    def known(self, answer: Answer) -> int:
        return cast(Sequence, answer).computed

    def settle(self, answer: Answer, known: int) -> None:
        """Nothing is kept: the target computes every token itself."""

    def _kept(self, sequence: Sequence) -> int:
        return sequence.sealed * BLOCK_TOKENS


def _adjust(feed: Feed, sequence: Sequence, row: torch.Tensor) -> bool:
    """Changes a row [V] as its request asks for; False where nothing may follow.

    Guesses are remembered until `Adjustment.keep` takes them back.
    """
    adjustment = sequence.adjustment
    assert adjustment is not None
    if feed.first >= len(sequence.tokens):
        adjustment.guess(feed.tokens[-1])
    else:
        adjustment.keep(0)
    mine = row.cpu()
    possible = adjustment.apply(mine.numpy()) is None
    if row.is_cuda:
        row.copy_(mine)
    return possible


def _uniform(feed: Feed, sequence: Sequence) -> float | None:
    """The number that a guess is drawn by. With a seed it is the one that the target will draw the
    same place by: the guess is then certain, and the answer the same whatever is guessed."""
    if sequence.rng is None:
        return None
    if sequence.sampling.seed is None:
        return sequence.rng.random()
    return sequence.peek(feed.first + len(feed.tokens) - len(sequence.tokens))


def _size(feeds: Many[Feed]) -> StepSize:
    tokens = context = looked = 0
    for feed in feeds:
        tokens += len(feed.tokens)
        if len(feed.tokens) == 1:
            context += feed.first + 1
        else:
            looked += pairs(len(feed.tokens), feed.first)
    return StepSize(tokens, context, looked)
