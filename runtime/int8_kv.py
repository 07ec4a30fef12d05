"""A KV pool in int8: keys with a scale per channel, values with a scale per token (KIVI).

Knows one layer's tensors and how a step writes and reads them; which blocks have a tail is decided
in `runtime.tails`. A token sees its own block of 16 in full precision and every block before it in
int8, however its prompt was cut: what a block holds depends on nothing but its tokens. A block is
quantized once, when it is complete; one that is begun is kept whole in a tail.

Source: Liu et al., KIVI (2024), with 8 instead of 2 bits, symmetric, a group of keys a block.
Legend: N blocks, S tails, KV key-value heads, D head dimension, T tokens of a step, M some blocks,
n blocks that a piece of a chunk sees in int8.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from runtime.kv import BLOCK_TOKENS
from runtime.layer_kv import LayerKV
from runtime.pages import zeros
from runtime.step_layout import Group, Shared, Span, StepLayout, minus_infinity, reach_of, rows_of
from runtime.tails import Own, StepTails, Tail

if TYPE_CHECKING:
    from runtime.paged_kernel import PagedKernel

_LARGEST = 127
# Rows of a chunk that are attended at once: each piece sees its own tokens twice, most hidden.
_PIECE_TOKENS = 256


def quantize(x: torch.Tensor, over: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x -> int8 codes of the same shape, and bf16 scales, one for all that lie along `over`."""
    x = x.float()
    scales = (x.abs().amax(over, keepdim=True) / _LARGEST).bfloat16()
    safe = torch.where(scales == 0, 1.0, scales.float())
    codes = (x / safe).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    return codes, scales.squeeze(over)


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, over: int, dtype: torch.dtype
) -> torch.Tensor:
    """What `quantize` gave, in `dtype`; the product is taken in fp32."""
    return torch.mul(codes, scales.float().unsqueeze(over)).to(dtype)


@dataclass(slots=True)
class Piece:
    """Some rows of a chunk: n earlier blocks in int8, then their own blocks in full precision."""

    start: int  # first row of the step
    count: int
    own: Own
    columns: slice  # of the own tokens
    blocks: torch.Tensor  # [n]
    places: torch.Tensor  # [16 n + own] position of each column
    first: int  # position of the first row
    window: int | None
    before: None = None  # no column is seen by all rows
    shared: Shared = field(default_factory=Shared)

    def pool_rows(self, kv_heads: int) -> torch.Tensor:
        """[KV * n] rows of a pool [N * KV, ...]."""
        return self.shared.get(kv_heads, lambda: rows_of(self.blocks[None], kv_heads))

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """[count, 16 n + own], 0 where a row may look and -inf elsewhere."""

        def make() -> torch.Tensor:
            device = self.blocks.device
            rows = torch.arange(self.first, self.first + self.count, device=device)[:, None]
            block, row_block = self.places // BLOCK_TOKENS, rows // BLOCK_TOKENS
            in_int8 = len(self.blocks) * BLOCK_TOKENS
            hidden = (block != row_block) | (self.places > rows)
            hidden[:, :in_int8] = (block >= row_block)[:, :in_int8]
            if self.window is not None:
                hidden |= self.places <= rows - self.window
            return minus_infinity(hidden, dtype)

        return self.shared.get(dtype, make)


class Int8KV:
    """One layer's blocks in int8, and the tails of those that are begun.

    Codes int8 [N, KV, 16, D]; scales bf16, of keys [N, KV, D] and of values [N, KV, 16]; tails in
    the model's dtype, [S, KV, 16, D].
    """

    def __init__(self, blocks: int, tails: LayerKV) -> None:
        self.tails = tails
        head = (blocks, tails.kv_heads)
        key_dim, value_dim = tails.keys.shape[3], tails.values.shape[3]

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return zeros((*head, *shape), dtype, tails.keys.device)

        self.keys = empty(BLOCK_TOKENS, key_dim, dtype=torch.int8)
        self.key_scales = empty(key_dim, dtype=torch.bfloat16)
        self.values = empty(BLOCK_TOKENS, value_dim, dtype=torch.int8)
        self.value_scales = empty(BLOCK_TOKENS, dtype=torch.bfloat16)

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a block consists of, by name; tails are not part of it."""
        return {
            "keys": self.keys,
            "key_scales": self.key_scales,
            "values": self.values,
            "value_scales": self.value_scales,
        }

    def more_tails(self, count: int) -> None:
        """Room for `count` tails in all; those that are there stay."""
        parts = (self.tails.keys, self.tails.values)
        with torch.inference_mode(mode=False):  # they are wiped outside of it
            more = (part.new_zeros(count - len(part), *part.shape[1:]) for part in parts)
            self.tails = LayerKV(*map(torch.cat, zip(parts, more, strict=True)))

    # ---- writing ---------------------------------------------------------------------------------

    def write(
        self,
        layout: StepLayout,
        key: torch.Tensor,
        value: torch.Tensor,
        kernel: PagedKernel | None = None,
    ) -> None:
        """Puts a step's keys and values, [1, KV, T, D] each, into tails and complete blocks."""
        step = tails_of(layout)
        self.prepare(layout)
        for own in step.owns.values():
            if own.blocks:
                full = slice(own.full[0] * BLOCK_TOKENS, own.full[1] * BLOCK_TOKENS)
                keys, values = (one[:, full] for one in self._own_tokens(own, key, value))
                self._store(own.blocks, _in_blocks(keys), _in_blocks(values))
        if kernel is not None:
            kernel.write(layout, key, value)
            return
        rows, targets = _token_rows(step, self.kv_heads, key.device)
        for pool, new in ((self.tails.keys, key), (self.tails.values, value)):
            dim = pool.shape[3]
            tokens = new[0].transpose(0, 1).index_select(0, rows).reshape(-1, dim)
            pool.view(-1, dim).index_copy_(0, targets, tokens)
        if step.complete:
            slots = [tail.slot for tail in step.complete]
            blocks = [tail.block for tail in step.complete]
            self._store(blocks, self.tails.keys[slots], self.tails.values[slots])

    def prepare(self, layout: StepLayout) -> None:
        """What has to happen to tails before a step writes: some leave, some come back."""
        step = tails_of(layout)
        self.settle(step.leaving)
        if step.returning:
            self._bring_back(step.returning)

    def settle(self, begun: Many[Tail]) -> None:
        """Quantizes blocks as far as they go, for their tails are needed elsewhere."""
        for tail in begun:
            keys, values = self.tails.keys[[tail.slot]], self.tails.values[[tail.slot]]
            keys[:, :, tail.filled :] = 0
            values[:, :, tail.filled :] = 0
            self._store([tail.block], keys, values)

    def _bring_back(self, tails: Many[Tail]) -> None:
        index = torch.tensor([tail.block for tail in tails], device=self.keys.device)
        keys, values = self._blocks(rows_of(index[:, None], self.kv_heads))
        for pool, whole in ((self.tails.keys, keys), (self.tails.values, values)):
            pool[[tail.slot for tail in tails]] = whole.view(len(tails), *pool.shape[1:])

    def _store(self, blocks: list[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values [M, KV, 16, D] -> these blocks."""
        self.keys[blocks], self.key_scales[blocks] = quantize(keys, 2)
        self.values[blocks], self.value_scales[blocks] = quantize(values, 3)

    # ---- reading ---------------------------------------------------------------------------------

    def _blocks(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks at `rows` of [N * KV] -> keys and values [rows, 16, D] in the model's dtype."""
        dtype = self.tails.keys.dtype
        key_dim, value_dim = self.keys.shape[3], self.values.shape[3]
        keys = dequantize(
            self.keys.view(-1, BLOCK_TOKENS, key_dim).index_select(0, rows),
            self.key_scales.view(-1, key_dim).index_select(0, rows),
            1,
            dtype,
        )
        values = dequantize(
            self.values.view(-1, BLOCK_TOKENS, value_dim).index_select(0, rows),
            self.value_scales.view(-1, BLOCK_TOKENS).index_select(0, rows),
            2,
            dtype,
        )
        return keys, values

    def gather(self, layout: StepLayout, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of decodes, [b, KV, L, D], the last block of each from its tail."""
        places, tails = _tail_rows(layout, group, self.kv_heads)
        batch = len(group.rows)
        gathered = []
        pools = (self.tails.keys, self.tails.values)
        for whole, pool in zip(self._blocks(group.pool_rows(self.kv_heads)), pools, strict=True):
            last = pool.view(-1, BLOCK_TOKENS, pool.shape[3]).index_select(0, tails)
            whole.index_copy_(0, places, last)
            gathered.append(whole.view(batch, self.kv_heads, -1, pool.shape[3]))
        return gathered[0], gathered[1]

    def chunks(self, layout: StepLayout, window: int | None, longer_than: int) -> list[Piece]:
        """The spans of more tokens than that, in pieces."""
        step = tails_of(layout)

        def make() -> list[Piece]:
            return [
                piece
                for number, own in step.owns.items()
                if own.count > longer_than
                for piece in _pieces(layout.spans[number], own, window, layout.device)
            ]

        return step.shared.get(("pieces", window, longer_than), make)

    def see(
        self, piece: Piece, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that a piece attends to, [1, KV, 16 n + own, D]."""
        earlier = self._blocks(piece.pool_rows(self.kv_heads))
        seen = [
            torch.cat([old.view(self.kv_heads, -1, old.shape[2]), own[:, piece.columns]], dim=1)
            for old, own in zip(earlier, self._own_tokens(piece.own, key, value), strict=True)
        ]
        return seen[0][None], seen[1][None]

    def _own_tokens(
        self, own: Own, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[KV, lead + count, D] from the beginning of a span's first block on."""
        rows = slice(own.start, own.start + own.count)
        new = (key[0, :, rows], value[0, :, rows])
        if own.lead == 0:
            return new
        if own.slot >= 0:
            lead = (self.tails.keys[own.slot], self.tails.values[own.slot])
        else:
            index = torch.tensor([[own.block]], device=self.keys.device)
            lead = self._blocks(rows_of(index, self.kv_heads))
        keys, values = (
            torch.cat([old[:, : own.lead], tokens], dim=1)
            for old, tokens in zip(lead, new, strict=True)
        )
        return keys, values


def tails_of(layout: StepLayout) -> StepTails:
    step = layout.tails
    assert step is not None, "a step over an int8 pool has its tails placed first"
    return step


def _in_blocks(tokens: torch.Tensor) -> torch.Tensor:
    """[KV, 16 M, D] -> [M, KV, 16, D]."""
    heads, _, dim = tokens.shape
    return tokens.reshape(heads, -1, BLOCK_TOKENS, dim).transpose(0, 1)


def _token_rows(
    step: StepTails, kv_heads: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the step that go to tails, and for each of their heads its row of [S * KV * 16]."""

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        targets = torch.from_numpy(step.targets)
        rows = (targets >= 0).nonzero().view(-1)
        slots, offsets = targets[rows] // BLOCK_TOKENS, targets[rows] % BLOCK_TOKENS
        heads = slots[:, None] * kv_heads + torch.arange(kv_heads)
        places = (heads * BLOCK_TOKENS + offsets[:, None]).view(-1)
        return rows.to(device), places.to(device)

    return step.shared.get(("rows", kv_heads), make)


def _tail_rows(
    layout: StepLayout, group: Group, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a group's gathered blocks that tails replace, and the rows of [S * KV] they are."""
    step = tails_of(layout)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        width = group.blocks.shape[1]
        last = (group.high - 1) // BLOCK_TOKENS
        slots = torch.tensor([step.slots[row][0] for row in group.rows.tolist()])
        kept = (slots >= 0).to(layout.device)
        heads = torch.arange(kv_heads, device=layout.device)
        batch = torch.arange(len(last), device=layout.device)
        places = (batch[:, None] * kv_heads + heads) * width + last[:, None]
        tails = slots.to(layout.device)[:, None] * kv_heads + heads
        return places[kept].view(-1), tails[kept].view(-1)

    return step.shared.get(("group", id(group), kv_heads), make)


def _pieces(span: Span, own: Own, window: int | None, device: torch.device) -> list[Piece]:
    pieces = []
    for at in range(0, span.count, _PIECE_TOKENS):
        count = min(_PIECE_TOKENS, span.count - at)
        first = span.context - span.count + at
        reach, _ = reach_of(Span(first + count, count, span.blocks), window)
        origin = first // BLOCK_TOKENS * BLOCK_TOKENS
        earlier = range(reach, max(reach, (first + count - 1) // BLOCK_TOKENS))
        places = torch.cat(
            [
                torch.arange(earlier.start * BLOCK_TOKENS, earlier.stop * BLOCK_TOKENS),
                torch.arange(origin, first + count),
            ]
        )
        pieces.append(
            Piece(
                start=own.start + at,
                count=count,
                own=own,
                columns=slice(origin - own.origin, first + count - own.origin),
                blocks=torch.tensor(
                    [span.blocks[one] for one in earlier], dtype=torch.long, device=device
                ),
                places=places.to(device),
                first=first,
                window=window,
            )
        )
    return pieces
