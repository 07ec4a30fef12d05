"""A plan's tokens in one row: what goes into the model, where it lies, which logits are read.

Knows works and spans; knows no tensors. A guess stands behind its sequence's own tokens, in a tree
at the position that its depth gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from runtime.kv import BLOCK_TOKENS
from runtime.scheduler import Work
from runtime.scoring import scores_prompt
from runtime.step_layout import Span


@dataclass(slots=True)
class Packed:
    """Token ids and positions [T], the rows that are read, and for each work the first of its rows
    among those."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    keep: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)


def pack(plan: Iterable[Work]) -> Packed:
    """Works of one token stand first, as in the plan."""
    packed = Packed()
    for work in plan:
        sequence, draft = work.sequence, work.draft
        first, end = sequence.computed, sequence.computed + work.count
        start, sealed = len(packed.ids), sequence.sealed * BLOCK_TOKENS
        packed.rows.append(len(packed.keep))
        packed.ids += sequence.tokens[first:end]
        if draft is None:
            packed.spans.append(Span(end, work.count, sequence.blocks, sealed))
            packed.positions += range(first, end)
        else:
            own = end - len(draft.ids)
            packed.spans.append(Span(end, work.count, sequence.blocks, sealed, draft.parents))
            packed.ids += draft.ids
            packed.positions += range(first, own)
            packed.positions += [own + depth for depth in draft.depths]
        if draft is not None or scores_prompt(sequence):
            packed.keep += range(start, start + work.count)
        else:
            packed.keep.append(start + work.count - 1)
    return packed
