"""Several continuations at once: what followed the last tokens at different places, as a tree.

The same look-ups as `spec_decode.ngram`; where two places go on differently both are guessed, and
one pass over the tree tells which was right. Knows tokens; knows no model. On a CPU a token more
costs more than a second candidate is right (docs/log.md, 2026-11-26), so `auto` does not use it.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from spec_decode.draft import Answer, Draft, Outlook
from spec_decode.ngram import LONGEST, NGram

# Of a tree's guesses so many may be first ones.
BRANCHES = 3


class Tree(NGram):
    """Guesses what followed before, at several places."""

    name = "tree"

    def outlook(self, answer: Answer, most: int) -> Outlook | None:
        found = super().outlook(answer, most)
        return None if found is None else Outlook(most, found.trust)

    def propose(self, wanted: Many[tuple[Answer, int]]) -> list[Draft | None]:
        """A tree of at most so many guesses each; a chain where all places agree."""
        return [self._grow(answer, most) for answer, most in wanted]

    def _grow(self, answer: Answer, most: int) -> Draft | None:
        """The likeliest place goes on longest: it has what the others leave."""
        ids: list[int] = []
        parents: list[int] = []
        children: dict[tuple[int, int], int] = {}
        for number, text in enumerate(self._continuations(answer, most)):
            at = -1
            for token in text[: most if number == 0 else 1 + most // 4]:
                following = children.get((at, token))
                if following is None:
                    if len(ids) >= most - (BRANCHES - 1 - number):
                        break
                    following = children[at, token] = len(ids)
                    ids.append(token)
                    parents.append(at)
                at = following
        if not ids:
            return None
        chain = parents == list(range(-1, len(ids) - 1))
        return Draft(ids, parents=None if chain else tuple(parents))

    def _continuations(self, answer: Answer, most: int) -> list[list[int]]:
        """What follows the longest matches, each beginning once, the longest match first."""
        own = self.index_of(answer)
        tail = answer.tokens[-LONGEST:]
        found = sorted(own.matches(tail), key=lambda one: -one[1])
        texts: dict[int, list[int]] = {}
        for place, _ in found:
            text = own.tokens[place : place + most]
            if text and text[0] not in texts and len(texts) < BRANCHES:
                texts[text[0]] = text
        return list(texts.values())
