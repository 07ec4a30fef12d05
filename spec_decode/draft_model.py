"""A small model that guesses: it reads what the answer gained, then writes ahead, pass by pass.

Knows how far it has read each answer; how it is run is its `Writer`'s business. Its keys and values
lie in the blocks that the answer holds anyway. What it wrote behind a refused guess is overwritten
by what it reads next, so rolling back is a number.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

import torch

from spec_decode.draft import Answer, Draft, Outlook, Proposer

# A prompt is read in portions, so that no step waits for all of it.
READ_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Feed:
    """Tokens of an answer, from position `first` on, that the model reads or has just guessed."""

    answer: Answer
    first: int
    tokens: Many[int]


class Writer(Protocol):
    """Runs the draft's model over its own keys and values."""

    def known(self, answer: Answer) -> int:
        """Positions from the first on whose keys and values are there: less than all tokens."""

    def run(
        self, reads: Many[Feed], writes: Many[Feed]
    ) -> tuple[list[int], list[torch.Tensor | None]]:
        """One pass. For each of `writes` a token that may follow, -1 for none, and the law [V] that
        it was drawn from, None where it is certain."""

    def settle(self, answer: Answer, known: int) -> None:
        """So many positions, from the first on, hold the answer's own tokens."""

    def end(self, answer: Answer) -> None: ...

    def read_s(self, tokens: int) -> float:
        """Seconds to read so many tokens."""

    def pass_s(self, rows: int) -> float:
        """Seconds of a pass that writes for so many answers."""


class DraftModel(Proposer):
    """Guesses with a model of its own. `self` drafting is the same with another writer."""

    def __init__(self, writer: Writer, name: str = "draft") -> None:
        self.name = name
        self._writer = writer
        self._guessed: dict[int, int] = {}  # guesses under way

    def outlook(self, answer: Answer, most: int) -> Outlook | None:
        return Outlook(most, behind=len(answer.tokens) - self._writer.known(answer) - 1)

    def pass_s(self, rows: int) -> float:
        return self._writer.pass_s(rows)

    def read_s(self, tokens: int) -> float:
        return self._writer.read_s(tokens) if tokens > 1 else 0.0

    def propose(self, wanted: Many[tuple[Answer, int]]) -> list[Draft | None]:
        """Chains of as many tokens as wanted; None for answers that are still being read."""
        reads: list[Feed] = []
        writes: list[Feed] = []
        places: list[int] = []
        room = READ_TOKENS
        for at, (answer, _) in enumerate(wanted):
            first = self._writer.known(answer)
            end = min(len(answer.tokens), first + max(room, 2))
            room -= end - first
            feed = Feed(answer, first, answer.tokens[first:end])
            if end == len(answer.tokens):
                writes.append(feed)
                places.append(at)
            else:
                reads.append(feed)
                self._writer.settle(answer, end)
        drafts = self._write(wanted, reads, writes, places)
        for feed, at in zip(writes, places, strict=True):
            draft = drafts[at]
            # Of the guesses nobody knows yet whether they are right; `settle` adds those that are.
            self._writer.settle(feed.answer, len(feed.answer.tokens))
            self._guessed[feed.answer.key] = 0 if draft is None else len(draft.ids)
        return drafts

    def _write(
        self,
        wanted: Many[tuple[Answer, int]],
        reads: list[Feed],
        writes: list[Feed],
        places: list[int],
    ) -> list[Draft | None]:
        ids: dict[int, list[int]] = {at: [] for at in places}
        laws: dict[int, list[torch.Tensor]] = {at: [] for at in places}
        while writes or reads:
            chosen, drawn_from = self._writer.run(reads, writes)
            going_on: list[Feed] = []
            still: list[int] = []
            for feed, token, law, at in zip(writes, chosen, drawn_from, places, strict=True):
                if token < 0:  # nothing that this model knows may follow
                    continue
                ids[at].append(token)
                if law is not None:
                    laws[at].append(law)
                if len(ids[at]) < wanted[at][1] and token not in feed.answer.ends:
                    going_on.append(Feed(feed.answer, feed.first + len(feed.tokens), [token]))
                    still.append(at)
            reads, writes, places = [], going_on, still
        return [
            Draft(ids[at], torch.stack(laws[at]) if laws[at] else None) if ids.get(at) else None
            for at in range(len(wanted))
        ]

    def settle(self, answer: Answer, accepted: int) -> None:
        """What was written behind the accepted guesses is forgotten. The last guess of all was
        never fed: it is read next where all were right."""
        written = max(self._guessed.pop(answer.key, 0) - 1, 0)
        self._writer.settle(answer, len(answer.tokens) + min(written, accepted))

    def end(self, answer: Answer) -> None:
        self._guessed.pop(answer.key, None)
        self._writer.end(answer)
