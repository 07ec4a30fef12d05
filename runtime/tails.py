"""Which blocks of an int8 pool are also kept in full precision: those that are begun.

Knows block numbers, tail slots and counts; knows no tensors. A block that a sequence writes to
token by token has a tail until it is long complete, so that nothing is quantized twice and a few
tokens can be taken back. Long chunks complete most of their blocks at once; those need no tail. A
tail that is needed elsewhere is given up: its block is quantized as far as it goes, and comes back
with that rounding should its sequence go on.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import numpy as np

from runtime.kv import BLOCK_TOKENS
from runtime.step_layout import SHORT_TOKENS, Shared, Span, StepLayout

_FEWEST_TAILS = 16
_BLOCKS_A_TAIL = 32  # as many tails as that share of the pool, unless one step needs more


@dataclass(frozen=True, slots=True)
class Tail:
    """Slot of the first `filled` positions of a block."""

    block: int
    slot: int
    filled: int


@dataclass(frozen=True, slots=True)
class Own:
    """A span of several tokens together with those that lie before it in its first block."""

    start: int  # its first row of the step
    count: int
    origin: int  # position at which its first block begins
    lead: int  # tokens of that block that were there before
    block: int  # that block, and its tail or -1
    slot: int
    full: tuple[int, int]  # blocks, counted from `origin`, that go to the pool without a tail
    blocks: list[int]  # their numbers


@dataclass(slots=True)
class StepTails:
    """What a step does with tails; `targets` is slot * 16 + offset for each token, -1 for none."""

    targets: np.ndarray[tuple[int], np.dtype[np.int64]]
    slots: list[list[int]]  # of each short span's blocks from its first token on; -1 for none
    owns: dict[int, Own]  # of every span of several tokens, by its number
    leaving: list[Tail] = field(default_factory=list)  # to be quantized before anything is written
    returning: list[Tail] = field(default_factory=list)  # to be filled from their blocks
    complete: list[Tail] = field(default_factory=list)  # to be quantized after the writing
    shared: Shared = field(default_factory=Shared)


@dataclass(frozen=True, slots=True)
class _Wish:
    """Positions [begin, end) of a block that one span writes."""

    block: int
    begin: int
    end: int


class Tails:
    """Block -> slot, the least recently written first."""

    def __init__(self, blocks: int) -> None:
        self._enough = max(_FEWEST_TAILS, blocks // _BLOCKS_A_TAIL)
        self._held: dict[int, Tail] = {}
        self._free: list[int] = []
        self.capacity = 0

    def place(self, layout: StepLayout) -> StepTails:
        """Gives a tail to every block that this step leaves begun, or writes in part."""
        wishes = [_wishes(span) for span in layout.spans]
        busy = {wish.block for each in wishes for wish in each}
        busy.update(_first_block(span) for span in layout.spans)  # what leads a span is read
        targets = np.full(len(layout.slots), -1, dtype=np.int64)
        step = StepTails(targets, [], {})
        done: list[int] = []
        for number, (span, start) in enumerate(zip(layout.spans, layout.starts, strict=True)):
            if span.count > 1:
                step.owns[number] = own = self._own(span, start)
                done += own.blocks
            slots = {wish.block: self._write(wish, busy, step) for wish in wishes[number]}
            _aim(span, start, slots, targets)
            step.slots.append(_slots_of(span, slots))
        self.forget(done)  # only now: a lead may stand in a slot that nobody must overwrite yet
        return step

    def begun(self, blocks: Many[int]) -> list[Tail]:
        """The tails that hold more than the pool does."""
        tails = [self._held[block] for block in blocks if block in self._held]
        return [tail for tail in tails if tail.filled < BLOCK_TOKENS]

    def forget(self, blocks: Many[int]) -> list[int]:
        """The slots of these blocks, which are free now."""
        slots = [self._held.pop(block).slot for block in blocks if block in self._held]
        self._free += slots
        return slots

    def _own(self, span: Span, start: int) -> Own:
        first = span.context - span.count
        number, lead = divmod(first, BLOCK_TOKENS)
        held = self._held.get(span.blocks[number])
        usable = held is not None and held.filled >= lead
        whole: tuple[int, int] = (0, 0)
        if span.count > SHORT_TOKENS:
            begin = -(-max(first - lead, span.sealed) // BLOCK_TOKENS) - number
            whole = (begin, max(begin, span.context // BLOCK_TOKENS - number))
        return Own(
            start,
            span.count,
            number * BLOCK_TOKENS,
            lead,
            span.blocks[number],
            held.slot if held is not None and usable else -1,
            whole,
            span.blocks[number + whole[0] : number + whole[1]],
        )

    def _write(self, wish: _Wish, busy: set[int], step: StepTails) -> int:
        held = self._held.pop(wish.block, None)
        slot = held.slot if held is not None else self._take(busy, step)
        tail = self._held[wish.block] = Tail(wish.block, slot, wish.end)
        if wish.begin > 0 and (held is None or held.filled < wish.begin):
            step.returning.append(tail)
        if wish.end == BLOCK_TOKENS:
            step.complete.append(tail)
        return slot

    def _take(self, busy: set[int], step: StepTails) -> int:
        if not self._free and self.capacity >= self._enough:
            oldest = next((block for block in self._held if block not in busy), None)
            if oldest is not None:
                step.leaving += self.begun([oldest])
                self.forget([oldest])
        if not self._free:
            more = max(_FEWEST_TAILS, min(self.capacity, self._enough - self.capacity))
            self._free += range(self.capacity, self.capacity + more)
            self.capacity += more
        return self._free.pop()


def _wishes(span: Span) -> list[_Wish]:
    """The blocks that a span writes to through a tail; of a long one only the last, if begun."""
    first = max(span.context - span.count, span.sealed)
    if span.count > SHORT_TOKENS:
        first = max(first, span.context // BLOCK_TOKENS * BLOCK_TOKENS)
    wishes = []
    for number in range(first // BLOCK_TOKENS, -(-span.context // BLOCK_TOKENS)):
        origin = number * BLOCK_TOKENS
        begin, end = max(first - origin, 0), min(span.context - origin, BLOCK_TOKENS)
        if begin < end:
            wishes.append(_Wish(span.blocks[number], begin, end))
    return wishes


def _first_block(span: Span) -> int:
    return span.blocks[(span.context - span.count) // BLOCK_TOKENS]


def _aim(
    span: Span,
    start: int,
    slots: dict[int, int],
    targets: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> None:
    """Where in the tails each of a span's tokens goes."""
    first = span.context - span.count
    for number in range(first // BLOCK_TOKENS, -(-span.context // BLOCK_TOKENS)):
        slot = slots.get(span.blocks[number])
        if slot is None:
            continue
        origin = number * BLOCK_TOKENS
        low = max(first, span.sealed, origin)
        high = min(span.context, origin + BLOCK_TOKENS)
        at = slot * BLOCK_TOKENS - origin
        targets[start + low - first : start + high - first] = np.arange(at + low, at + high)


def _slots_of(span: Span, slots: dict[int, int]) -> list[int]:
    if span.count > SHORT_TOKENS:
        return []
    first = (span.context - span.count) // BLOCK_TOKENS
    return [slots.get(block, -1) for block in span.blocks[first : -(-span.context // BLOCK_TOKENS)]]
