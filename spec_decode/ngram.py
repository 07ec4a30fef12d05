"""Prompt lookup: what followed the same few tokens before, in this answer or in recent ones.

Knows tokens; knows no model. The longest match wins, the latest of equal ones; its length is the
trust in what followed. Saxena 2023 (prompt lookup decoding), with an index instead of a scan.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence as Many
from dataclasses import dataclass, field

from spec_decode.draft import Answer, Draft, Outlook, Proposer

# Matches are compared as far back as this; longer ones are trusted equally.
LONGEST = 12
# Of the places where the last two tokens stood before, so many are compared.
CANDIDATES = 6
# What is remembered of a group's recent answers, in tokens, and of how many groups.
RECENT_TOKENS = 2**16
GROUPS = 64
_GAP = -1  # between two answers: no token


@dataclass(slots=True)
class Index:
    """Where each pair of tokens stood in a text that grows at its end."""

    tokens: list[int]
    done: int = 0  # tokens whose pairs are known
    last: dict[tuple[int, int], int] = field(default_factory=dict)  # pair -> place behind it
    earlier: list[int] = field(default_factory=list)  # place behind a pair -> the same one before

    def catch_up(self, end: int) -> None:
        """Knows the pairs of the first `end` tokens, so that what follows each is known too."""
        tokens, last, earlier = self.tokens, self.last, self.earlier
        if self.done == 0 and end > 0:
            earlier.append(-1)
            self.done = 1
        for at in range(self.done, end):
            pair = (tokens[at - 1], tokens[at])
            earlier.append(last.get(pair, -1))
            last[pair] = at + 1
        self.done = max(self.done, end)

    def find(self, text: Many[int]) -> tuple[int, int]:
        """(place behind the longest match of the end of `text`, its length); length 0: none."""
        best, length = 0, 0
        for place, same in self.matches(text):
            if same > length:
                best, length = place, same
        return best, length

    def matches(self, text: Many[int]) -> Iterator[tuple[int, int]]:
        """(place behind it, length) of the last matches of the end of `text`, the latest first."""
        size = len(text)
        if size < 2:
            return
        place = self.last.get((text[-2], text[-1]), -1)
        for _ in range(CANDIDATES):
            if place < 0:
                break
            same = 2
            while (
                same < LONGEST
                and same < size
                and same < place
                and self.tokens[place - 1 - same] == text[size - 1 - same]
            ):
                same += 1
            yield place, same
            place = self.earlier[place - 1]


class Recent:
    """The last answers of a group, in two halves: the older one goes when the newer is full."""

    def __init__(self, tokens: int) -> None:
        self._half = tokens // 2
        self.halves = [Index([])]

    def add(self, tokens: Many[int]) -> None:
        newest = self.halves[0]
        if newest.tokens and len(newest.tokens) + len(tokens) > self._half:
            newest = Index([])
            self.halves = [newest, self.halves[0]]
        newest.tokens += tokens[: self._half]
        newest.tokens.append(_GAP)
        newest.catch_up(len(newest.tokens))


@dataclass(slots=True)
class _Found:
    """What follows a match: `tokens[place:]` of some text."""

    size: int  # of the answer when it was looked for
    tokens: list[int]
    place: int


class NGram(Proposer):
    """Guesses what followed before. `recent_tokens` 0 keeps nothing of answers that have ended."""

    name = "ngram"

    def __init__(self, recent_tokens: int = RECENT_TOKENS) -> None:
        self._recent_tokens = recent_tokens
        self._own: dict[int, Index] = {}
        self._groups: OrderedDict[Hashable, Recent] = OrderedDict()
        self._found: dict[int, _Found] = {}

    def outlook(self, answer: Answer, most: int) -> Outlook | None:
        """The longest match in the answer itself, or a longer one in its group's recent ones."""
        own = self.index_of(answer)
        tail = answer.tokens[-LONGEST:]
        place, length = own.find(tail)
        tokens = own.tokens
        recent = self._groups.get(answer.group)
        for half in recent.halves if recent is not None and length < LONGEST else ():
            at, same = half.find(tail)
            if same > length and half.tokens[at] != _GAP:
                place, length, tokens = at, same, half.tokens
        if not length:
            return None
        self._found[answer.key] = _Found(len(answer.tokens), tokens, place)
        return Outlook(most, trust=length)

    def index_of(self, answer: Answer) -> Index:
        """Of the answer itself, but for its last token, which has nothing behind it yet."""
        own = self._own.get(answer.key)
        if own is None:
            own = self._own[answer.key] = Index(answer.tokens)
        own.catch_up(len(answer.tokens) - 1)
        return own

    def propose(self, wanted: Many[tuple[Answer, int]]) -> list[Draft | None]:
        return [self._propose(answer, most) for answer, most in wanted]

    def _propose(self, answer: Answer, most: int) -> Draft | None:
        found = self._found.get(answer.key)
        if found is None or found.size != len(answer.tokens):
            return None
        ids: list[int] = []
        size = len(found.tokens)
        own = found.tokens is answer.tokens
        for at in range(found.place, found.place + most):
            # A text that repeats itself goes on as it began: guesses are read behind its end.
            if at < size:
                token = found.tokens[at]
            elif own:
                token = ids[at - size]
            else:
                break
            if token == _GAP:
                break
            ids.append(token)
        return Draft(ids) if ids else None

    def end(self, answer: Answer) -> None:
        """Its text is remembered for its group."""
        self._own.pop(answer.key, None)
        self._found.pop(answer.key, None)
        said = answer.tokens[answer.prompt_tokens :]
        if not self._recent_tokens or len(said) < 3:
            return
        recent = self._groups.pop(answer.group, None)
        if recent is None:
            recent = Recent(self._recent_tokens)
            while len(self._groups) >= GROUPS:
                self._groups.popitem(last=False)
        self._groups[answer.group] = recent
        recent.add(said)
