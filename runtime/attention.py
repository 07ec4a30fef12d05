"""Paged attention behind transformers' AttentionInterface: one function for every model class.

Knows tensors and where a step's tokens lie in the KV pool; knows no model family and no scheduler.
A step is packed: tokens of all sequences stand behind one another in one row. The sequences that
bring exactly one token stand first ("decodes", attended in one batch), each longer chunk is
attended by itself. Backend here: gather the blocks, then torch's scaled-dot-product attention,
on any device.

Legend: T tokens of the step, B decodes, H heads, KV key-value heads, D head dimension,
C context tokens of a sequence after this step, N blocks of the longest decode, L = 16 N.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from runtime.kv import BLOCK_TOKENS, blocks_for
from runtime.layer_kv import LayerKV

if TYPE_CHECKING:
    from runtime.adapters import AdapterRows

NAME = "headgate_paged"


@dataclass(frozen=True, slots=True)
class Span:
    """`count` tokens of one sequence that end at its token number `context`, kept in `blocks`.

    Others may read the first `sealed` positions: what is computed there again is not written.
    """

    context: int
    count: int
    blocks: list[int]
    sealed: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A span of several tokens at row `start` of the step."""

    start: int
    count: int
    context: int
    blocks: torch.Tensor  # [blocks of the context]


@dataclass(slots=True)
class StepLayout:
    """Where the tokens of one step lie. Built once a step, read by every layer."""

    starts: list[int]  # row at which each span begins
    write_slots: torch.Tensor  # [T] position in the pool that each token's key and value go to
    decode_blocks: torch.Tensor  # [B * N] block numbers, short tables padded with block 0
    decode_contexts: torch.Tensor  # [B]
    chunks: list[Chunk]
    adapters: Many[AdapterRows] = ()
    _masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict)

    @property
    def decodes(self) -> int:
        return self.decode_contexts.shape[0]

    def decode_mask(self, window: int | None) -> torch.Tensor:
        """[B, 1, 1, L], true where a decode may look: its context, or the window's end of it."""
        key = (-1, window)
        mask = self._masks.get(key)
        if mask is None:
            length = self.decode_blocks.shape[0] // self.decodes * BLOCK_TOKENS
            at = torch.arange(length, device=self.decode_contexts.device)
            last = self.decode_contexts[:, None]
            mask = at < last
            if window is not None:
                mask &= at >= last - window
            mask = self._masks[key] = mask[:, None, None, :]
        return mask

    def chunk_mask(self, number: int, window: int | None) -> torch.Tensor | None:
        """[count, C] for one chunk; None for plain causal attention from the first position on."""
        chunk = self.chunks[number]
        if chunk.count == chunk.context and (window is None or chunk.context <= window):
            return None
        key = (number, window)
        mask = self._masks.get(key)
        if mask is None:
            device = self.write_slots.device
            rows = torch.arange(chunk.context - chunk.count, chunk.context, device=device)[:, None]
            columns = torch.arange(chunk.context, device=device)
            mask = columns <= rows
            if window is not None:
                mask &= columns > rows - window
            self._masks[key] = mask
        return mask


def lay_out(spans: Many[Span], device: torch.device, scratch_slot: int = 0) -> StepLayout:
    """The layout of a step from its spans, those of one token first.

    Keys and values that are not to be written go to `scratch_slot`, which nobody reads.
    """
    decodes = [span for span in spans if span.count == 1]
    width = max((len(span.blocks) for span in decodes), default=0)
    tables = np.zeros((len(decodes), width), dtype=np.int64)
    slots: list[int] = []
    starts: list[int] = []
    chunks: list[Chunk] = []
    for number, span in enumerate(spans):
        starts.append(len(slots))
        if number < len(decodes):
            tables[number, : len(span.blocks)] = span.blocks
            last = span.context - 1
            slot = span.blocks[last // BLOCK_TOKENS] * BLOCK_TOKENS + last % BLOCK_TOKENS
            slots.append(scratch_slot if last < span.sealed else slot)
            continue
        assert span.count > 1, "spans of one token stand before the longer ones"
        held = torch.tensor(span.blocks[: blocks_for(span.context)], device=device)
        chunks.append(Chunk(len(slots), span.count, span.context, held))
        slots += _slots(span, scratch_slot)
    contexts = np.array([span.context for span in decodes], dtype=np.int64)
    return StepLayout(
        starts=starts,
        write_slots=torch.from_numpy(np.array(slots, dtype=np.int64)).to(device),
        decode_blocks=torch.from_numpy(tables.reshape(-1)).to(device),
        decode_contexts=torch.from_numpy(contexts).to(device),
        chunks=chunks,
    )


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


class PagedLayer:
    """What an attention module carries: its layer's pool, and the step that all layers share."""

    __slots__ = ("kv", "step")

    def __init__(self, kv: LayerKV, step: StepHolder) -> None:
        self.kv = kv
        self.step = step


class StepHolder:
    """The current step, shared by reference so that setting it costs one assignment."""

    __slots__ = ("layout",)

    def __init__(self) -> None:
        self.layout: StepLayout | None = None


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, KV, T, D] -> output [1, T, H, D].

    Called by transformers' attention modules; `attention_mask` is None because no mask function is
    registered under this name, causality follows from the layout.
    """
    layer: PagedLayer = module.paged_layer  # type: ignore[assignment]  # attached by runtime.model
    layout, kv = layer.step.layout, layer.kv
    assert layout is not None and attention_mask is None
    kv.keys.index_copy_(0, layout.write_slots, key[0].transpose(0, 1))
    kv.values.index_copy_(0, layout.write_slots, value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    if layout.decodes:
        outputs.append(_attend_decodes(query, kv, layout, scale, sliding_window, softcap))
    for number, chunk in enumerate(layout.chunks):
        mask = layout.chunk_mask(number, sliding_window)
        outputs.append(_attend_chunk(query, kv, chunk, mask, scale, softcap))
    packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return packed.unsqueeze(0), None


def _attend_decodes(
    query: torch.Tensor,
    kv: LayerKV,
    layout: StepLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """[B, H, D]. The query heads of one KV head stand as rows of one small query matrix."""
    batch = layout.decodes
    heads, dim = query.shape[1], query.shape[3]
    kv_heads = kv.keys.shape[1]
    keys = _gather(kv.keys, layout.decode_blocks).view(batch, -1, kv_heads, kv.keys.shape[2])
    values = _gather(kv.values, layout.decode_blocks).view(batch, -1, kv_heads, kv.values.shape[2])
    rows = query[0, :, :batch].transpose(0, 1).reshape(batch, kv_heads, heads // kv_heads, dim)
    mask = layout.decode_mask(window)
    out = _attend(rows, keys.transpose(1, 2), values.transpose(1, 2), mask, scale, softcap)
    return out.reshape(batch, heads, -1)


def _gather(pool: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """[positions, KV, D]: the blocks of a pool, copied behind one another."""
    whole = pool.view(-1, BLOCK_TOKENS, *pool.shape[1:]).index_select(0, blocks)
    return whole.view(-1, *pool.shape[1:])


def _attend_chunk(
    query: torch.Tensor,
    kv: LayerKV,
    chunk: Chunk,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """[count, H, D]."""
    rows = query[:, :, chunk.start : chunk.start + chunk.count]
    keys = _gather(kv.keys, chunk.blocks)[: chunk.context].transpose(0, 1)
    values = _gather(kv.values, chunk.blocks)[: chunk.context].transpose(0, 1)
    return _attend(rows, keys[None], values[None], mask, scale, softcap)[0].transpose(0, 1)


def _attend(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """rows [N, H, R, D] over keys [N, KV, C, D]; without a mask R = C, attention is causal."""
    grouped = rows.shape[1] != keys.shape[1]
    if softcap is None:
        return scaled_dot_product_attention(
            rows,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=grouped,
        )
    if grouped:
        groups = rows.shape[1] // keys.shape[1]
        keys = keys.repeat_interleave(groups, dim=1)
        values = values.repeat_interleave(groups, dim=1)
    scores = torch.tanh(rows @ keys.transpose(-1, -2) * (scale / softcap)) * softcap
    if mask is None:
        size = scores.shape[-1]
        mask = torch.ones(size, size, dtype=torch.bool, device=scores.device).tril()
    weights = scores.float().masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.to(values.dtype) @ values
