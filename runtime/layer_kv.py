"""The tensors behind the blocks of the KV pool: one layer's keys and values.

Knows layouts and bytes; knows no sequences and no attention. Every tensor begins with the block
number, so that a block is one run of bytes in each of them.

Legend: N blocks, KV key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from runtime.kv import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Keys and values of one layer, each [N * BLOCK_TOKENS, KV, D]."""

    keys: torch.Tensor
    values: torch.Tensor

    def parts(self) -> list[torch.Tensor]:
        """Views [N, bytes] of everything that a block holds here, always in the same order."""
        return [
            part.view(-1, BLOCK_TOKENS * part[0].numel()).view(torch.uint8)
            for part in (self.keys, self.values)
        ]


def read_blocks(pool: Many[LayerKV], blocks: Many[int]) -> list[torch.Tensor]:
    """What each block holds in all layers: one contiguous uint8 tensor a block, in host memory."""
    parts = [part for kv in pool for part in kv.parts()]
    index = torch.tensor(blocks, dtype=torch.long, device=parts[0].device)
    whole = torch.cat([part.index_select(0, index) for part in parts], dim=1).cpu()
    # A row of its own each: the memory of one must not depend on whether another is dropped.
    return [row.clone() for row in whole]


def write_blocks(pool: Many[LayerKV], blocks: Many[int], buffers: Many[torch.Tensor]) -> None:
    """Puts back what `read_blocks` gave, into any blocks of a pool of the same shape."""
    if len(blocks) != len(buffers):
        raise ValueError(f"{len(buffers)} buffers for {len(blocks)} blocks")
    parts = [part for kv in pool for part in kv.parts()]
    size = sum(part.shape[1] for part in parts)
    for block, buffer in zip(blocks, buffers, strict=True):
        if buffer.dtype != torch.uint8 or buffer.shape != (size,):
            raise ValueError(
                f"block {block} wants {size} bytes, got {tuple(buffer.shape)} of {buffer.dtype}"
            )
    index = torch.tensor(blocks, dtype=torch.long, device=parts[0].device)
    whole = torch.stack(list(buffers)).to(parts[0].device)
    at = 0
    for part in parts:
        part.index_copy_(0, index, whole[:, at : at + part.shape[1]])
        at += part.shape[1]
