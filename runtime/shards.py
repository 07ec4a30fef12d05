"""Safetensors files as tensors that lie in them: each file is opened and mapped once.

Knows the file format; knows no model. Nothing is copied here: a tensor's bytes come into memory
when somebody reads them, and leave it again with `forget`.
"""

from __future__ import annotations

import json
import mmap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HEADER_BYTES_MAX = 100 * 2**20
_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class StoredTensor(torch.Tensor):
    """A tensor in its file. A loader that moves or casts it gets it as it lies there."""

    def to(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes lie."""

    file: Path
    offset: int


@dataclass(slots=True)
class Shards:
    """All tensors of a checkpoint by name, and the mapped files that they lie in."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    _maps: list[tuple[Path, mmap.mmap, int]] = field(default_factory=list)  # file, map, address

    def forget(self) -> None:
        """Gives the memory of what was read so far back; reading again reads the file again."""
        for _, mapped, _ in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def place_of(self, tensor: torch.Tensor) -> Place | None:
        """Where a tensor lies, or None for one that lies in memory of its own."""
        address = tensor.data_ptr()
        for file, mapped, start in self._maps:
            if start <= address < start + len(mapped):
                return Place(file, address - start)
        return None


def open_shards(folder: Path) -> Shards:
    """Maps the files that make up a model. Raises SafetensorError, OSError, ValueError."""
    shards = Shards()
    for file in shard_files(folder):
        _open(file, shards)
    return shards


def shard_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the files that the index names."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"neither {_SINGLE} nor {_INDEX} is there")
    names = json.loads(index.read_bytes())["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


def _open(file: Path, shards: Shards) -> None:
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(0)
        header_bytes = int.from_bytes(opened.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, _HEADER_BYTES_MAX):
            raise SafetensorError(f"{file.name} has no header")
        try:
            header = json.loads(opened.read(header_bytes))
            entries = [(name, one) for name, one in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, RecursionError) as error:
            raise SafetensorError(f"{file.name} has an unreadable header: {error}") from None
        mapped = mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY)
    with warnings.catch_warnings():
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
    shards._maps.append((file, mapped, whole.data_ptr()))
    for name, entry in entries:
        tensor = _tensor(whole, 8 + header_bytes, entry, f"{name!r} of {file.name}")
        shards.tensors[name] = tensor.as_subclass(StoredTensor)


def _tensor(whole: torch.Tensor, start: int, entry: Any, where: str) -> torch.Tensor:
    try:
        dtype = _DTYPES[entry["dtype"]]
        shape = [int(size) for size in entry["shape"]]
        first, last = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise SafetensorError(f"{where} is described in an unknown way: {error!r}") from None
    if not 0 <= first <= last <= len(whole) - start or last - first != prod(shape) * dtype.itemsize:
        raise SafetensorError(f"{where} lies outside the file or has another size than its shape")
    flat = whole[start + first : start + last]
    if (start + first) % dtype.itemsize:
        flat = flat.clone()  # an unaligned file is unusual; torch wants whole elements
    return flat.view(dtype).view(shape)
