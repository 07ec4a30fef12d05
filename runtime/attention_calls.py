"""Which modules of a model call attention, and how: what a paged cache has to know of them.

Knows transformers' attention interface; knows no weights. Runs one prompt with a function in the
place of attention that listens, and refuses what the interface does not say or says oddly.
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
from runtime.attention import paged_attention
from runtime.model import LayerShape, ModelRefused

AttentionInterface.register(attention.NAME, paged_attention)

CHECK_CONFIG = "check that config.json belongs to these weights"
OTHER_FAMILY = "docs/models.md lists the families that run"


def observe_layers(module: PreTrainedModel, ids: torch.Tensor, folder: Path) -> list[LayerShape]:
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
            raise ModelRefused(
                f"{folder}: {name} builds an attention mask of its own; {OTHER_FAMILY}"
            )
        if more.get("s_aux") is not None:
            raise ModelRefused(
                f"{folder}: {name} has attention sinks, which are not supported; {OTHER_FAMILY}"
            )
        if key.dim() != 4 or key.shape[2] != query.shape[2] or query.shape[1] % key.shape[1]:
            raise ModelRefused(
                f"{folder}: {name} calls attention with shapes {tuple(query.shape)} and "
                f"{tuple(key.shape)}, not with one key per token; {OTHER_FAMILY}"
            )
        window = more.get("sliding_window")
        seen.append(LayerShape(caller, key.shape[1], key.shape[3], value.shape[3], window))
        groups = query.shape[1] // key.shape[1]
        return value.repeat_interleave(groups, dim=1).transpose(1, 2), None

    with _listening(listen):
        module(input_ids=ids, use_cache=False)
    callers = len({id(layer.module) for layer in seen})
    _refuse_odd_counts(module, len(seen), callers, folder)
    return seen


def _refuse_odd_counts(module: PreTrainedModel, calls: int, callers: int, folder: Path) -> None:
    """Each layer must call the attention interface once, from a module of its own."""
    layers = module.config.get_text_config().num_hidden_layers
    if calls == callers == layers > 0:
        return
    if calls == 0:
        reason = (
            "does not use transformers' attention interface, so its layers, attention or not, "
            "cannot read the paged cache"
        )
    elif calls < layers:
        reason = (
            f"calls the attention interface {calls} times for {layers} layers: some layers are not "
            "plain attention (linear, recurrent and convolution layers are not supported)"
        )
    else:
        reason = (
            f"calls the attention interface {calls} times from {callers} modules for {layers} "
            "layers: only one call per layer, from a module of its own, is supported"
        )
    raise ModelRefused(f"{folder}: {type(module).__name__} {reason}; {OTHER_FAMILY}")


@contextlib.contextmanager
def _listening(listen: Any) -> Iterator[None]:
    AttentionInterface.register(attention.NAME, listen)
    try:
        yield
    finally:
        AttentionInterface.register(attention.NAME, paged_attention)


def refuse_odd_windows(config: Any, layers: list[LayerShape], folder: Path) -> None:
    """A layer that the config calls sliding must hand its window to the attention call."""
    kinds = getattr(config, "layer_types", None) or []
    for number, (kind, layer) in enumerate(zip(kinds, layers, strict=False)):
        if (kind == "sliding_attention") != (layer.window is not None):
            raise ModelRefused(
                f"{folder}: layer {number} is {kind!r} but calls attention with "
                f"sliding_window={layer.window}; {CHECK_CONFIG}"
            )
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelRefused(
                f"{folder}: layer {number} is {kind!r}, which is not supported; {OTHER_FAMILY}"
            )
