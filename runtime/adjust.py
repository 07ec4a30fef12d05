"""What a request changes in the logits before a token is chosen: mask, bias, penalties.

Knows `Sampling` and one answer's tokens so far; knows no filters and no randomness. In this order,
as in vLLM: grammar mask, bias, repetition penalty, frequency and presence penalties.

Legend: B rows, V vocabulary of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Many
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.grammar import Grammar, GrammarFailed

if TYPE_CHECKING:  # a sequence holds its adjustment
    from runtime.sequence import Sampling

Row = NDArray[np.float32]
DEAD_END = "the grammar allows no token here that the model could write"


class _Tally:
    """Token ids, each once, with a number beside each."""

    __slots__ = ("_amounts", "_at", "_ids")

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._at = {token: at for at, token in enumerate(dict.fromkeys(ids))}
        self._ids = np.fromiter(self._at, np.int64, len(self._at))
        self._amounts = np.zeros(len(self._at))

    def add(self, token: int, amount: float, *, once: float = 0.0) -> None:
        """Adds `amount`, and `once` more for a token that is new."""
        at = self._at.get(token)
        if at is None:
            at = self._at[token] = len(self._at)
            if at == len(self._ids):
                room = max(16, at)
                self._ids = np.concatenate([self._ids, np.zeros(room, np.int64)])
                self._amounts = np.concatenate([self._amounts, np.zeros(room)])
            self._ids[at] = token
            amount += once
        self._amounts[at] += amount

    def amount(self, token: int) -> float | None:
        """The number beside a token; None where it is not among them."""
        at = self._at.get(token)
        return None if at is None else float(self._amounts[at])

    def put_back(self, token: int, amount: float | None) -> None:
        """What `amount` said before `token` was added last; tokens go in the reverse order."""
        at = self._at[token]
        self._amounts[at] = amount or 0.0
        if amount is None:
            assert at == len(self._at) - 1, "what came last is taken back first"
            del self._at[token]

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self._at)]

    @property
    def amounts(self) -> NDArray[np.float64]:
        return self._amounts[: len(self._at)]


class _Guess(NamedTuple):
    """A guessed token, and what stood there before it."""

    token: int
    failure: str | None
    penalized: float | None
    repeated: float | None
    taken: bool  # by the grammar, where there is one


class Adjustment:
    """One answer's changes to its logits; `push` tells it each token that was chosen."""

    __slots__ = (
        "_bias",
        "_failure",
        "_grammar",
        "_guessed",
        "_penalized",
        "_repeated",
        "_sampling",
    )

    def __init__(self, sampling: Sampling, prompt: Many[int]) -> None:
        self._sampling = sampling
        self._grammar: Grammar | None = sampling.grammar.begin() if sampling.grammar else None
        self._failure: str | None = None
        self._guessed: list[_Guess] = []
        self._bias = _Tally()
        for token, amount in sampling.logit_bias:
            self._bias.add(token, amount)
        self._penalized = _Tally()  # of the answer
        self._repeated = _Tally(prompt if sampling.repetition_penalty != 1 else ())

    def push(self, token: int) -> None:
        """A token was chosen. What goes wrong shows at the next `apply`."""
        self._take(token)

    def _take(self, token: int) -> bool:
        """True where the grammar has moved on."""
        one = self._sampling
        if one.frequency_penalty or one.presence_penalty:
            self._penalized.add(token, one.frequency_penalty, once=one.presence_penalty)
        if one.repetition_penalty != 1:
            self._repeated.add(token, 0.0)
        if self._grammar is None:
            return False
        try:
            self._grammar.accept(token)
        except GrammarFailed as error:
            self._failure = str(error)
            return False
        return True

    # ---- guesses: tokens that may have to be taken back ------------------------------------------

    def allows(self, tokens: Many[int]) -> int:
        """How many of these tokens, from the first, the grammar lets come next."""
        if self._failure is not None:
            return 0
        return len(tokens) if self._grammar is None else self._grammar.allows(tokens)

    def guess(self, token: int) -> None:
        """Like `push`, for a token that was only guessed."""
        failure = self._failure
        penalized, repeated = self._penalized.amount(token), self._repeated.amount(token)
        taken = self._take(token)
        self._guessed.append(_Guess(token, failure, penalized, repeated, taken))

    def keep(self, count: int) -> None:
        """The first `count` guesses were right; the others are taken back."""
        one = self._sampling
        while len(self._guessed) > count:
            guess = self._guessed.pop()
            if one.frequency_penalty or one.presence_penalty:
                self._penalized.put_back(guess.token, guess.penalized)
            if one.repetition_penalty != 1:
                self._repeated.put_back(guess.token, guess.repeated)
            if self._grammar is not None and guess.taken:
                self._grammar.rollback(1)
            self._failure = guess.failure
        self._guessed.clear()

    def apply(self, row: Row) -> str | None:
        """Changes one row of logits [V] in place; or says why no token can come next."""
        if self._failure is None and self._grammar is not None:
            self._failure = _mask(row, self._grammar)
        if self._failure is not None:
            return self._failure
        one = self._sampling
        ids = self._bias.ids
        if len(ids):
            row[ids] += self._bias.amounts
        ids = self._repeated.ids
        if len(ids):
            logits = row[ids]
            penalty = np.float32(one.repetition_penalty)
            row[ids] = np.where(logits > 0, logits / penalty, logits * penalty)
        ids = self._penalized.ids
        if len(ids):
            row[ids] -= self._penalized.amounts
        return None


def _mask(row: Row, grammar: Grammar) -> str | None:
    words = np.zeros(grammar.words, np.int32)
    try:
        grammar.fill(words)
    except GrammarFailed as error:
        return str(error)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(row)]
    row[len(bits) :] = -np.inf
    np.copyto(row[: len(bits)], -np.inf, where=bits == 0)
    return None if row.max() > -np.inf else DEAD_END


def adjustment(sampling: Sampling, prompt: Many[int]) -> Adjustment | None:
    """None for a request that changes nothing, which then costs nothing."""
    return Adjustment(sampling, prompt) if sampling.adjusts else None


def adjusted(
    logits: torch.Tensor, adjustments: Many[Adjustment | None]
) -> tuple[torch.Tensor, dict[int, str]]:
    """Logits [B, V] as the requests change them, and which rows cannot go on, with their reasons.

    The logits themselves stay as they are: log-probabilities are the model's own. Rows are changed
    in the CPU's memory, those of another device go there and back.
    """
    rows = [row for row, one in enumerate(adjustments) if one is not None]
    if not rows:
        return logits, {}
    everyone = len(rows) == len(adjustments)
    mine = logits.to("cpu", torch.float32, copy=True) if everyone else logits[rows].float().cpu()
    dead: dict[int, str] = {}
    for row, values in zip(rows, mine.numpy(), strict=True):
        one = adjustments[row]
        assert one is not None
        reason = one.apply(values)
        if reason is not None:
            dead[row] = reason
    if everyone:
        return mine.to(logits.device), dead
    changed = logits.to(torch.float32, copy=True)
    changed[rows] = mine.to(logits.device)
    return changed, dead
