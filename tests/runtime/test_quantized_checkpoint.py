"""Checkpoints that others have quantized: read where their package is, else refused by name."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from policies.schema import Weights
from runtime.loading import load_model
from runtime.model import ModelRefused
from tests.runtime.tiny_models import FAMILIES, write_model, write_tokenizer

torch.set_num_threads(1)


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def logits(module) -> torch.Tensor:
    ids = torch.randint(0, 250, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return module(input_ids=ids, use_cache=False).logits.float()


def served(folder: Path, chosen: str = "auto") -> tuple[torch.Tensor, dict[str, int]]:
    """Logits of the loaded model by transformers' attention, and how its layers are held."""
    weights = Weights(attention=chosen, mlp=chosen, head="auto")
    model, _ = load_model(folder, kv_tokens=64, weights=weights)
    model.module.set_attn_implementation("eager")
    return logits(model.module), dict(model.weights.held)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def compress(folder: Path, out: Path, bits: int) -> Path:
    """A checkpoint as llm-compressor writes it: eight bits a row, or four in groups of 32."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    module = AutoModelForCausalLM.from_pretrained(folder)
    if bits == 8:
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(num_bits=8, strategy="channel", symmetric=True),
            input_activations=QuantizationArgs(num_bits=8, strategy="token", dynamic=True),
        )
    else:
        weights = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    groups = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"])
    apply_quantization_config(module, groups)
    for one in module.modules():
        if hasattr(one, "weight_scale"):
            weight = one.weight.data
            grouped = weight[:, None] if bits == 8 else weight.view(len(weight), -1, 32)
            scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
            one.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(module)
    compressor.compress_model(module)
    module.save_pretrained(out)
    compressor.update_config(out)
    write_tokenizer(out)
    return out


@needs("compressed_tensors")
@pytest.mark.parametrize("bits", [8, 4])
def test_compressed_tensors_give_the_weights_that_they_hold(tmp_path, bits):
    """Under auto without a loss, as transformers reads them; under w8a8 near that."""
    folder = write_model(tmp_path / "plain", *FAMILIES["llama"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = compress(folder, tmp_path / "quantized", bits)
        expected = logits(AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32))
        plain = logits(AutoModelForCausalLM.from_pretrained(folder))
        found, held = served(quantized)
        rounded, held_rounded = served(quantized, "w8a8")
    assert apart(expected, plain) > 0.01, "nothing is quantized in this checkpoint"
    if bits == 4:
        assert apart(found, expected) < 1e-4
    else:  # transformers rounds activations of such a checkpoint too
        assert apart(found, expected) < 0.1
    assert all(name.startswith("fp") for name in held)
    assert apart(rounded, expected) < 0.15
    assert sum(n for name, n in held_rounded.items() if name.startswith("w8a8")) == 12


@needs("torchao")
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_layers_stay_as_they_are_unless_told(tmp_path, kind):
    """auto serves torchao's own tensors; another format takes their values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao import quantization
        from transformers import TorchAoConfig

        folder = write_model(tmp_path / "plain", *FAMILIES["llama"])
        wanted = TorchAoConfig(getattr(quantization, kind)())
        module = AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted)
        module.save_pretrained(tmp_path / "quantized")
        write_tokenizer(tmp_path / "quantized")
        own = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.float32)
        expected = logits(own)
        found, held = served(tmp_path / "quantized")
        rounded, held_rounded = served(tmp_path / "quantized", "w8a8")
    # Rounded activations: a last digit of a fused norm moves some of them by a whole step.
    assert apart(found, expected) < (1e-4 if kind == "Int8WeightOnlyConfig" else 0.1)
    assert held["Int8Tensor"] == 21
    assert apart(rounded, expected) < 0.15
    assert held_rounded.get("w8a8-fbgemm", 0) + held_rounded.get("w8a8-onednn", 0) == 12


@pytest.mark.parametrize(
    ("method", "package", "more"),
    [
        ("gptq", "gptqmodel", {"bits": 4, "group_size": 32}),
        ("awq", "gptqmodel", {"bits": 4, "group_size": 32}),
        ("torchao", "torchao", {"quant_type": "int8_weight_only"}),
        ("compressed-tensors", "compressed_tensors", {"format": "int-quantized"}),
    ],
)
def test_a_missing_package_is_named(tmp_path, method, package, more):
    """A quantizer whose package is not there is refused with what to install."""
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    folder = write_model(tmp_path, *FAMILIES["llama"])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **more}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelRefused) as refusal:
        load_model(folder, kv_tokens=64)
    said = str(refusal.value)
    assert f"is quantized by {method}" in said
    assert f"; install {package.replace('_', '-')}" in said
    assert "\n" not in said
