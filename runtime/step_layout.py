"""Where the tokens of one step lie in the KV pool: built once a step, read by every layer.

Knows spans, block tables, windows and masks; knows no tensors of keys and values and no attention.
A step is packed: tokens of all sequences stand behind one another in one row. The sequences that
bring exactly one token stand first ("decodes"), longer spans ("chunks") after them. What layers
share is made on first use and kept: a row index per number of KV heads, a mask per window.

Legend: T tokens of the step, B decodes, KV key-value heads, b decodes of one group, n blocks of the
longest of them, C context tokens of a sequence after this step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence as Many
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from runtime.kv import BLOCK_TOKENS

if TYPE_CHECKING:
    from runtime.adapters import AdapterRows
    from runtime.tails import StepTails

# Decodes attended together are padded to the longest of them. A shorter one opens a group of its
# own once it would be padded by a quarter, and by more blocks than another group costs.
_SHORTEST_SHARE = 0.75
_PADDING_BLOCKS = 8

# A longer span computes more than it reads, and is a prompt's chunk; up to here it may be what a
# sequence guessed, and its tokens may be taken back.
SHORT_TOKENS = 16
_NO_CHAIN = 1 << 30

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Span:
    """`count` tokens of one sequence that end at its token number `context`, kept in `blocks`.

    Others may read the first `sealed` positions: what is computed there again is not written. With
    `parents` the tokens behind the first are a tree: each sees, of the span, what leads to it. The
    number of a token's parent counts from the second token, -1 is the first.
    """

    context: int
    count: int
    blocks: list[int]
    sealed: int = 0
    parents: tuple[int, ...] | None = None

    @property
    def chain_tokens(self) -> int:
        """Its tokens, one behind the other; more than any kernel takes where they are a tree."""
        return self.count if self.parents is None else _NO_CHAIN


@dataclass(slots=True)
class Shared:
    """What is made once a step and then read by all layers."""

    made: dict[Hashable, Any] = field(default_factory=dict)

    def get(self, key: Hashable, make: Callable[[], _T]) -> _T:
        if key not in self.made:
            self.made[key] = make()
        found: _T = self.made[key]
        return found


@dataclass(slots=True)
class Group:
    """Decodes of similar length that are attended in one batch, each over its last n blocks."""

    rows: torch.Tensor  # [b] rows of the step
    blocks: torch.Tensor  # [b, n] block numbers, short tables padded with block 0
    low: torch.Tensor  # [b] first position that may be seen, counted from the first gathered one
    high: torch.Tensor  # [b] behind the last one
    _shared: Shared = field(default_factory=Shared)

    def pool_rows(self, kv_heads: int) -> torch.Tensor:
        """[b * KV * n] rows of a pool [blocks * KV, ...]: each head's blocks behind each other."""
        return self._shared.get(kv_heads, lambda: rows_of(self.blocks, kv_heads))

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """[b, 1, 1, 16 n], 0 where a decode may look and -inf elsewhere."""

        def make() -> torch.Tensor:
            length = self.blocks.shape[1] * BLOCK_TOKENS
            at = torch.arange(length, device=self.blocks.device)
            hidden = (at >= self.high[:, None]) | (at < self.low[:, None])
            return minus_infinity(hidden, dtype)[:, None, None, :]

        return self._shared.get(dtype, make)


@dataclass(slots=True)
class Chunk:
    """One span of several tokens, and the blocks that its window reaches."""

    start: int  # its first row of the step
    count: int
    length: int  # positions that are gathered, the last `count` are its own
    window: int | None  # None where the window hides nothing
    blocks: torch.Tensor  # [blocks]
    skip: int  # positions of the first block that lie before `length`
    parents: tuple[int, ...] | None = None
    _shared: Shared = field(default_factory=Shared)

    @property
    def before(self) -> int | None:
        """Positions that all rows see, before its own; None where a window hides some, or where its
        own are not a chain."""
        whole = self.window is None and self.parents is None
        return self.length - self.count if whole else None

    def pool_rows(self, kv_heads: int) -> torch.Tensor:
        """[KV * blocks] rows of a pool [blocks * KV, ...]."""
        return self._shared.get(kv_heads, lambda: rows_of(self.blocks[None], kv_heads))

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """[count, length], 0 where a token may look and -inf elsewhere."""

        def make() -> torch.Tensor:
            device = self.blocks.device
            rows = torch.arange(self.length - self.count, self.length, device=device)[:, None]
            columns = torch.arange(self.length, device=device)
            hidden = columns > rows
            if self.parents is not None:
                hidden[:, self.length - self.count :] = ~_leads_to(self.parents).to(device)
            if self.window is not None:
                hidden |= columns <= rows - self.window
            return minus_infinity(hidden, dtype)

        return self._shared.get(dtype, make)


def _leads_to(parents: Many[int]) -> torch.Tensor:
    """[n + 1, n + 1] whether the token of a column leads to that of a row, or is it."""
    seen = torch.eye(len(parents) + 1, dtype=torch.bool)
    seen[:, 0] = True
    for number, parent in enumerate(parents, start=1):
        seen[number] |= seen[parent + 1]
    return seen


def rows_of(blocks: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """blocks [b, n] -> [b * KV * n] rows of a pool whose blocks hold one run for each head."""
    heads = torch.arange(kv_heads, device=blocks.device)[None, :, None]
    return (blocks[:, None, :] * kv_heads + heads).reshape(-1)


def minus_infinity(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
        hidden, float("-inf")
    )


@dataclass(slots=True)
class StepLayout:
    """One step's spans and what follows from them."""

    spans: Many[Span]
    starts: list[int]  # row at which each span begins
    decodes: int  # B
    slots: np.ndarray[Any, np.dtype[np.int64]]  # [T] block * 16 + offset each token is written to
    device: torch.device
    adapters: Many[AdapterRows] = ()
    tails: StepTails | None = None  # placed anew for each forward, where the pool has tails
    shared: Shared = field(default_factory=Shared)

    @property
    def longest(self) -> int:
        """Tokens of the longest span."""
        return max((span.chain_tokens for span in self.spans), default=0)

    def write_rows(self, kv_heads: int) -> torch.Tensor:
        """[T * KV] rows of a pool [blocks * KV * 16, D] that keys and values go to, token first."""

        def make() -> torch.Tensor:
            block, offset = np.divmod(self.slots, BLOCK_TOKENS)
            heads = np.arange(kv_heads)
            rows = (block[:, None] * kv_heads + heads) * BLOCK_TOKENS + offset[:, None]
            return torch.from_numpy(rows.reshape(-1)).to(self.device)

        return self.shared.get(("write", kv_heads), make)

    def groups(self, window: int | None) -> list[Group]:
        """The decodes in groups of similar length; with a window, its reach is the length."""
        return self.shared.get(("groups", window), lambda: self._group(window))

    def chunks(self, window: int | None) -> list[Chunk]:
        """The longer spans, in order."""
        return self.shared.get(("chunks", window), lambda: self._chunk(window))

    def _group(self, window: int | None) -> list[Group]:
        reach = [reach_of(span, window) for span in self.spans[: self.decodes]]
        order = sorted(range(self.decodes), key=lambda row: reach[row][0] - reach[row][1])
        groups: list[Group] = []
        at = 0
        while at < len(order):
            first, end = reach[order[at]]
            longest = end - first
            least = min(longest * _SHORTEST_SHARE, longest - _PADDING_BLOCKS)
            stop = at + 1
            while stop < len(order) and reach[order[stop]][1] - reach[order[stop]][0] > least:
                stop += 1
            groups.append(self._as_group(order[at:stop], reach, longest, window))
            at = stop
        return groups

    def _as_group(
        self, rows: list[int], reach: list[tuple[int, int]], width: int, window: int | None
    ) -> Group:
        rows = sorted(rows)
        blocks = np.zeros((len(rows), width), dtype=np.int64)
        limits = np.zeros((2, len(rows)), dtype=np.int64)
        for number, row in enumerate(rows):
            span = self.spans[row]
            first, end = reach[row]
            blocks[number, : end - first] = span.blocks[first:end]
            high = span.context - first * BLOCK_TOKENS
            limits[:, number] = (0 if window is None else max(0, high - window), high)
        low, high = torch.from_numpy(limits).to(self.device)
        index = torch.tensor(rows, device=self.device)
        return Group(index, torch.from_numpy(blocks).to(self.device), low, high)

    def _chunk(self, window: int | None) -> list[Chunk]:
        chunks = []
        for span, start in zip(
            self.spans[self.decodes :], self.starts[self.decodes :], strict=True
        ):
            first, end = reach_of(span, window)
            seen = span.context if window is None else min(span.context, window + span.count - 1)
            blocks = torch.tensor(span.blocks[first:end], device=self.device)
            skip = span.context - seen - first * BLOCK_TOKENS
            hides = None if window is None or span.context <= window else window
            chunks.append(Chunk(start, span.count, seen, hides, blocks, skip, span.parents))
        return chunks


def reach_of(span: Span, window: int | None) -> tuple[int, int]:
    """First and behind-the-last block number in its table that a span's tokens look at."""
    end = -(-span.context // BLOCK_TOKENS)
    if window is None:
        return 0, end
    return max(0, span.context - span.count - window + 1) // BLOCK_TOKENS, end


def lay_out(spans: Many[Span], device: torch.device, scratch_slot: int = 0) -> StepLayout:
    """The layout of a step from its spans, those of one token first.

    Keys and values that are not to be written go to `scratch_slot`, which nobody reads.
    """
    decodes = sum(span.count == 1 for span in spans)
    assert all(span.count == 1 for span in spans[:decodes]), "spans of one token stand first"
    starts: list[int] = []
    slots: list[int] = []
    for span in spans:
        starts.append(len(slots))
        if span.count == 1:
            last = span.context - 1
            slot = span.blocks[last // BLOCK_TOKENS] * BLOCK_TOKENS + last % BLOCK_TOKENS
            slots.append(scratch_slot if last < span.sealed else slot)
        else:
            slots += _slots(span, scratch_slot)
    return StepLayout(spans, starts, decodes, np.array(slots, dtype=np.int64), device)


def _slots(span: Span, scratch_slot: int) -> list[int]:
    """The pool positions that a span's tokens are written to."""
    first = span.context - span.count
    at = np.arange(first, span.context)
    blocks = np.array(span.blocks, dtype=np.int64)[at // BLOCK_TOKENS]
    slots = blocks * BLOCK_TOKENS + at % BLOCK_TOKENS
    if first < span.sealed:
        slots[at < span.sealed] = scratch_slot
    listed: list[int] = slots.tolist()
    return listed
