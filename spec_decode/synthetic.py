"""Guesses that are right as often as a benchmark says, for models whose weights are random.

Its answers are made up, so no policy can ask for it: only a program that builds an engine itself.
Knows rates; knows no model. The rate at each place is conditional on the places before it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Many

from spec_decode.draft import Answer, Draft, Outlook, Proposer


class Synthetic(Proposer):
    """Accepts each guess with a given probability. `token` is what it guesses, any id will do."""

    name = "synthetic"

    def __init__(
        self, rate: float, rng: random.Random, *, token: int = 0, pass_s: float = 0.0
    ) -> None:
        """`pass_s` is what a pass of the draft that it stands for would take."""
        if not 0 <= rate <= 1:
            raise ValueError(f"an acceptance rate lies between 0 and 1, got {rate}")
        self._rate = rate
        self._rng = rng
        self._token = token
        self._pass_s = pass_s

    def outlook(self, answer: Answer, most: int) -> Outlook | None:
        del answer
        return Outlook(most)

    def pass_s(self, rows: int) -> float:
        del rows
        return self._pass_s

    def propose(self, wanted: Many[tuple[Answer, int]]) -> list[Draft | None]:
        return [self._propose(count) for _, count in wanted]

    def _propose(self, count: int) -> Draft:
        right = 0
        while right < count and self._rng.random() < self._rate:
            right += 1
        return Draft([self._token] * count, forced=right)
