"""What a model's files say of its size. Reads headers, never a weight; knows no torch."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.model_folder import ModelError

_HEADER_BYTES_MAX = 100 * 2**20  # safetensors' own limit for its JSON header


@dataclass(frozen=True, slots=True)
class Weights:
    """What safetensors headers say: no weight is read."""

    parameters: int
    dtypes: tuple[str, ...]
    bytes: int


def weights_of(folder: Path) -> Weights:
    """Raises ModelError for a file that is no safetensors file."""
    parameters, total = 0, 0
    dtypes: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > _HEADER_BYTES_MAX:
                    raise ValueError("its header is too long")
                header = json.loads(stream.read(length))
            total += file.stat().st_size
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            parameters += sum(math.prod(tensor["shape"]) for tensor in tensors)
            dtypes.update(tensor["dtype"] for tensor in tensors)
            end = max((tensor["data_offsets"][1] for tensor in tensors), default=0)
            if 8 + length + end != file.stat().st_size:
                raise ValueError("it is cut short, or too long")
        except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} is no safetensors file: {error}") from None
    return Weights(parameters, tuple(sorted(dtypes)), total)


def kv_bytes(config: dict[str, Any], tokens: int, width: int) -> int | None:
    """Keys and values of every layer: 2 x layers x kv heads x head dim x width x tokens."""
    try:
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return int(2 * config["num_hidden_layers"] * kv_heads * head_dim * width * tokens)
    except (KeyError, TypeError, ZeroDivisionError):
        return None
