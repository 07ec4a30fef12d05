"""LoRA adapters: read from PEFT folders, several at once in one packed step.

Knows the files that PEFT writes and the model's modules by name; knows no requests. The base
weights stay as they are, in whatever format: the rows of a step that belong to an adapter get
x A^T B^T * scale (Hu et al. 2021, section 4.1) added to the output of each adapted layer.

Legend: T rows of the step, R rows of one adapter, I features in, O features out, r rank.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence as Many
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import linear

from runtime.attention import Span, StepHolder, lay_out
from runtime.model import Model, ModelRefused

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTERS_MAX = 256
_PREFIX = "base_model.model."

# Settings that change what an adapter computes, and the values at which they change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "modules_to_save": (None, [], ()),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
}


@dataclass(frozen=True, slots=True)
class Delta:
    """One layer's part of an adapter: down [r, I], up [O, r] with the scale in it."""

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True, slots=True)
class Adapter:
    """`identity` hashes its files: cached blocks are found only by the very same adapter."""

    name: str
    identity: str
    deltas: Mapping[str, Delta]  # by the name of the module in the model

    @property
    def parameters(self) -> int:
        return sum(one.down.numel() + one.up.numel() for one in self.deltas.values())


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """The rows of a step that belong to one adapter, [R]; None for all of them."""

    deltas: Mapping[str, Delta]
    rows: torch.Tensor | None


class AdaptedLinear(nn.Module):
    """A layer of any kind from I to O features, and what adapters add to its output."""

    def __init__(self, inner: nn.Module, name: str, step: StepHolder) -> None:
        super().__init__()
        self.inner = inner
        self._name = name
        self._step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, T, I] -> [1, T, O]."""
        y: torch.Tensor = self.inner(x)
        layout = self._step.layout
        if layout is None or not layout.adapters:
            return y
        if x.shape[:-1] != (1, layout.slots.shape[0]):
            raise ModelRefused(
                f"an adapter changes {self._name}, which does not see all rows of a step (it sees "
                f"{tuple(x.shape[:-1])}); leave that layer out of target_modules"
            )
        for rows in layout.adapters:
            delta: Delta | None = rows.deltas.get(self._name)
            if delta is None:
                continue
            mine = x[0] if rows.rows is None else x[0].index_select(0, rows.rows)
            added = linear(linear(mine, delta.down), delta.up)
            if rows.rows is None:
                y[0] += added
            else:
                y[0].index_add_(0, rows.rows, added)
        return y


def find_adapters(folder: Path) -> dict[str, Path]:
    """Name -> folder of each adapter in a folder: its subfolders with an adapter_config.json.

    Raises ModelRefused when there is none.
    """
    if not folder.is_dir():
        raise ModelRefused(f"{folder}: no such folder; runtime.adapters names a folder of adapters")
    found = {one.name: one for one in sorted(folder.iterdir()) if (one / CONFIG).is_file()}
    if not found:
        raise ModelRefused(
            f"{folder}: no adapter in it; each adapter is a subfolder with {CONFIG} and {WEIGHTS}"
        )
    if len(found) > ADAPTERS_MAX:
        raise ModelRefused(f"{folder}: {len(found)} adapters, at most {ADAPTERS_MAX} are served")
    return found


def load_adapters(model: Model, folder: Path) -> dict[str, Adapter]:
    """Reads every adapter of a folder and prepares the model for them.

    Raises ModelRefused for an adapter that does not fit the model, or asks for more than LoRA.
    """
    adapters = {name: _read(one, model) for name, one in find_adapters(folder).items()}
    for name in {name for one in adapters.values() for name in one.deltas}:
        parent, _, child = name.rpartition(".")
        inner = model.module.get_submodule(name)
        wrapped = AdaptedLinear(inner, name, model.step)
        setattr(model.module.get_submodule(parent), child, wrapped)
    _try(model, [AdapterRows(one.deltas, None) for one in adapters.values()])
    return adapters


def _try(model: Model, rows: list[AdapterRows]) -> None:
    """One step in which every adapted layer takes part. Raises ModelRefused where one cannot."""
    layout = lay_out([Span(2, 2, [0])], model.device, model.scratch_slot)
    layout.adapters = rows
    model.forward([0, 0], [0, 1], layout, [1])
    model.wipe([0])


def adapter_rows(
    adapters: Many[Adapter | None], counts: Many[int], device: torch.device
) -> list[AdapterRows]:
    """Which rows of a step belong to which adapter; `adapters` and `counts` are those of its spans.

    [] when no row has one. `rows` is None where all of them belong to one.
    """
    spans: dict[str, tuple[Adapter, list[int]]] = {}
    at = 0
    for adapter, count in zip(adapters, counts, strict=True):
        if adapter is not None:
            spans.setdefault(adapter.name, (adapter, []))[1].extend(range(at, at + count))
        at += count
    if len(spans) == 1:
        ((adapter, rows),) = spans.values()
        if len(rows) == at:
            return [AdapterRows(adapter.deltas, None)]
    return [
        AdapterRows(adapter.deltas, torch.tensor(rows, device=device))
        for adapter, rows in spans.values()
    ]


# ---- files ---------------------------------------------------------------------------------------


def _read(folder: Path, model: Model) -> Adapter:
    try:
        text = (folder / CONFIG).read_bytes()
        config = json.loads(text)
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise ModelRefused(
            f"{folder}: no {WEIGHTS}; only safetensors are loaded, since pickled weights can run "
            "code: save the adapter with PEFT's save_pretrained"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelRefused(f"{folder}: the adapter cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ModelRefused(f"{folder}: {CONFIG} is not an object")
    _refuse_by_config(config, folder)
    deltas = _deltas(config, tensors, folder, model)
    return Adapter(folder.name, _identity(text, tensors), deltas)


def _identity(config: bytes, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(config)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _refuse_by_config(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelRefused(
            f"{folder}: peft_type is {config.get('peft_type')!r}, only 'LORA' is supported"
        )
    for name, neutral in _NEUTRAL.items():
        if config.get(name) not in neutral:
            raise ModelRefused(
                f"{folder}: {name} {config[name]!r} is more than plain LoRA, which is all that is "
                "supported; train the adapter without it, or merge it into the weights"
            )


def _deltas(
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    model: Model,
) -> dict[str, Delta]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, found, half = key.removeprefix(_PREFIX).rpartition(".lora_")
        half = half.removesuffix(".weight").removesuffix(".default")
        if not found or half not in ("A", "B") or tensor.dim() != 2:
            raise ModelRefused(
                f"{folder}: {key!r} is no part of a LoRA of linear layers; embeddings and "
                "convolutions are not supported"
            )
        halves.setdefault(name, {})[half] = tensor
    if not halves:
        raise ModelRefused(f"{folder}: {WEIGHTS} is empty")
    return {
        name: _delta(name, pair, config, folder, model) for name, pair in sorted(halves.items())
    }


def _delta(
    name: str,
    pair: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    folder: Path,
    model: Model,
) -> Delta:
    if pair.keys() != {"A", "B"}:
        raise ModelRefused(f"{folder}: {name} has only half of its LoRA, {sorted(pair)}")
    down, up = pair["A"], pair["B"]
    features = _features(model.module, name)
    if features is None:
        raise ModelRefused(
            f"{folder}: it adapts {name!r}, which is no linear layer inside this model's blocks; "
            "the adapter belongs to another model, or adapts embeddings or the head"
        )
    if (down.shape[1], up.shape[0]) != features or down.shape[0] != up.shape[1]:
        raise ModelRefused(
            f"{folder}: {name} has a LoRA of shapes {tuple(down.shape)} and {tuple(up.shape)}, "
            f"the layer maps {features[0]} to {features[1]} features: another model's adapter"
        )
    scale = _scale(name, down.shape[0], config)
    if not math.isfinite(scale):
        raise ModelRefused(f"{folder}: lora_alpha and r give no finite scale for {name}")
    place, kind = model.device, model.dtype
    return Delta(down.to(place, kind), (up.float() * scale).to(place, kind))


def _scale(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilized adapters (Kalajdzievski 2023)."""
    alphas = config.get("alpha_pattern") or {}
    alpha = next((v for k, v in alphas.items() if _is_meant(name, k)), config.get("lora_alpha"))
    try:
        return float(alpha or "") / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (TypeError, ValueError, ZeroDivisionError):
        return math.nan


def _is_meant(name: str, pattern: str) -> bool:
    """PEFT's rule: a pattern is the end of a module's name, from a dot on."""
    return name == pattern or name.endswith(f".{pattern}")


def _features(module: nn.Module, name: str) -> tuple[int, int] | None:
    """Features in and out of a linear layer of any kind that sees all rows of a step."""
    try:
        layer: Any = module.get_submodule(name)
    except AttributeError:
        return None
    if not any(part.isdigit() for part in name.split(".")):
        return None  # not in a block: the head sees only the rows that are kept
    if hasattr(layer, "in_features"):
        return int(layer.in_features), int(layer.out_features)
    if hasattr(layer, "nx") and hasattr(layer, "nf"):  # GPT-2's Conv1D
        return int(layer.nx), int(layer.nf)
    return None
