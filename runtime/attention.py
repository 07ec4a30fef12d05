"""Paged attention behind transformers' AttentionInterface: one function for every model class.

Knows tensors and a step's layout; knows no model family and no scheduler. Two backends: gather the
blocks, then torch's scaled-dot-product attention, on any device, decodes in batches of similar
length and each longer chunk by itself; or, where it could be compiled, a kernel that attends
decodes and short chunks on a CPU without copying their blocks (`runtime.paged_kernel`).

Legend: T tokens of the step, b decodes of a group, H heads, KV key-value heads, D head dimension,
L positions gathered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from runtime.int8_kv import Int8KV, Piece
from runtime.layer_kv import LayerKV
from runtime.paged_kernel import PagedKernel
from runtime.step_layout import SHORT_TOKENS, Chunk, Group, Span, StepLayout, lay_out

__all__ = ["NAME", "PagedLayer", "Span", "StepHolder", "StepLayout", "lay_out", "paged_attention"]

NAME = "headgate_paged"

# On a CPU a chunk after this much context is attended in two parts, before it and itself, which
# needs no mask and computes no score that the mask would hide: 18-30 % less time at 4,096 + 512.
_SPLIT_TOKENS = 64


class PagedLayer:
    """What an attention module carries: its layer's pool, and the step that all layers share."""

    __slots__ = ("kernel", "kv", "step")

    def __init__(
        self, kv: LayerKV | Int8KV, step: StepHolder, kernel: PagedKernel | None = None
    ) -> None:
        self.kv = kv
        self.step = step
        self.kernel = kernel


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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    kv.write(layout, key, value, layer.kernel)
    if layer.kernel is None:
        done_tokens = 1
        for group in layout.groups(sliding_window):
            out[group.rows] = _attend_decodes(query, kv, layout, group, scale, softcap)
    else:
        done_tokens = SHORT_TOKENS
        layer.kernel.attend(layout, query, out, scale, sliding_window, softcap)
    if layout.longest > done_tokens:
        for chunk in kv.chunks(layout, sliding_window, done_tokens):
            rows = slice(chunk.start, chunk.start + chunk.count)
            keys, values = kv.see(chunk, key, value)  # type: ignore[arg-type]  # of its own making
            out[rows] = _attend_chunk(query[:, :, rows], keys, values, chunk, scale, softcap)
    return out.unsqueeze(0), None


def _attend_decodes(
    query: torch.Tensor,
    kv: LayerKV | Int8KV,
    layout: StepLayout,
    group: Group,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """[b, H, D]. The query heads of one KV head stand as rows of one small query matrix."""
    batch, heads, dim = len(group.rows), query.shape[1], query.shape[3]
    keys, values = kv.gather(layout, group)
    rows = query[0].transpose(0, 1).index_select(0, group.rows)
    rows = rows.view(batch, kv.kv_heads, heads // kv.kv_heads, dim)
    out = _attend(rows, keys, values, group.mask(query.dtype), scale, softcap)
    return out.reshape(batch, heads, -1)


def _attend_chunk(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    chunk: Chunk | Piece,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """query [1, H, count, D] -> [count, H, D]."""
    before = chunk.before if softcap is None else None
    splits = query.is_cpu and keys.shape[3] == values.shape[3]  # else torch has no such kernel
    if before is not None and splits and min(before, chunk.count) >= _SPLIT_TOKENS:
        out = _attend_in_two(query, keys, values, before, scale)
    else:
        mask = None if before == 0 else chunk.mask(query.dtype)
        out = _attend(query, keys, values, mask, scale, softcap)
    return out[0].transpose(0, 1)


def _attend_in_two(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, before: int, scale: float
) -> torch.Tensor:
    """Attention to `before` positions and, causally, to the rest: [1, H, count, D].

    Each part knows the logarithm of its sum of exponentials, and those weigh the two results.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    _, heads, count, dim = query.shape
    # What lies before is seen by every row: the query heads of one KV head can be one matrix.
    folded = query.reshape(1, keys.shape[1], -1, dim)
    early, early_log = flash(
        folded, keys[:, :, :before], values[:, :, :before], 0.0, False, scale=scale
    )
    late, late_log = flash(
        query, keys[:, :, before:], values[:, :, before:], 0.0, True, scale=scale
    )
    share = torch.sigmoid(late_log - early_log.reshape(1, heads, count)).unsqueeze(-1)
    both: torch.Tensor = torch.lerp(early.reshape(late.shape).float(), late.float(), share)
    return both.to(query.dtype)


def _attend(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """rows [b, H, R, D] over keys [b, KV, L, D]; without a mask R = L, attention is causal."""
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
    assert mask is not None, "soft-capped scores are masked by a tensor"
    if grouped:
        groups = rows.shape[1] // keys.shape[1]
        keys = keys.repeat_interleave(groups, dim=1)
        values = values.repeat_interleave(groups, dim=1)
    scores = torch.tanh(rows @ keys.transpose(-1, -2) * (scale / softcap)) * softcap
    return (scores.float() + mask).softmax(-1).to(values.dtype) @ values
