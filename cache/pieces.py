"""Where a rendered prompt can be cut so that its pieces tokenize by themselves.

A tokenizer splits a text at added tokens before anything else. So what begins with one has the
same ids alone as within the text, and of a conversation that has grown only the new pieces are
tokenized. Knows strings; imports no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cache.control import any_of

PIECE_CHARS = 64  # a shorter piece goes on past the next mark


@dataclass(frozen=True, slots=True)
class AddedToken:
    """One token that is found in a text before it is split into words."""

    text: str
    normalized: bool  # looked for in what lies between the others, once that is normalized
    eats_before: bool  # takes the whitespace before it along, or depends on what is there


def cut_marks(added: Iterable[AddedToken], written: str) -> re.Pattern[str]:
    """Matches where a piece may begin: added tokens that `written`, a template's own text, has, and
    that no other added token can overlap."""
    raw = [token for token in added if not token.normalized]
    texts = [token.text for token in raw]
    return any_of(
        token.text
        for token in raw
        if token.text in written
        and not token.eats_before
        and not any(char.isspace() for char in token.text)
        and not any(_overlaps(other, token.text) for other in texts if other != token.text)
    )


def _overlaps(other: str, mark: str) -> bool:
    """Whether `other` could be found where `mark` stands, instead of it."""
    return mark in other or any(other.endswith(mark[:most]) for most in range(1, len(mark)))


def cut(text: str, marks: re.Pattern[str]) -> Iterator[str]:
    """The text in pieces. The pieces of a text that goes on begin with the same ones, but for the
    last."""
    start = 0
    for found in marks.finditer(text):
        if found.start() - start >= PIECE_CHARS:
            yield text[start : found.start()]
            start = found.start()
    yield text[start:]
