"""A model whose attention reads our paged KV pool: one packed step in, logits out.

Knows tensors and the pool; knows neither files nor requests. `runtime.loading` makes it, and
`runtime.proof` shows that it is right.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from ctypes import CDLL
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from runtime.attention import PagedLayer, StepHolder, StepLayout
from runtime.compiled import Decoder
from runtime.int8_kv import Int8KV
from runtime.kv import BLOCK_TOKENS
from runtime.layer_kv import LayerKV, block_format, parts_of, read_blocks, write_blocks
from runtime.paged_kernel import PagedKernel, kernel_of
from runtime.pages import zeros
from runtime.surgery import Tally
from runtime.tails import Tails


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
        device: torch.device | None = None,
        weights: Tally | None = None,
        kv: Literal["auto", "int8"] = "auto",
        library: CDLL | None = None,
    ) -> None:
        """`dtype` and `device` are those of activations, `weights` what was made of the layers.

        `kv` is the format of keys and values, `auto` being that of activations. `library` is
        compiled code for attention, where there is some.
        """
        self.module = module
        self.config = module.config.get_text_config()
        self.device = device or module.device
        self.dtype = dtype or module.dtype
        self.weights = weights or Tally()
        # Rows of the table; a tokenizer with more tokens than that has ids which no row stands for.
        self.vocab_size: int = module.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        self.context_tokens: int = self.config.max_position_embeddings
        self.blocks = blocks
        self.scratch_slot = blocks * BLOCK_TOKENS  # in one more block, which no sequence holds
        self.step = StepHolder()
        self._tails = Tails(blocks) if kv == "int8" else None
        self._layers = [PagedLayer(self._pool_of(layer), self.step) for layer in layers]
        for layer, paged in zip(layers, self._layers, strict=True):
            layer.module.paged_layer = paged  # type: ignore[assignment]
        self._pool = [paged.kv for paged in self._layers]
        self.windows = [layer.window for layer in layers]
        self.decoder: Decoder | None = None  # for short steps, where there is one
        self.use(library)

    def use(self, library: CDLL | None) -> None:
        """Attends by compiled code from now on, or by torch alone."""
        self._library = library
        for paged in self._layers:
            paged.kernel = kernel_of(library, paged.kv)
        if self.decoder is not None:
            self.decoder.bind(self.kernels)

    def move(self, origins: Many[int], targets: Many[int]) -> None:
        """Copies what slots hold to others, in every layer; not for a pool in int8."""
        for kv in self._pool:
            assert isinstance(kv, LayerKV), "trees of guesses need a pool of whole numbers"
            kv.move(origins, targets)

    @property
    def library(self) -> CDLL | None:
        """The compiled code that it uses, if any."""
        return self._library

    def share_pool(self, other: Model) -> None:
        """Reads and writes the other's blocks from now on; both are of the same shape and dtype."""
        self.blocks, self.scratch_slot = other.blocks, other.scratch_slot
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            mine.kv = theirs.kv
        self._pool = other._pool
        self.use(self._library)

    @property
    def kv_rounds(self) -> bool:
        """Whether keys and values lose something in the pool."""
        return self._tails is not None

    @property
    def kernels(self) -> list[PagedKernel | None]:
        """The compiled attention of each layer."""
        return [paged.kernel for paged in self._layers]

    def _pool_of(self, layer: LayerShape) -> LayerKV | Int8KV:
        def empty(blocks: int) -> LayerKV:
            shape = (blocks, layer.kv_heads, BLOCK_TOKENS)
            dims = (layer.key_dim, layer.value_dim)
            return LayerKV(*(zeros((*shape, dim), self.dtype, self.device) for dim in dims))

        if self._tails is None:
            return empty(self.blocks + 1)
        return Int8KV(self.blocks, empty(0))

    def _place_tails(self, layout: StepLayout) -> None:
        """Gives the blocks that a step begins their tails, and more room where it runs out."""
        assert self._tails is not None
        before = self._tails.capacity
        layout.tails = self._tails.place(layout)
        if self._tails.capacity == before:
            return
        for paged in self._layers:
            assert isinstance(paged.kv, Int8KV)
            paged.kv.more_tails(self._tails.capacity)
        self.use(self._library)  # tails have moved

    def wipe(self, blocks: list[int]) -> None:
        """Zeroes blocks: what is masked still counts as 0 x value, and 0 x NaN is NaN."""
        slots = self._tails.forget(blocks) if self._tails is not None else []
        for part in self._parts:
            part[blocks] = 0
        for kv in self._pool:
            if isinstance(kv, Int8KV):
                kv.tails.keys[slots] = 0
                kv.tails.values[slots] = 0

    def read_blocks(self, blocks: Many[int]) -> list[torch.Tensor]:
        """A copy of each block in host memory, `block_bytes` uint8 each: layer after layer."""
        if self._tails is not None:
            begun = self._tails.begun(blocks)
            for kv in self._pool:
                if isinstance(kv, Int8KV):
                    kv.settle(begun)
        return read_blocks(self._parts, blocks)

    def write_blocks(self, blocks: Many[int], buffers: Many[torch.Tensor]) -> None:
        """Puts buffers of `read_blocks` into these blocks. Raises ValueError on another size."""
        write_blocks(self._parts, blocks, buffers)
        if self._tails is not None:
            self._tails.forget(blocks)

    @cached_property
    def _parts(self) -> list[torch.Tensor]:
        return [part for kv in self._pool for part in parts_of(kv)]

    @property
    def block_bytes(self) -> int:
        return sum(part.shape[1] for part in self._parts)

    @property
    def block_format(self) -> str:
        """Blocks of equal format mean the same; others cannot be exchanged."""
        return block_format(self._pool)

    @property
    def kv_bytes(self) -> int:
        """Memory of the pool, and of what is kept beside it in full precision."""
        pools = sum(part.nbytes for part in self._parts)
        tails = [kv.tails for kv in self._pool if isinstance(kv, Int8KV)]
        return pools + sum(part.nbytes for kv in tails for part in parts_of(kv))

    @property
    def parameters(self) -> int:
        return self.weights.parameters

    @torch.inference_mode()
    def forward(
        self, ids: list[int], positions: list[int], layout: StepLayout, keep: list[int]
    ) -> torch.Tensor:
        """ids, positions [T] of the packed step -> logits [len(keep), V] of the rows in `keep`."""
        if self._tails is not None:
            self._place_tails(layout)
        decoder = self.decoder
        if decoder is not None and decoder.takes(layout):
            for kv in self._pool:
                kv.prepare(layout)
            return decoder(ids, positions, layout, keep)
        return self.run(self.module, ids, positions, layout, keep)

    def run(
        self,
        module: nn.Module,
        ids: list[int],
        positions: list[int],
        layout: StepLayout,
        keep: list[int],
    ) -> torch.Tensor:
        """`forward` by torch's operators, through a module whose attention layers are ours."""
        self.step.layout = layout
        try:
            row = torch.tensor([ids, positions], dtype=torch.long).to(self.device)
            logits: torch.Tensor = module(
                input_ids=row[:1],
                position_ids=row[1:],
                use_cache=False,
                logits_to_keep=torch.tensor(keep, dtype=torch.long, device=self.device),
            ).logits
        finally:
            self.step.layout = None
        return logits[0]
