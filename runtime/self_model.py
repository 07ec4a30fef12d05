"""A model with some of its layers left out, over the same weights and the same KV pool.

Knows how transformers' classes keep their layers; knows no sequences. It guesses for the whole
model: what it writes into the pool is written again when its guesses are verified.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence as Many
from typing import Any

import torch
from torch import nn

from runtime.compiled import CompiledStep, NotOfThisKind
from runtime.model import Model, ModelRefused
from runtime.step_layout import StepLayout

log = logging.getLogger(__name__)


class LayersModel:
    """The layers of `model` with the numbers in `kept`. One thread at a time, as the model's own.

    Raises ModelRefused where the model does not keep its layers in a list.
    """

    def __init__(self, model: Model, kept: Many[int]) -> None:
        self.device = model.device
        self.scratch_slot = model.scratch_slot
        self.blocks = model.blocks
        self.context_tokens = model.context_tokens
        self.vocab_size = model.vocab_size
        self._model = model
        self._module: Any = _with_layers(model.module, kept)
        self._decoder = self._compiled(kept)

    def _compiled(self, kept: Many[int]) -> CompiledStep | None:
        """The same compiled step with fewer layers, where the whole model has one."""
        library, windows = self._model.library, [self._model.windows[at] for at in kept]
        if self._model.decoder is None or library is None:
            return None
        try:
            step = CompiledStep(library, self._module, self._model.dtype, windows)
        except NotOfThisKind as error:
            log.info("guesses are made by torch's operators: %s", error)
            return None
        step.bind([self._model.kernels[at] for at in kept])
        return step

    def wipe(self, blocks: list[int]) -> None:
        self._model.wipe(blocks)

    @torch.inference_mode()
    def forward(
        self, ids: list[int], positions: list[int], layout: StepLayout, keep: list[int]
    ) -> torch.Tensor:
        """As `Model.forward`: logits [len(keep), V]."""
        if self._decoder is not None and self._decoder.takes(layout):
            return self._decoder(ids, positions, layout, keep)
        return self._model.run(self._module, ids, positions, layout, keep)


def _with_layers(module: Any, kept: Many[int]) -> Any:
    """A module that shares everything with `module` but its list of layers."""
    inner = module.base_model
    layers = getattr(inner, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelRefused(
            f"runtime.speculation.self_draft: {type(module).__name__} does not keep its layers in "
            "a list called `layers`; take w8a8 instead of layers, or a draft"
        )
    config = copy.deepcopy(module.config)
    text = config.get_text_config()
    text.num_hidden_layers = len(kept)
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        text.layer_types = [kinds[at] for at in kept]
    fewer = _shallow(inner)
    fewer.config = config.get_text_config()
    fewer.layers = nn.ModuleList([layers[at] for at in kept])
    whole = _shallow(module)
    whole.config = config
    setattr(whole, module.base_model_prefix, fewer)
    return whole


def _shallow(module: Any) -> Any:
    """Another module with the same children, which can then be exchanged."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    return other
