"""Control tokens that a user spells: quoted before the template runs, plain text when encoded.

Knows strings and marks; which tokens are control tokens, and how text becomes ids, it is told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cache.messages import map_texts

# The quotes are Unicode noncharacters: no text that is meant for interchange has them.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
QUOTED = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}|[{OPEN}{CLOSE}]")


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """What only a template may write.

    `special` are the tokenizer's special tokens: quoted wherever they come from. `words` are these
    and the other added tokens in the template's text (`<think>`, `<tool_call>`): quoted too, except
    in the assistant's turns, where they are what the model itself said before.
    `normalize` gives the text in which the tokenizer looks for tokens; None when it is the text.
    """

    special: re.Pattern[str]
    words: re.Pattern[str]
    normalize: Callable[[str], str] | None = None

    def spelled_in(self, messages: Sequence[Mapping[str, Any]], *others: Any) -> bool:
        """Whether any text of a conversation spells a control token."""
        found = (self._finds(self._of(turn), text) for turn in messages for text in _texts(turn))
        return any(found) or any(self._finds(self.words, text) for text in _texts(others))

    def quote_turn(self, message: Mapping[str, Any]) -> Any:
        """A message with its control tokens in quotes."""
        return map_texts(message, partial(self._quote, self._of(message)))

    def quote(self, value: Any) -> Any:
        """Tools or variables with their control tokens in quotes."""
        return map_texts(value, partial(self._quote, self.words))

    def _of(self, message: Mapping[str, Any]) -> re.Pattern[str]:
        return self.special if message.get("role") == "assistant" else self.words

    def _finds(self, tokens: re.Pattern[str], text: str) -> bool:
        if tokens.search(text):
            return True
        return self.normalize is not None and bool(tokens.search(self.normalize(text)))

    def _quote(self, tokens: re.Pattern[str], text: str) -> str:
        text = text.replace(OPEN, "").replace(CLOSE, "")  # or a user could close our quotes
        quoted = tokens.sub(f"{OPEN}\\g<0>{CLOSE}", text)
        if quoted == text and self._finds(tokens, text):
            return f"{OPEN}{text}{CLOSE}"  # spelled by its normalized form: where, is not known
        return quoted


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest where several begin; nothing when there are none."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def encode_quoted(
    text: str, usual: Callable[[str], list[int]], plain: Callable[[str], list[int]]
) -> list[int]:
    """Ids of a rendered text: what is in quotes by `plain`, the rest by `usual`.

    A template may tear quotes apart (`split`): a lone one is dropped, and still parts the text, so
    that the two sides cannot join into a control token.
    """
    first, *pieces = QUOTED.split(text)
    ids = usual(first)
    for at, piece in enumerate(pieces):
        if piece:
            ids += encode_within(piece, usual if at % 2 else plain)
    return ids


def encode_within(piece: str, encode: Callable[[str], list[int]]) -> list[int]:
    """Ids of a piece from within a text: after a newline, no tokenizer puts a space before it."""
    newline, both = encode("\n"), encode("\n" + piece)
    return both[len(newline) :] if both[: len(newline)] == newline else encode(piece)


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
