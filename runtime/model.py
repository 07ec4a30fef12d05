"""A model whose attention reads our paged KV pool: one packed step in, logits out.

Knows tensors and the pool; knows neither files nor requests. `runtime.loading` makes it, and
`runtime.proof` shows that it is right.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from ctypes import CDLL
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from runtime.attention import PagedLayer, StepHolder, StepLayout
from runtime.kv import BLOCK_TOKENS
from runtime.layer_kv import LayerKV, block_format, read_blocks, write_blocks
from runtime.paged_kernel import kernel_of
from runtime.surgery import Tally


class ModelRefused(Exception):
    """The model cannot be served; the message says which model, why, and what to do."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer caches per token."""

    module: nn.Module
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None


class Model:
    """A loaded model and its KV pool. `forward` runs one packed step; one thread at a time."""

    def __init__(
        self,
        module: PreTrainedModel,
        layers: list[LayerShape],
        blocks: int,
        *,
        dtype: torch.dtype | None = None,
        weights: Tally | None = None,
        library: CDLL | None = None,
    ) -> None:
        """`dtype` is that of activations, `weights` what surgery made of the linear layers.

        `library` is compiled code for attention, where there is some.
        """
        self.module = module
        self.config = module.config.get_text_config()
        self.device = module.device
        self.dtype = dtype or module.dtype
        self.weights = weights or Tally()
        # Rows of the table; a tokenizer with more tokens than that has ids which no row stands for.
        table = module.get_input_embeddings().weight
        assert isinstance(table, torch.Tensor)
        self.vocab_size = table.shape[0]
        self.context_tokens: int = self.config.max_position_embeddings
        self.blocks = blocks
        self.scratch_slot = blocks * BLOCK_TOKENS  # in one more block, which no sequence holds
        self.step = StepHolder()
        self._pool = [self._pool_of(layer) for layer in layers]
        for layer, kv in zip(layers, self._pool, strict=True):
            paged = PagedLayer(kv, self.step, kernel_of(library, kv))
            layer.module.paged_layer = paged  # type: ignore[assignment]

    def _pool_of(self, layer: LayerShape) -> LayerKV:
        def empty(dim: int) -> torch.Tensor:
            shape = (self.blocks + 1, layer.kv_heads, BLOCK_TOKENS, dim)
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        return LayerKV(empty(layer.key_dim), empty(layer.value_dim))

    def wipe(self, blocks: list[int]) -> None:
        """Zeroes blocks: what is masked still counts as 0 x value, and 0 x NaN is NaN."""
        for part in self._parts:
            part[blocks] = 0

    def read_blocks(self, blocks: Many[int]) -> list[torch.Tensor]:
        """A copy of each block in host memory, `block_bytes` uint8 each: layer after layer."""
        return read_blocks(self._parts, blocks)

    def write_blocks(self, blocks: Many[int], buffers: Many[torch.Tensor]) -> None:
        """Puts buffers of `read_blocks` into these blocks. Raises ValueError on another size."""
        write_blocks(self._parts, blocks, buffers)

    @cached_property
    def _parts(self) -> list[torch.Tensor]:
        return [part for kv in self._pool for part in kv.parts()]

    @property
    def block_bytes(self) -> int:
        return sum(part.shape[1] for part in self._parts)

    @property
    def block_format(self) -> str:
        """Blocks of equal format mean the same; others cannot be exchanged."""
        return block_format(self._pool)

    @property
    def kv_bytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    @property
    def parameters(self) -> int:
        return self.weights.parameters

    @torch.inference_mode()
    def forward(
        self, ids: list[int], positions: list[int], layout: StepLayout, keep: list[int]
    ) -> torch.Tensor:
        """ids, positions [T] of the packed step -> logits [len(keep), V] of the rows in `keep`."""
        self.step.layout = layout
        try:
            row = torch.tensor([ids, positions], dtype=torch.long).to(self.device)
            logits: torch.Tensor = self.module(
                input_ids=row[:1],
                position_ids=row[1:],
                use_cache=False,
                logits_to_keep=torch.tensor(keep, dtype=torch.long, device=self.device),
            ).logits
        finally:
            self.step.layout = None
        return logits[0]
