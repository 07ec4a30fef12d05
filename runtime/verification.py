"""Guesses against the target's logits: what each sequence says in a step that has verified some.

Knows sequences, their samplings and adjustments; the rule itself is `spec_decode.verify`. A guess's
row is changed as if the guesses before it had been said.

Legend: R rows of the step, one for each sequence's last token and one for each guess behind it; V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import accumulate

import torch

from runtime import sample
from runtime.scheduler import Work
from runtime.sequence import Sequence
from spec_decode.draft import Draft
from spec_decode.verify import agreed, descend, judge


@dataclass(frozen=True, slots=True)
class Said:
    """The accepted guesses by their numbers, then one token more; `rows` are those of the tokens.

    `reason` says why nothing could be said.
    """

    path: list[int]
    tokens: list[int]
    rows: list[int]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class _Asked:
    """A sequence whose guesses are looked at; `usable` of them have a row that means something."""

    number: int
    sequence: Sequence
    draft: Draft
    start: int  # its first row
    usable: int

    @property
    def rows(self) -> range:
        return range(self.start, self.start + self.usable + 1)


def verify(works: Many[Work], logits: torch.Tensor) -> list[Said]:
    """logits [R, V] -> what each sequence says, at least one token where it can go on."""
    counts = [1 + work.guesses for work in works]
    starts = list(accumulate(counts[:-1], initial=0))
    logits, asked, dead = _adjust(works, starts, logits)
    said: dict[int, Said] = dict(dead)
    forced = [one for one in asked if one.draft.forced is not None]
    certain = [one for one in asked if one.draft.forced is None and one.draft.probs is None]
    drawn = [one for one in asked if one.draft.forced is None and one.draft.probs is not None]
    for chosen, rule in ((certain, _agree), (drawn, _judge), (forced, _obey)):
        if chosen:
            said.update(zip((one.number for one in chosen), rule(chosen, logits), strict=True))
    return [said[number] for number in range(len(works))]


def _adjust(
    works: Many[Work], starts: list[int], logits: torch.Tensor
) -> tuple[torch.Tensor, list[_Asked], dict[int, Said]]:
    """Logits as the requests change them, and who cannot say anything."""
    changed = logits
    asked: list[_Asked] = []
    dead: dict[int, Said] = {}
    for number, (work, start) in enumerate(zip(works, starts, strict=True)):
        sequence, draft = work.sequence, work.draft
        assert draft is not None
        usable = len(draft.ids)
        if sequence.adjustment is not None:
            if changed is logits:
                changed = logits.to(torch.float32, copy=True)
            reason, usable = _adjust_rows(sequence, draft, changed[start : start + usable + 1])
            if reason is not None:
                dead[number] = Said([], [], [], reason)
                continue
        asked.append(_Asked(number, sequence, draft, start, usable))
    return changed, asked, dead


def _adjust_rows(sequence: Sequence, draft: Draft, rows: torch.Tensor) -> tuple[str | None, int]:
    """Changes rows [1 + guesses, V] in place; why the first one cannot be, and the guesses whose
    rows could."""
    adjustment = sequence.adjustment
    assert adjustment is not None and draft.parents is None, "masks follow one chain"
    mine = rows.cpu()
    values = mine.numpy()
    reason = adjustment.apply(values[0])
    usable = 0
    if reason is None:
        for guess, row in zip(draft.ids, values[1:], strict=True):
            adjustment.guess(guess)
            if adjustment.apply(row) is not None:
                break
            usable += 1
        adjustment.keep(0)
    if rows.is_cuda:
        rows.copy_(mine)
    return reason, usable


def _agree(asked: list[_Asked], logits: torch.Tensor) -> list[Said]:
    """Guesses that were certain: a token is drawn in each row, by the number of its place."""
    rows = [row for one in asked for row in one.rows]
    whole = rows == list(range(logits.shape[0]))
    tokens = sample.sample(
        logits if whole else logits[rows],
        [one.sequence.sampling for one in asked for _ in one.rows],
        [one.sequence.peek(depth) for one in asked for depth in _places(one)],
    )
    answers = []
    at = 0
    for one in asked:
        mine = tokens[at : at + one.usable + 1]
        at += one.usable + 1
        if one.draft.parents is None:
            path = list(range(agreed(one.draft.ids[: one.usable], mine)))
            spoken = mine[: len(path) + 1]
        else:
            path, spoken = descend(one.draft.ids, one.draft.parents, mine)
        answers.append(_said(one, path, spoken))
        for _ in spoken:
            one.sequence.throw()
    return answers


def _places(one: _Asked) -> list[int]:
    """How many tokens come before the one that each row gives."""
    return [0, *(depth + 1 for depth in one.draft.depths[: one.usable])]


def _judge(asked: list[_Asked], logits: torch.Tensor) -> list[Said]:
    """Guesses that were drawn from a law: accepted or refused against the target's."""
    rows = [row for one in asked for row in one.rows]
    target = sample.laws(logits[rows], [one.sequence.sampling for one in asked for _ in one.rows])
    drafted = torch.cat(
        [one.draft.probs[: one.usable] for one in asked if one.draft.probs is not None]
    )
    guesses = [one.draft.ids[: one.usable] for one in asked]
    uniforms = [one.sequence.rng.random() for one in asked for _ in one.rows if one.sequence.rng]
    accepted, last = judge(target, drafted, guesses, uniforms)
    return [
        _said(one, list(range(count)), [*one.draft.ids[:count], token])
        for one, count, token in zip(asked, accepted, last, strict=True)
    ]


def _obey(asked: list[_Asked], logits: torch.Tensor) -> list[Said]:
    """Guesses whose fate a benchmark has thrown already."""
    answers = []
    for one in asked:
        count = one.draft.forced or 0
        row = logits[one.start + count][None]
        token = sample.sample(row, [one.sequence.sampling], [one.sequence.throw()])[0]
        answers.append(_said(one, list(range(count)), [*one.draft.ids[:count], token]))
    return answers


def _said(one: _Asked, path: list[int], tokens: list[int]) -> Said:
    return Said(path, tokens, [one.start, *(one.start + 1 + number for number in path)])
