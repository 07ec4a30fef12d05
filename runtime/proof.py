"""Whether a model's logits through our attention are its own: the condition for serving it.

Knows transformers' attention interface and what a model class must do with it; knows no files. A
model passes when each layer calls the interface exactly once, and when the logits of packed, paged,
chunked prompts equal those of transformers' own attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from runtime import attention
from runtime.attention import Span, lay_out, paged_attention
from runtime.kv import blocks_for
from runtime.model import LayerShape, Model, ModelRefused

AttentionInterface.register(attention.NAME, paged_attention)

# The proof's prompts: one that spans two blocks and is cut in chunks, a short one, one of a token.
_PROOF_LENGTHS = (23, 7, 1)
_PROOF_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


@torch.inference_mode()
def prove(module: PreTrainedModel, folder: Path) -> list[LayerShape]:
    """The model's attention layers in order, once their paged logits equal transformers' own.

    Raises ModelRefused naming the first thing that does not hold.
    """
    config = module.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(0, config.vocab_size, (1, length), generator=generator).to(module.device)
        for length in _PROOF_LENGTHS
    ]
    expected = [module(input_ids=ids, use_cache=False).logits[0, -1].float() for ids in prompts]
    try:
        module.set_attn_implementation(attention.NAME)
    except (ValueError, KeyError) as error:
        raise ModelRefused(
            f"{folder}: {type(module).__name__} does not use transformers' attention interface: "
            f"{error}"
        ) from error
    layers = _observe_layers(module, prompts[1], folder)
    _refuse_odd_windows(config, layers, folder)
    blocks = sum(blocks_for(length) for length in _PROOF_LENGTHS)
    model = Model(module, layers, blocks)
    found = _paged_logits(model, prompts)
    limit = _PROOF_TOLERANCE[module.dtype]
    for one, other in zip(expected, found, strict=True):
        apart = ((one - other.float()).abs().max() / one.abs().max().clamp(min=1.0)).item()
        if not apart <= limit:
            raise ModelRefused(
                f"{folder}: {type(module).__name__} gives other logits through paged attention "
                f"than through its own (relative difference {apart:.2g}, limit {limit:.2g}); its "
                "attention has a term that the attention interface does not carry"
            )
    return layers


def _observe_layers(module: PreTrainedModel, ids: torch.Tensor, folder: Path) -> list[LayerShape]:
    """Runs one prompt with a listening attention function: which module calls it, and how."""
    name = type(module).__name__
    seen: list[LayerShape] = []

    def listen(
        caller: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        if attention_mask is not None:
            raise ModelRefused(f"{folder}: {name} builds an attention mask of its own")
        if more.get("s_aux") is not None:
            raise ModelRefused(f"{folder}: {name} has attention sinks, which are not supported")
        if key.dim() != 4 or key.shape[2] != query.shape[2] or query.shape[1] % key.shape[1]:
            raise ModelRefused(
                f"{folder}: {name} calls attention with shapes {tuple(query.shape)} and "
                f"{tuple(key.shape)}, not with one key per token"
            )
        window = more.get("sliding_window")
        seen.append(LayerShape(caller, key.shape[1], key.shape[3], value.shape[3], window))
        groups = query.shape[1] // key.shape[1]
        return value.repeat_interleave(groups, dim=1).transpose(1, 2), None

    with _listening(listen):
        module(input_ids=ids, use_cache=False)
    expected = module.config.get_text_config().num_hidden_layers
    callers = {id(layer.module) for layer in seen}
    if len(seen) != expected or len(callers) != expected:
        raise ModelRefused(
            f"{folder}: {name} has {expected} layers but calls the attention interface {len(seen)} "
            f"times from {len(callers)} modules: some layers are not plain attention "
            "(linear, recurrent or latent attention is not supported)"
        )
    return seen


@contextlib.contextmanager
def _listening(listen: Any) -> Iterator[None]:
    AttentionInterface.register(attention.NAME, listen)
    try:
        yield
    finally:
        AttentionInterface.register(attention.NAME, paged_attention)


def _refuse_odd_windows(config: Any, layers: list[LayerShape], folder: Path) -> None:
    """A layer that the config calls sliding must hand its window to the attention call."""
    kinds = getattr(config, "layer_types", None) or []
    for number, (kind, layer) in enumerate(zip(kinds, layers, strict=False)):
        if (kind == "sliding_attention") != (layer.window is not None):
            raise ModelRefused(
                f"{folder}: layer {number} is {kind!r} but calls attention with "
                f"sliding_window={layer.window}"
            )
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelRefused(f"{folder}: layer {number} is {kind!r}, which is not supported")


def _paged_logits(model: Model, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each prompt's last logits, packed together; the first one in two chunks and a decode."""
    tables: list[list[int]] = []
    for prompt in prompts:
        first = sum(len(table) for table in tables)
        tables.append(list(range(first, first + blocks_for(prompt.shape[1]))))
    long = prompts[0][0].tolist()
    cut = len(long) // 2

    def run(parts: list[tuple[int, list[int], int]]) -> torch.Tensor:
        """parts: (prompt number, ids, position of the first) in packing order."""
        spans = [Span(at + len(ids), len(ids), tables[number]) for number, ids, at in parts]
        layout = lay_out(spans, model.device)
        ids = [token for _, part, _ in parts for token in part]
        positions = [at + i for _, part, at in parts for i in range(len(part))]
        keep = [
            start + len(part) - 1 for start, (_, part, _) in zip(layout.starts, parts, strict=True)
        ]
        return model.forward(ids, positions, layout, keep)

    run([(0, long[:cut], 0)])
    mixed = run(
        [
            (2, prompts[2][0].tolist(), 0),
            (0, long[cut:-1], cut),
            (1, prompts[1][0].tolist(), 0),
        ]
    )
    last = run([(0, long[-1:], len(long) - 1)])
    return [last[0], mixed[2], mixed[0]]
