"""What is guessed, and what every proposer has to offer: `Draft`, `Answer`, `Proposer`.

Knows no proposer by name. An engine asks all of them for their outlook, which costs next to
nothing, lets `adapt` choose whom to ask for how many tokens, and tells them what came of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence as Many, Set
from dataclasses import dataclass
from typing import Protocol

import torch

# Guesses for one answer in one step, at most: with its own next token a span of 16.
GUESSES_MAX = 15


class Answer(Protocol):
    """An answer in the making, as proposers see it."""

    key: int
    tokens: list[int]  # prompt, then answer

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def group(self) -> Hashable:
        """Only answers of one group may learn from each other's text."""

    @property
    def prediction(self) -> Many[int]:
        """What its client expects it to be; empty where nothing was said."""

    @property
    def ends(self) -> Set[int]:
        """Tokens behind which nothing of it follows."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a proposer could guess for an answer: up to `most` tokens.

    `trust` is on the proposer's own scale: guesses of equal trust share a history of acceptance.
    `behind` is how many tokens it would have to read first, where reading costs.
    """

    most: int
    trust: int = 0
    behind: int = 0


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may follow. `probs` [len(ids), V] is the law that they were drawn from, None
    where each of them was certain.

    `parents` makes a tree of them: the number of the guess before each one, -1 for the answer's own
    last token; None for a chain. `forced` is how many of them count as right whatever the target
    says: a benchmark's answer to a model with random weights.
    """

    ids: list[int]
    probs: torch.Tensor | None = None
    parents: tuple[int, ...] | None = None
    forced: int | None = None

    @property
    def depths(self) -> list[int]:
        """How many guesses lead to each of them."""
        if self.parents is None:
            return list(range(len(self.ids)))
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths


class Proposer(Protocol):
    """Guesses tokens. All of it is called in the engine's thread. One that inherits from this costs
    nothing, and keeps nothing of an answer."""

    name: str

    def outlook(self, answer: Answer, most: int) -> Outlook | None:
        """What could be guessed now, at next to no cost; None: nothing."""

    def pass_s(self, rows: int) -> float:
        """Seconds of a pass that guesses one token for each of so many answers."""
        del rows  # a look into a table does not show beside a forward pass
        return 0.0

    def read_s(self, tokens: int) -> float:
        """Seconds to read so many tokens before the first guess."""
        del tokens
        return 0.0

    def propose(self, wanted: Many[tuple[Answer, int]]) -> list[Draft | None]:
        """At most so many tokens for each answer."""

    def settle(self, answer: Answer, accepted: int) -> None:
        """So many of the last guesses are right; the answer's tokens are about to get them."""
        del answer, accepted

    def end(self, answer: Answer) -> None:
        """The answer has ended; nothing more is asked for it."""
        del answer
