"""LoRA adapters: several in one batch give what each gives alone, merged into the weights."""

from __future__ import annotations

import json
import random
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from cache.tokens import Tokenizer
from runtime.adapters import load_adapters
from runtime.engine import Engine
from runtime.inbox import Order
from runtime.loading import load_model
from runtime.model import Model, ModelRefused
from runtime.sequence import Sampling
from tests.runtime.test_oracle import generate
from tests.runtime.test_server import CHAT, HELLO, serving
from tests.runtime.tiny_models import FAMILIES, VOCAB, write_model

ANSWER = 10
GREEDY = Sampling(temperature=0, max_tokens=ANSWER, ignore_eos=True)
torch.set_num_threads(1)


def write_adapter(folder: Path, reference: Any, targets: tuple[str, ...], **config: Any) -> Path:
    """A random LoRA of rank 4 in PEFT's layout over these layers of a transformers model."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(len(folder.name) + sum(map(ord, folder.name)))
    tensors = {}
    for name, layer in reference.named_modules():
        if name.rpartition(".")[2] not in targets:
            continue
        into, out = (
            (layer.nx, layer.nf)
            if isinstance(layer, Conv1D)
            else (layer.in_features, layer.out_features)
        )
        for half, shape in (("A", (4, into)), ("B", (out, 4))):
            key = f"base_model.model.{name}.lora_{half}.weight"
            tensors[key] = torch.randn(*shape, generator=generator) * 0.3
    assert tensors
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merge(reference: Any, adapter: Path) -> Any:
    """The adapter added into the weights, the plain way."""
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (4**0.5 if config.get("use_rslora") else 4)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key, down in tensors.items():
        if ".lora_A." not in key:
            continue
        layer = reference.get_submodule(key.removeprefix("base_model.model.").split(".lora_")[0])
        change = tensors[key.replace("lora_A", "lora_B")] @ down * scale
        layer.weight.data += change.t() if isinstance(layer, Conv1D) else change
    return reference


class Case:
    """A model with two adapters, and what merged weights answer to each prompt."""

    def __init__(
        self,
        folder: Path,
        family: str,
        targets: dict[str, tuple[str, ...]],
        *,
        compiles: bool = False,
    ) -> None:
        base = write_model(folder / "base", *FAMILIES[family])
        rng = random.Random(family)
        shared = [rng.randrange(VOCAB) for _ in range(32)]
        self.prompts = [
            shared + [rng.randrange(VOCAB) for _ in range(own)] for own in (1, 3, 17)
        ] + [[rng.randrange(VOCAB)]]
        self.expected = {}
        for name in (None, *targets):
            reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            if name is not None:
                more = {"use_rslora": True} if name == "two" else {}
                at = write_adapter(folder / "adapters" / name, reference, targets[name], **more)
                reference = merge(reference, at)
            self.expected[name] = [generate(reference, one, ANSWER) for one in self.prompts]
        self.model, _ = load_model(base, kv_tokens=2048, compiles=compiles)
        self.base = base
        self.adapters = load_adapters(self.model, folder / "adapters")
        self.tokenizer = Tokenizer.load(base)

    @cached_property
    def twin(self) -> Model:
        """The model once more, without adapters."""
        return load_model(self.base, kv_tokens=2048)[0]

    def engine(self, **limits: int) -> Engine:
        return Engine(
            self.model, self.tokenizer, emit=lambda _: None, adapters=self.adapters, **limits
        )


@pytest.fixture(scope="module", params=["llama", "gpt2", "phi3"])
def case(request, tmp_path_factory) -> Case:
    targets = {
        "llama": {"one": ("q_proj", "v_proj"), "two": ("o_proj", "gate_proj", "down_proj")},
        "gpt2": {"one": ("c_attn",), "two": ("c_attn", "c_proj", "c_fc")},
        "phi3": {"one": ("qkv_proj",), "two": ("gate_up_proj", "o_proj")},
    }[request.param]
    return Case(tmp_path_factory.mktemp(request.param), request.param, targets)


asked = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([None, "one", "two"]), st.integers(0, 6)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(asked=asked, step_tokens=st.sampled_from([16, 33, 256]), blocks=st.sampled_from([10, 128]))
def test_any_mix_of_adapters_gives_what_merged_weights_give(case, asked, step_tokens, blocks):
    """In one batch, in chunks, preempted, with found prefixes: each answer is its adapter's own."""
    case.model.blocks = blocks
    engine = case.engine(step_tokens=step_tokens)
    got: dict[int, list[int]] = {}
    meant: dict[int, tuple[int, str | None]] = {}
    step = 0
    while step <= 6 or engine.load().running or engine.load().waiting:
        for prompt, name, at in asked:
            if at == step:
                (key,) = engine.submit([Order(case.prompts[prompt], GREEDY, adapter=name)])
                meant[key], got[key] = (prompt, name), []
        engine.take_orders(wait=False)
        for output in engine.step():
            assert output.error is None, output.error
            got[output.key] += output.token_ids
        step += 1
    for key, (prompt, name) in meant.items():
        assert got[key] == case.expected[name][prompt]
    engine.check()


def test_adapters_change_answers_and_do_not_share_cached_blocks(case):
    """The cases above are not vacuous: answers differ, and only equal adapters find each other."""
    assert case.expected[None] != case.expected["one"] != case.expected["two"]
    case.model.blocks = 128
    engine = case.engine()
    for name, found in ((None, 0), ("one", 0), ("two", 0), ("one", 32), (None, 32)):
        before = engine.load().cached_tokens
        engine.submit([Order(case.prompts[0], GREEDY, adapter=name)])
        engine.take_orders(wait=False)
        while engine.load().running or engine.load().waiting:
            engine.step()
        assert engine.load().cached_tokens - before == found


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"peft_type": "LOHA"}, "only 'LORA'"),
    "dora": ({"use_dora": True}, "use_dora"),
    "bias": ({"bias": "all"}, "bias"),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "alpha": ({"lora_alpha": "much"}, "no finite scale"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_adapter_that_is_more_than_lora_is_refused(tmp_path, name):
    """Nothing of an adapter is left out in silence."""
    change, reason = REFUSALS[name]
    base = write_model(tmp_path / "base", *FAMILIES["llama"])
    model, _ = load_model(base, kv_tokens=256)
    write_adapter(tmp_path / "all" / name, model.module, ("q_proj",), **change)
    with pytest.raises(ModelRefused, match=reason) as refusal:
        load_adapters(model, tmp_path / "all")
    assert str(tmp_path / "all" / name) in str(refusal.value)


def test_files_that_are_no_adapter_of_this_model_are_refused(tmp_path):
    """Another model's, half of one, of the head, pickled, broken, none: each with its reason."""
    base = write_model(tmp_path / "base", *FAMILIES["llama"])
    model, _ = load_model(base, kv_tokens=256)

    def refused(name: str, tensors: dict[str, torch.Tensor] | None) -> str:
        folder = tmp_path / name / "adapter"
        folder.mkdir(parents=True)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        if tensors is not None:
            save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(ModelRefused) as refusal:
            load_adapters(model, tmp_path / name)
        return str(refusal.value)

    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    right = {
        f"{layer}.lora_A.weight": torch.ones(2, 64),
        f"{layer}.lora_B.weight": torch.ones(64, 2),
    }
    wide = right | {f"{layer}.lora_A.weight": torch.ones(2, 80)}
    assert "another model's adapter" in refused("wide", wide)
    assert "half of its LoRA" in refused("half", {f"{layer}.lora_A.weight": torch.ones(2, 64)})
    head = {
        key.replace("model.layers.0.self_attn.q_proj", "lm_head"): one for key, one in right.items()
    }
    assert "lm_head" in refused("head", head)
    foreign = {key.replace("q_proj", "wqkv"): one for key, one in right.items()}
    assert "belongs to another model" in refused("foreign", foreign)
    assert "no part of a LoRA" in refused("odd", {f"{layer}.weight": torch.ones(2, 2)})
    assert "only safetensors" in refused("pickled", None)
    (tmp_path / "broken" / "adapter").mkdir(parents=True)
    (tmp_path / "broken" / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(ModelRefused, match="cannot be read"):
        load_adapters(model, tmp_path / "broken")
    (tmp_path / "none").mkdir()
    with pytest.raises(ModelRefused, match="no adapter in it"):
        load_adapters(model, tmp_path / "none")


def test_an_adapter_is_a_model_of_its_own_name(tmp_path):
    """It is listed with its parent, chosen by `model`, echoed in the answer; others are 404."""
    base = write_model(tmp_path / "base", *FAMILIES["llama"])
    reference = AutoModelForCausalLM.from_pretrained(base)
    write_adapter(tmp_path / "adapters" / "polite", reference, ("q_proj", "down_proj"))
    with serving(base, adapters=tmp_path / "adapters") as world:
        listed = {one["id"]: one for one in world.client.get("/v1/models").json()["data"]}
        assert {name: one["parent"] for name, one in listed.items()} == {
            "tiny": None,
            "polite": "tiny",
        }
        assert world.client.get("/v1/models/polite").json() == listed["polite"]
        texts = {}
        for name in listed:
            answer = world.client.post(CHAT, json=HELLO | {"model": name, "max_tokens": 12}).json()
            assert answer["model"] == name
            texts[name] = answer["choices"][0]["message"]["content"]
        assert texts["tiny"] != texts["polite"]
        missing = world.client.post(CHAT, json=HELLO | {"model": "rude"})
        assert missing.status_code == 404
        assert "'tiny', 'polite'" in missing.json()["error"]["message"]
