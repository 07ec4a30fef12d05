"""Embedding tables: in the dtype of their file, in memory or read from the file row by row.

Knows tensors and files; knows no model. Rows come out in the dtype of activations.

Legend: V rows of the table, D width.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional


class FileChanged(Exception):
    """The file that a table is read from is not the one that was loaded."""


class StoredTable(nn.Module):
    """ids [...] -> rows [..., D]; half the memory where a file holds 16 bits and fp32 is wanted."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(ids, self.weight).to(self._dtype)


class FileTable(nn.Module):
    """The same, with the table in its file: a token costs one read of a row, a few microseconds.

    For a model whose output layer is tied to the table: the packed output layer is the one copy
    that memory has. The file is held open, so that replacing it changes nothing here; writing into
    it raises FileChanged instead of giving other rows.
    """

    def __init__(self, file: Path, offset: int, weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self._row_bytes = self.embedding_dim * weight.dtype.itemsize
        self._stored = weight.dtype
        self._dtype = dtype
        self._path, self._offset = file, offset
        self._handle = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)
        self._stamp = self._stamp_now()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self._stamp_now() != self._stamp:
            raise FileChanged(f"{self._path} was written to while it is served; start again")
        wanted: list[int] = ids.flatten().tolist()
        rows = torch.empty(len(wanted), self._row_bytes, dtype=torch.uint8)
        into = rows.numpy()
        size = self._row_bytes
        for at, row in enumerate(wanted):
            if os.preadv(self._handle, [into[at]], self._offset + row * size) < size:
                raise FileChanged(f"{self._path} became shorter while it is served; start again")
        table = rows.view(self._stored).to(self._dtype)
        return table.view(*ids.shape, self.embedding_dim)

    def _stamp_now(self) -> tuple[int, int]:
        state = os.fstat(self._handle)
        return state.st_size, state.st_mtime_ns
