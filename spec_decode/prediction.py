"""Predicted outputs: the client says what the answer will probably be, and the answer follows it.

Knows tokens; knows no model. Where the answer leaves the prediction, the place where it comes back
is found by its last two tokens. OpenAI's request field `prediction`.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

from spec_decode.draft import Answer, Draft, Outlook, Proposer
from spec_decode.ngram import Index

# A prediction that has been right for so many tokens is trusted as much as one can be.
TRUST_MAX = 8


@dataclass(slots=True)
class _Reading:
    """Where an answer stands in its prediction."""

    index: Index
    seen: int  # tokens of the answer that were followed
    place: int = 0  # the next token of the prediction
    run: int = 1  # tokens since it was found; 0 while it is lost


class Prediction(Proposer):
    """Guesses what the client predicted."""

    name = "prediction"

    def __init__(self) -> None:
        self._readings: dict[int, _Reading] = {}

    def outlook(self, answer: Answer, most: int) -> Outlook | None:
        if not answer.prediction:
            return None
        reading = self._readings.get(answer.key)
        if reading is None:
            index = Index(list(answer.prediction))
            index.catch_up(len(index.tokens) - 1)
            reading = self._readings[answer.key] = _Reading(index, answer.prompt_tokens)
        _follow(reading, answer.tokens)
        left = len(reading.index.tokens) - reading.place
        if not reading.run or left < 1:
            return None
        return Outlook(min(most, left), trust=min(reading.run, TRUST_MAX))

    def propose(self, wanted: Many[tuple[Answer, int]]) -> list[Draft | None]:
        drafts: list[Draft | None] = []
        for answer, most in wanted:
            reading = self._readings.get(answer.key)
            ids: list[int] = []
            if reading is not None and reading.run and reading.seen == len(answer.tokens):
                ids = reading.index.tokens[reading.place : reading.place + most]
            drafts.append(Draft(ids) if ids else None)
        return drafts

    def end(self, answer: Answer) -> None:
        self._readings.pop(answer.key, None)


def _follow(reading: _Reading, tokens: list[int]) -> None:
    """Reads on in the prediction as far as the answer has come; looks for it again where lost."""
    predicted = reading.index.tokens
    for at in range(reading.seen, len(tokens)):
        if reading.place < len(predicted) and predicted[reading.place] == tokens[at]:
            reading.place += 1
            reading.run += 1
            continue
        place, length = reading.index.find(tokens[max(0, at - 11) : at + 1])
        reading.run = 0
        if length:
            reading.place, reading.run = place, length
    reading.seen = len(tokens)
