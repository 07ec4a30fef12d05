"""The tensors behind the blocks of the KV pool: one layer's keys and values.

Knows layouts and bytes; knows no sequences and no attention. Every tensor begins with the block
number, so that a block is one run of bytes in each of them.

Legend: N blocks, KV key-value heads, D head dimension, T tokens of a step, b decodes of a group,
L positions seen.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from runtime.kv import BLOCK_TOKENS
from runtime.step_layout import Chunk, Group, StepLayout

if TYPE_CHECKING:
    from runtime.paged_kernel import PagedKernel


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Keys and values of one layer, each [N, KV, 16, D]: a head's part of a block is one run."""

    keys: torch.Tensor
    values: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a block consists of, by name."""
        return {"keys": self.keys, "values": self.values}

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    def prepare(self, layout: StepLayout) -> None:
        """What has to happen before a step writes; here nothing."""

    def write(
        self,
        layout: StepLayout,
        key: torch.Tensor,
        value: torch.Tensor,
        kernel: PagedKernel | None = None,
    ) -> None:
        """Puts a step's keys and values, [1, KV, T, D] each, where the layout says."""
        if kernel is not None:
            kernel.write(layout, key, value)
            return
        rows = layout.write_rows(self.kv_heads)
        for pool, new in ((self.keys, key), (self.values, value)):
            dim = pool.shape[3]
            pool.view(-1, dim).index_copy_(0, rows, new[0].transpose(0, 1).reshape(-1, dim))

    def gather(self, _: StepLayout, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a group of decodes, [b, KV, L, D]."""
        return self._blocks(group.pool_rows(self.kv_heads), len(group.rows))

    def chunks(self, layout: StepLayout, window: int | None, longer_than: int) -> list[Chunk]:
        """The spans of more tokens than that, and trees."""
        return [
            chunk
            for chunk in layout.chunks(window)
            if chunk.count > longer_than or chunk.parents is not None
        ]

    def move(self, origins: Many[int], targets: Many[int]) -> None:
        """Copies keys and values from slots to others, all read before any is written."""
        places = [divmod(slot, BLOCK_TOKENS) for slot in (*origins, *targets)]
        blocks, offsets = (list(column) for column in zip(*places, strict=True))
        count = len(origins)
        for pool in (self.keys, self.values):
            pool[blocks[count:], :, offsets[count:]] = pool[blocks[:count], :, offsets[:count]]

    def see(
        self, chunk: Chunk, _key: torch.Tensor, _value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that a chunk attends to, [1, KV, L, D], its own among them."""
        keys, values = self._blocks(chunk.pool_rows(self.kv_heads), 1)
        seen = slice(chunk.skip, chunk.skip + chunk.length)
        return keys[:, :, seen], values[:, :, seen]

    def _blocks(self, rows: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks at `rows` of [N * KV] (see `rows_of`) -> keys and values [batch, KV, 16 n, D]."""
        keys, values = (
            pool.view(-1, BLOCK_TOKENS * pool.shape[3])
            .index_select(0, rows)
            .view(batch, self.kv_heads, -1, pool.shape[3])
            for pool in (self.keys, self.values)
        )
        return keys, values


class BlockTensors(Protocol):
    """One layer of a KV pool, whatever its format."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a block consists of, by name, each beginning with the block number."""


def parts_of(kv: BlockTensors) -> list[torch.Tensor]:
    """Views [N, bytes] of everything that a block holds in a layer, always in the same order."""
    return [part.view(len(part), -1).view(torch.uint8) for part in kv.tensors().values()]


def block_format(pool: Many[BlockTensors]) -> str:
    """What a block's bytes mean: types and shapes of every tensor, equal layers counted."""
    layers = [
        " ".join(f"{name} {one.dtype} {tuple(one.shape[1:])}" for name, one in kv.tensors().items())
        for kv in pool
    ]
    return "; ".join(f"{len(list(same))} x {layer}" for layer, same in groupby(layers))


def read_blocks(parts: Many[torch.Tensor], blocks: Many[int]) -> list[torch.Tensor]:
    """What each block holds in the `parts` of all layers: one contiguous uint8 tensor a block, in
    host memory."""
    if parts[0].device.type == "cpu":  # plain copies of runs: 3-8 times as fast as indexing
        views = [part.numpy() for part in parts]
        return [
            torch.from_numpy(np.concatenate([view[block] for view in views])) for block in blocks
        ]
    index = torch.tensor(blocks, dtype=torch.long, device=parts[0].device)
    whole = torch.cat([part.index_select(0, index) for part in parts], dim=1).cpu()
    # A row of its own each: the memory of one must not depend on whether another is dropped.
    return [row.clone() for row in whole]


def write_blocks(parts: Many[torch.Tensor], blocks: Many[int], buffers: Many[torch.Tensor]) -> None:
    """Puts back what `read_blocks` gave, into any blocks of a pool of the same shape."""
    if len(blocks) != len(buffers):
        raise ValueError(f"{len(buffers)} buffers for {len(blocks)} blocks")
    size = sum(part.shape[1] for part in parts)
    for block, buffer in zip(blocks, buffers, strict=True):
        if buffer.dtype != torch.uint8 or buffer.shape != (size,):
            raise ValueError(
                f"block {block} wants {size} bytes, got {tuple(buffer.shape)} of {buffer.dtype}"
            )
    at = 0
    if parts[0].device.type == "cpu":  # 15-50 times as fast as indexing
        rows = [buffer.numpy() for buffer in buffers]
        for part in parts:
            view, end = part.numpy(), at + part.shape[1]
            for block, row in zip(blocks, rows, strict=True):
                view[block] = row[at:end]
            at = end
        return
    index = torch.tensor(blocks, dtype=torch.long, device=parts[0].device)
    whole = torch.stack(list(buffers)).to(parts[0].device)
    for part in parts:
        part.index_copy_(0, index, whole[:, at : at + part.shape[1]])
        at += part.shape[1]
