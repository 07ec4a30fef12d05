"""Retrieved passages in a prompt: which are said twice, and which answer the question.

Pure, and a function of one message (or of `documents`) alone, so that a message which stands in a
conversation is the same in every later turn. BM25 is the library bm25s (Lù, 2024), loaded when it
is first asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from policies.trimming import Passages

SHINGLE_WORDS = 3
PASSAGES_MAX = 1000  # in one message; more are left as they are
_MARK = re.compile(r"^(?:\[\d{1,4}\]|(?:Passage|Document|Source) \d{1,4}:)", re.MULTILINE)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Parted:
    """A text that has passages: what stands before, each passage as it stands, what follows."""

    before: str
    passages: tuple[str, ...]
    after: str

    def text(self, kept: Sequence[int]) -> str:
        return self.before + "".join(self.passages[at] for at in kept) + self.after


def part(text: str) -> Parted | None:
    """None for a text with fewer than two passages. A passage ends where the next one begins; the
    last one ends at its blank line."""
    starts = [found.start() for found in _MARK.finditer(text)]
    if not 2 <= len(starts) <= PASSAGES_MAX:
        return None
    blank = text.find("\n\n", starts[-1])
    end = len(text) if blank < 0 else blank + 2
    edges = [*starts, end]
    passages = tuple(text[a:b] for a, b in pairwise(edges))
    return Parted(text[: starts[0]], passages, text[end:])


def choose(passages: Sequence[str], question: str, settings: Passages) -> list[int]:
    """Indexes of the passages that stay, in their order; never none."""
    kept = list(range(len(passages)))
    if settings.near_duplicates is not None:
        kept = distinct(passages, settings.near_duplicates)
    if settings.keep is not None and len(kept) > settings.keep:
        kept = best([passages[at] for at in kept], question, settings.keep, kept)
    return kept


def distinct(passages: Sequence[str], share: float) -> list[int]:
    """Indexes without those that share `share` of their shingles with an earlier one that stays."""
    kept: list[int] = []
    shingles: list[frozenset[tuple[str, ...]]] = []
    for at, passage in enumerate(passages):
        # A passage's own number would tell it from its double.
        words = _WORD.findall(_MARK.sub("", passage, count=1).lower())
        mine = frozenset(zip(*(words[shift:] for shift in range(SHINGLE_WORDS)), strict=False))
        mine = mine or frozenset([tuple(words)])
        if all(_jaccard(mine, other) < share for other in shingles):
            kept.append(at)
            shingles.append(mine)
    return kept


def _jaccard(a: frozenset[tuple[str, ...]], b: frozenset[tuple[str, ...]]) -> float:
    common = len(a & b)
    return common / (len(a) + len(b) - common)


def best(texts: Sequence[str], question: str, count: int, names: Sequence[int]) -> list[int]:
    """The `count` names whose texts answer best by BM25, in their order; earlier ones win ties.
    All of them where the question has no word in common with any."""
    import bm25s  # a policy that needs it is refused where it is missing

    corpus = [_WORD.findall(text.lower()) or [""] for text in texts]
    index = bm25s.BM25()
    index.index(corpus, show_progress=False)
    known = {word for words in corpus for word in words}
    query = [word for word in _WORD.findall(question.lower()) if word in known]
    if not query:
        return list(names)
    scores = index.get_scores(query)
    order = sorted(range(len(texts)), key=lambda at: (-float(scores[at]), at))
    return sorted(names[at] for at in order[:count])


def shorten_text(text: str, settings: Passages) -> str:
    """A user's message with the passages that stay; its question is all that is no passage."""
    parted = part(text)
    if parted is None:
        return text
    question = parted.before + "\n" + parted.after
    return parted.text(choose(parted.passages, question, settings))


def shorten_documents(
    documents: Sequence[Mapping[str, Any]], question: str, settings: Passages
) -> list[Mapping[str, Any]]:
    """`documents` of a request (title and text, or whatever strings they have), the same way."""
    texts = [
        "\n".join(str(value) for value in document.values() if isinstance(value, str))
        for document in documents
    ]
    if not 2 <= len(texts) <= PASSAGES_MAX:
        return list(documents)
    return [documents[at] for at in choose(texts, question, settings)]
