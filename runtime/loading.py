"""A Hugging Face folder or hub name -> a model that has proved itself.

Knows files, configurations and what cannot be served; knows no requests. Only safetensors are read
and no code from a model folder runs.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from policies.schema import WeightFormat, Weights
from runtime import quantize
from runtime.allocator import giving_back
from runtime.choices import Choices
from runtime.compiled import compiled_step
from runtime.conversion import run_and_convert
from runtime.kv import BLOCK_TOKENS
from runtime.model import Model, ModelRefused
from runtime.paged_kernel import load_library
from runtime.proof import Reference, own_logits, proof_prompts, prove, reason_of, refusing
from runtime.quantized_checkpoint import method_of, read_quantized
from runtime.shards import Shards, open_shards
from runtime.surgery import Plan, Tally

# Rotary scalings that look at the length of the whole packed row and so would mix sequences up.
_ROW_DEPENDENT_ROPE = ("dynamic", "longrope")

# What is fetched of a hub repository. Some hold the weights twice, the second time in the format of
# their author.
_FETCHED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model"]
_NOT_FETCHED = ["consolidated*", "original/*"]

# Every family has it, with every term of its attention, and it is part of transformers itself.
_REFERENCE_ATTENTION = "eager"

_AUTO = Weights()

# How far rounded weights may move the proof's logits (relative, Frobenius, middle prompt).
# Measured: w8a8 up to 0.11, w8 0.06, int4 0.51 on random weights; 0.05, 0.04, 0.15 on pocket.
# Logits that have nothing in common are 1.4 apart.
_ROUNDING: dict[WeightFormat, float] = {
    "bf16": 0.1,
    "w8a8": 0.3,
    "w8": 0.3,
    "int4": 0.9,
    "fp8": 0.5,
}

_CHECK_FOLDER = "check that config.json belongs to these weights, or fetch the folder again"


def load_model(
    source: Path | str,
    *,
    kv_tokens: int,
    device: str = "auto",
    dtype: str = "auto",
    weights: Weights = _AUTO,
    revision: str | None = None,
    kv: Literal["auto", "int8"] = "auto",
    compiles: bool = False,
    choices: Choices | None = None,
) -> tuple[Model, Path]:
    """The model, and the folder that it was read from. Raises ModelRefused with the reason.

    `kv` is the format of keys and values. `compiles`: C++ may be compiled and used where that makes
    it faster. `choices`: where it is kept what was fastest; without, each process measures.
    """
    folder = source if isinstance(source, Path) else _fetch(source, revision)
    config = _read_config(folder)
    where = _device(device)
    library = load_library() if compiles and where.type == "cpu" else None
    activations = _dtype(dtype, weights, where, choices)
    plan = Plan(weights, activations, where, library=library, choices=choices)
    _refuse_formats(plan)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # no hints there
    _refuse_by_config(config, folder)
    with giving_back():
        module, shards = _read_weights(folder, config, plan)
        if shards is None:
            plan = replace(plan, rounded=True)
        else:
            plan = replace(plan, forget=shards.forget)
        reference, tally = _convert(module, shards, folder, plan)
        layers = prove(module, folder, reference)
        blocks = max(1, kv_tokens // BLOCK_TOKENS)
        model = Model(
            module,
            layers,
            blocks,
            dtype=plan.dtype,
            device=where,
            weights=tally,
            kv=kv,
            library=library,
        )
        model.decoder = compiled_step(model, library)
    return model, folder


def _fetch(name: str, revision: str | None) -> Path:
    """A hub name's files in the local hub cache, safetensors and text files only."""
    from huggingface_hub import snapshot_download

    advice = "check the name and the network, or give a local folder"
    with refusing(name, "cannot be fetched from the hub", advice):
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=_FETCHED, ignore_patterns=_NOT_FETCHED
            )
        )


def _read_config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ModelRefused(f"{folder}: no config.json; give a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise ModelRefused(
            f"{folder}: no *.safetensors; only safetensors are loaded, since pickled weights can "
            "run code: load them once with transformers and write them with save_pretrained"
        )
    with refusing(folder, "config.json is not understood", "mend it or fetch the folder again"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # A config.json can name others, even kernels on the hub, which would be foreign code.
        config._attn_implementation = _REFERENCE_ATTENTION
        config._experts_implementation = None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelRefused(
            f"{folder}: model type {config.model_type!r} is not a causal language model that "
            "transformers knows; docs/models.md lists the families that run"
        )
    return config


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelRefused("device cuda was asked for, but torch finds none; use auto or cpu")
    return torch.device(name)


def _dtype(
    name: str, weights: Weights, device: torch.device, choices: Choices | None
) -> torch.dtype:
    """That of activations. On a CPU bf16 has to be asked for, there or by the weights' format."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16
    asked = "bf16" in _formats(weights)
    return torch.bfloat16 if asked and quantize.computes_bf16_faster(choices) else torch.float32


def _formats(weights: Weights) -> set[WeightFormat]:
    return {weights.attention, weights.mlp, weights.head}


def _refuse_formats(plan: Plan) -> None:
    for chosen in sorted(_formats(plan.weights)):
        try:
            quantize.check(chosen, plan.device)
        except quantize.FormatUnavailable as error:
            raise ModelRefused(f"runtime.weights: {error}") from None


def _rounding(plan: Plan) -> float | None:
    """How far the formats may move the logits; None where none of them rounds."""
    limits = [_ROUNDING[chosen] for chosen in _formats(plan.weights) if chosen in _ROUNDING]
    if plan.rounded:
        limits.append(_ROUNDING["bf16"])
    return max(limits, default=None)


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


def _read_weights(folder: Path, config: Any, plan: Plan) -> tuple[PreTrainedModel, Shards | None]:
    """The model with its weights still in their files, in the dtype of the files.

    A quantized checkpoint comes into memory as its quantizer reads it: then there are no shards.
    """
    method = method_of(config, folder)
    shards = None
    if method is not None:
        loaded = read_quantized(folder, config, plan, method)
    else:
        with refusing(folder, "the weights cannot be loaded", _CHECK_FOLDER):
            shards = open_shards(folder)
            family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            loaded = family.from_pretrained(
                None,
                config=config,
                state_dict=shards.tensors,
                dtype=plan.dtype,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
    module: PreTrainedModel = loaded[0]
    _refuse_holes(loaded[1], folder)
    used = module.config._attn_implementation
    if used != _REFERENCE_ATTENTION:
        raise ModelRefused(
            f"{folder}: config.json asks for attention {used!r}, which replaces "
            f"{_REFERENCE_ATTENTION!r}; remove _attn_implementation from it"
        )
    module.train(False)
    return module.requires_grad_(False), shards


def _convert(
    module: PreTrainedModel, shards: Shards | None, folder: Path, plan: Plan
) -> tuple[Reference, Tally]:
    """What the untouched model says to the proof's prompts, and what was made of it."""
    prompts = proof_prompts(module.config.get_text_config().vocab_size, plan.device)
    try:
        logits, tally = run_and_convert(
            module, plan, shards, lambda: own_logits(module, prompts, folder)
        )
    except torch.OutOfMemoryError as error:
        raise ModelRefused(
            f"{folder}: the weights do not fit on {plan.device} ({reason_of(error)}); choose "
            "another device or model"
        ) from error
    return Reference(logits, plan.dtype, plan.device, _rounding(plan)), tally


def _refuse_holes(report: dict[str, Any], folder: Path) -> None:
    """Transformers fills what a checkpoint lacks with random values; such a model is not served.

    Tied weights and those that a model class computes are not in its report.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelRefused(
            f"{folder}: the weights lack {missing[0]!r} ({len(missing)} missing in all); "
            f"{_CHECK_FOLDER}"
        )
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise ModelRefused(
            f"{folder}: {name!r} has shape {tuple(found)} in the weights, but config.json asks for "
            f"{tuple(expected)}; {_CHECK_FOLDER}"
        )
    for message in report["error_msgs"]:
        said = " ".join(message.split())
        raise ModelRefused(f"{folder}: the weights cannot be loaded: {said}; {_CHECK_FOLDER}")
