"""A Hugging Face folder or hub name -> a model whose attention reads our paged KV pool.

Knows transformers' model classes and what they must look like; knows no requests. Only safetensors
are read and no code from a model folder runs. A family is served when it passes `_prove`: each
layer calls the attention interface exactly once, and the packed, paged logits equal transformers'.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from runtime import attention
from runtime.attention import PagedLayer, Span, StepHolder, StepLayout, lay_out, paged_attention
from runtime.kv import BLOCK_TOKENS, LayerKV, blocks_for

log = logging.getLogger(__name__)

AttentionInterface.register(attention.NAME, paged_attention)

# Rotary scalings that look at the length of the whole packed row and so would mix sequences up.
_ROW_DEPENDENT_ROPE = ("dynamic", "longrope")
# The proof's prompts: one that spans two blocks and is cut in chunks, a short one, one of a token.
_PROOF_LENGTHS = (23, 7, 1)
_PROOF_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


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

    def __init__(self, module: PreTrainedModel, layers: list[LayerShape], blocks: int) -> None:
        self.module = module
        self.config = module.config.get_text_config()
        self.device = module.device
        self.dtype = module.dtype
        self.vocab_size: int = self.config.vocab_size
        self.context_tokens: int = self.config.max_position_embeddings
        self.blocks = blocks
        self._step = StepHolder()
        self._pool = [self._pool_of(layer) for layer in layers]
        for layer, kv in zip(layers, self._pool, strict=True):
            layer.module.paged_layer = PagedLayer(kv, self._step)  # type: ignore[assignment]

    def _pool_of(self, layer: LayerShape) -> LayerKV:
        slots = self.blocks * BLOCK_TOKENS

        def empty(dim: int) -> torch.Tensor:
            return torch.zeros(slots, layer.kv_heads, dim, dtype=self.dtype, device=self.device)

        return LayerKV(empty(layer.key_dim), empty(layer.value_dim))

    @property
    def kv_bytes(self) -> int:
        return sum(kv.keys.nbytes + kv.values.nbytes for kv in self._pool)

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.module.parameters())

    @torch.inference_mode()
    def forward(
        self, ids: list[int], positions: list[int], layout: StepLayout, keep: list[int]
    ) -> torch.Tensor:
        """ids, positions [T] of the packed step -> logits [len(keep), V] of the rows in `keep`."""
        self._step.layout = layout
        try:
            row = torch.tensor([ids, positions], dtype=torch.long).to(self.device)
            logits: torch.Tensor = self.module(
                input_ids=row[:1],
                position_ids=row[1:],
                use_cache=False,
                logits_to_keep=torch.tensor(keep, dtype=torch.long, device=self.device),
            ).logits
        finally:
            self._step.layout = None
        return logits[0]


def load(
    source: Path | str,
    *,
    kv_tokens: int,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
) -> tuple[Model, Path]:
    """The model, and the folder that it was read from. Raises ModelRefused with the reason."""
    folder = source if isinstance(source, Path) else _fetch(source, revision)
    config = _read_config(folder)
    where = _device(device)
    kind = _dtype(dtype, where)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # no hints there
    _refuse_by_config(config, folder)
    module = _read_weights(folder, kind, where)
    layers = _prove(module, folder)
    return Model(module, layers, max(1, kv_tokens // BLOCK_TOKENS)), folder


def _fetch(name: str, revision: str | None) -> Path:
    """A hub name's files in the local hub cache, safetensors and text files only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelRefused(
            f"{name}: cannot be fetched from the hub ({reason}); check the name and the network, "
            "or give a local folder"
        ) from error


def _read_config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ModelRefused(f"{folder}: no config.json; give a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise ModelRefused(
            f"{folder}: no *.safetensors; only safetensors are loaded, since pickled weights can "
            "run code: load them once with transformers and write them with save_pretrained"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise ModelRefused(f"{folder}: config.json is not understood: {error}") from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelRefused(
            f"{folder}: model type {config.model_type!r} is not a causal language model that "
            "transformers knows"
        )
    return config


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelRefused("device cuda was asked for, but torch finds none; use auto or cpu")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def _refuse_by_config(config: Any, folder: Path) -> None:
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or {}
    each = ropes.values() if all(isinstance(rope, dict) for rope in ropes.values()) else [ropes]
    for rope in each:
        if rope.get("rope_type") in _ROW_DEPENDENT_ROPE:
            raise ModelRefused(
                f"{folder}: rope_type {rope['rope_type']!r} rescales by the length of the longest "
                "sequence, which a packed batch does not have; use a checkpoint with linear, yarn "
                "or llama3 scaling"
            )
    if not getattr(text, "max_position_embeddings", None):
        raise ModelRefused(f"{folder}: config.json gives no max_position_embeddings")


def _read_weights(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        module = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",  # every family has it, with every term of its attention
        )
    except (ValueError, OSError, RuntimeError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelRefused(f"{folder}: the weights cannot be loaded: {reason}") from error
    module.to(device)  # type: ignore[arg-type]  # transformers wraps a bound method
    module.train(False)
    return module.requires_grad_(False)


# ---- the proof ----------------------------------------------------------------------------------


@torch.inference_mode()
def _prove(module: PreTrainedModel, folder: Path) -> list[LayerShape]:
    """The model's attention layers in order, once their paged logits equal transformers' own.

    Raises ModelRefused naming the first thing that does not hold.
    """
    config = module.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(0, config.vocab_size, (1, length), generator=generator).to(module.device)
        for length in _PROOF_LENGTHS
    ]
    expected = [module(input_ids=ids, use_cache=False).logits[0, -1].float() for ids in prompts]
    try:
        module.set_attn_implementation(attention.NAME)
    except (ValueError, KeyError) as error:
        raise ModelRefused(
            f"{folder}: {type(module).__name__} does not use transformers' attention interface: "
            f"{error}"
        ) from error
    layers = _observe_layers(module, prompts[1], folder)
    _refuse_odd_windows(config, layers, folder)
    blocks = sum(blocks_for(length) for length in _PROOF_LENGTHS)
    model = Model(module, layers, blocks)
    found = _paged_logits(model, prompts)
    limit = _PROOF_TOLERANCE[module.dtype]
    for one, other in zip(expected, found, strict=True):
        apart = ((one - other.float()).abs().max() / one.abs().max().clamp(min=1.0)).item()
        if not apart <= limit:
            raise ModelRefused(
                f"{folder}: {type(module).__name__} gives other logits through paged attention "
                f"than through its own (relative difference {apart:.2g}, limit {limit:.2g}); its "
                "attention has a term that the attention interface does not carry"
            )
    return layers


def _observe_layers(module: PreTrainedModel, ids: torch.Tensor, folder: Path) -> list[LayerShape]:
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
            raise ModelRefused(f"{folder}: {name} builds an attention mask of its own")
        if more.get("s_aux") is not None:
            raise ModelRefused(f"{folder}: {name} has attention sinks, which are not supported")
        if key.dim() != 4 or key.shape[2] != query.shape[2] or query.shape[1] % key.shape[1]:
            raise ModelRefused(
                f"{folder}: {name} calls attention with shapes {tuple(query.shape)} and "
                f"{tuple(key.shape)}, not with one key per token"
            )
        window = more.get("sliding_window")
        seen.append(LayerShape(caller, key.shape[1], key.shape[3], value.shape[3], window))
        groups = query.shape[1] // key.shape[1]
        return value.repeat_interleave(groups, dim=1).transpose(1, 2), None

    with _listening(listen):
        module(input_ids=ids, use_cache=False)
    expected = module.config.get_text_config().num_hidden_layers
    callers = {id(layer.module) for layer in seen}
    if len(seen) != expected or len(callers) != expected:
        raise ModelRefused(
            f"{folder}: {name} has {expected} layers but calls the attention interface {len(seen)} "
            f"times from {len(callers)} modules: some layers are not plain attention "
            "(linear, recurrent or latent attention is not supported)"
        )
    return seen


@contextlib.contextmanager
def _listening(listen: Any) -> Iterator[None]:
    AttentionInterface.register(attention.NAME, listen)
    try:
        yield
    finally:
        AttentionInterface.register(attention.NAME, paged_attention)


def _refuse_odd_windows(config: Any, layers: list[LayerShape], folder: Path) -> None:
    """A layer that the config calls sliding must hand its window to the attention call."""
    kinds = getattr(config, "layer_types", None) or []
    for number, (kind, layer) in enumerate(zip(kinds, layers, strict=False)):
        if (kind == "sliding_attention") != (layer.window is not None):
            raise ModelRefused(
                f"{folder}: layer {number} is {kind!r} but calls attention with "
                f"sliding_window={layer.window}"
            )
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelRefused(f"{folder}: layer {number} is {kind!r}, which is not supported")


def _paged_logits(model: Model, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each prompt's last logits, packed together; the first one in two chunks and a decode."""
    tables: list[list[int]] = []
    for prompt in prompts:
        first = sum(len(table) for table in tables)
        tables.append(list(range(first, first + blocks_for(prompt.shape[1]))))
    long = prompts[0][0].tolist()
    cut = len(long) // 2

    def run(parts: list[tuple[int, list[int], int]]) -> torch.Tensor:
        """parts: (prompt number, ids, position of the first) in packing order."""
        spans = [Span(at + len(ids), len(ids), tables[number]) for number, ids, at in parts]
        layout = lay_out(spans, model.device)
        ids = [token for _, part, _ in parts for token in part]
        positions = [at + i for _, part, at in parts for i in range(len(part))]
        keep = [
            start + len(part) - 1 for start, (_, part, _) in zip(layout.starts, parts, strict=True)
        ]
        return model.forward(ids, positions, layout, keep)

    run([(0, long[:cut], 0)])
    mixed = run(
        [
            (2, prompts[2][0].tolist(), 0),
            (0, long[cut:-1], cut),
            (1, prompts[1][0].tolist(), 0),
        ]
    )
    last = run([(0, long[-1:], len(long) - 1)])
    return [last[0], mixed[2], mixed[0]]
