"""What a model folder must hold, and the one sentence that says what it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from runtime import loading
from runtime.loading import load_model
from runtime.model import ModelRefused
from runtime.proof import prove, reason_of
from tests.runtime.tiny_models import FAMILIES, write_model

POCKET = Path(__file__).parents[2] / "pocket" / "target"
torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "llama", *FAMILIES["llama"])


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    """Why the folder is refused: one line that names it."""
    with pytest.raises(ModelRefused) as caught:
        load_model(folder, kv_tokens=256)
    said = str(caught.value)
    assert str(folder) in said
    assert "\n" not in said
    assert ";" in said, "no advice"
    return said


def test_a_missing_tensor_is_named(folder):
    """Once served with random values in its place: the proof compares a model with itself."""
    lost = "model.layers.1.self_attn.q_proj.weight"
    change_weights(folder, lambda weights: {k: v for k, v in weights.items() if k != lost})
    assert f"lack '{lost}' (1 missing in all)" in refusal(folder)


def test_names_with_a_foreign_prefix_are_refused(folder):
    """Once served with random weights throughout."""
    change_weights(folder, lambda weights: {f"foo.{k}": v for k, v in weights.items()})
    assert "the weights lack 'lm_head.weight'" in refusal(folder)


def test_more_layers_than_weights_are_refused(folder):
    """Once served with two random layers on top of three trained ones."""
    change_config(folder, num_hidden_layers=5)
    assert "the weights lack 'model.layers.3." in refusal(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    """Transformers itself only refers to a report that it has printed above."""
    change_config(folder, intermediate_size=80)
    said = refusal(folder)
    assert "'model.layers.0.mlp.down_proj.weight' has shape (64, 96)" in said
    assert "asks for (64, 80)" in said


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_tied_embeddings_are_not_missing(tmp_path, name):
    """An output layer that shares the embedding's values is not in the file and is no hole."""
    folder = write_model(tmp_path, *FAMILIES[name])
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model, _ = load_model(folder, kv_tokens=256)
    table = model.module.get_input_embeddings().weight
    x = torch.randn(1, 3, table.shape[1])
    assert torch.allclose(model.module.get_output_embeddings()(x), x @ table.t(), atol=1e-4)


def test_the_shipped_model_loads():
    """The model in the repository passes every check."""
    model, folder = load_model(POCKET, kv_tokens=256)
    assert folder == POCKET
    assert model.parameters > 0


@pytest.mark.parametrize("asked", ["sdpa", "flash_attention_2", "owner/kernel", {"": "sdpa"}])
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_a_folder_does_not_choose_its_reference_attention(folder, monkeypatch, key, asked):
    """`owner/kernel` in config.json once led transformers to fetch and run code from the hub."""
    change_config(folder, **{key: asked})
    seen = []
    monkeypatch.setattr(loading, "prove", lambda module, *_, **__: seen.append(module) or [])
    load_model(folder, kv_tokens=256)
    assert seen[0].config._attn_implementation == "eager"


def test_a_folder_does_not_choose_its_expert_kernels(tmp_path):
    """`_experts_implementation` is ignored likewise: some of its values are kernels on the hub."""
    folder = write_model(tmp_path, *FAMILIES["mixtral"])
    change_config(folder, _experts_implementation="deepgemm")
    load_model(folder, kv_tokens=256)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 4096, None])
def test_unreadable_weights_are_refused(folder, content):
    """A truncated or foreign file ends in a sentence, not in a traceback."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    assert "the weights cannot be loaded (SafetensorError: " in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": "abc"}, "'hidden_size' expected int, got str"),
        ({"num_attention_heads": 3}, "config.json is not understood"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "nothing"}, "the weights cannot be loaded (KeyError"),
        ({"rope_parameters": {"rope_type": "nothing"}}, "nothing"),
        ({"rope_parameters": "abc"}, "rope_parameters"),
        ({"vocab_size": -1}, "cannot be loaded"),
        ({"max_position_embeddings": -5}, "max_position_embeddings -5"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"num_hidden_layers": 0}, "does not use transformers' attention interface"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized"),
        ({"model_type": "nothing"}, "nothing"),
        ({"model_type": "vit"}, "'vit' is not a causal language model"),
        ({"num_key_value_heads": 3, "head_dim": 16}, "k_proj"),
    ],
)
def test_a_wrong_configuration_is_refused(folder, changes, reason):
    """Whatever third-party code raises about a value, the worker says one sentence."""
    change_config(folder, **changes)
    assert reason in refusal(folder)


def test_a_configuration_that_is_no_json_is_refused(folder):
    """A config.json cut short is refused."""
    (folder / "config.json").write_text('{"model_type": "lla')
    assert "config.json is not understood" in refusal(folder)


def test_a_forward_pass_that_fails_is_refused(folder):
    """A model class that raises on a plain prompt ends in a sentence, not in a traceback."""
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    module.model.layers[1].self_attn.num_key_value_groups = 3
    with pytest.raises(ModelRefused, match="LlamaForCausalLM's own forward pass fails"):
        prove(module, folder)


def test_layers_that_share_a_module_are_refused(folder):
    """Two layers with one cache would overwrite each other."""
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    module.model.layers[1] = module.model.layers[0]
    with pytest.raises(ModelRefused, match="3 times from 2 modules for 3 layers"):
        prove(module, folder)


def test_more_calls_than_layers_are_refused(tmp_path):
    """A model that attends more often than it has layers says so."""
    folder = write_model(tmp_path, *FAMILIES["gpt2"])
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    module.config.num_hidden_layers = 2
    with pytest.raises(ModelRefused, match="3 times from 3 modules for 2 layers"):
        prove(module, folder)


def test_a_reason_is_one_line_that_says_something():
    """An empty message falls back on the type; a reference to a printed report is left out."""
    assert reason_of(ValueError()) == "ValueError"
    assert reason_of(RuntimeError("\n For details look at the above report!\n")) == "RuntimeError"
    assert (
        reason_of(TypeError("field 'x':\n   expected int")) == "TypeError: field 'x': expected int"
    )
    assert reason_of(ValueError("first\nsecond")) == "ValueError: first"


def test_an_unknown_hub_name_is_refused_offline(tmp_path, monkeypatch):
    """Without a network, a name that is not in the local cache ends in a sentence."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelRefused) as caught:
        load_model("nobody/no-such-model", kv_tokens=256)
    said = str(caught.value)
    assert said.startswith("nobody/no-such-model: cannot be fetched from the hub (")
    assert said.endswith("check the name and the network, or give a local folder")
    assert "\n" not in said


def test_a_name_that_the_hub_cannot_have_is_refused(monkeypatch):
    """A mistyped path is no hub name, and is refused before any request."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelRefused, match="HFValidationError"):
        load_model("a/b/c", kv_tokens=256)


def test_weights_are_fetched_once():
    """Some repositories hold the weights twice, and pickles, and those of other frameworks."""
    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    others = [
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "original/model.safetensors",
        "original/params.json",
        "pytorch_model.bin",
        "modeling_own.py",
        "model.gguf",
    ]
    fetched = filter_repo_objects(
        wanted + others,
        allow_patterns=loading._FETCHED,
        ignore_patterns=loading._NOT_FETCHED,
    )
    assert list(fetched) == wanted
