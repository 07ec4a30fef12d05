"""What surgery puts into a model gives what was there before, or is not put there."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from policies.schema import Weights
from runtime.int8 import Int8Linear
from runtime.linear import Int4Linear, MkldnnLinear, PackedLinear, PlainLinear
from runtime.loading import load_model
from runtime.surgery import Fused, FusedNorm, FusedSlice, Plan, convert
from tests.runtime.tiny_models import FAMILIES, write_model

CPU = torch.device("cpu")
WAYS = ("fp32", "fp32-mkldnn", "fp16-fbgemm")
# Siblings that each family has apart, so that they have to be found and fused: groups a layer.
FUSED_A_LAYER = {
    **dict.fromkeys(FAMILIES, 2),
    **dict.fromkeys(["qwen3_moe", "mixtral", "glm4", "starcoder2"], 1),
    **dict.fromkeys(["phi3", "gpt_neox", "gpt2"], 0),
}
NORMS_A_LAYER = {
    **dict.fromkeys(FAMILIES, 2),
    **dict.fromkeys(["qwen3", "qwen3_moe", "gemma2", "olmo2", "olmo3", "glm4"], 4),
    "gemma3": 6,
    "deepseek_v3": 3,
    **dict.fromkeys(["gpt_neox", "cohere2", "starcoder2", "gpt2"], 0),
}
torch.set_num_threads(1)


def plan(chosen="auto", prefer=(), dtype=torch.float32, **parts) -> Plan:
    weights = Weights(**{**dict.fromkeys(Weights.model_fields, chosen), **parts})
    return Plan(weights, dtype, CPU, tuple(prefer))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Name -> a model folder of that family."""
    return cache(lambda name: write_model(tmp_path_factory.mktemp(name), *FAMILIES[name]))


def load(folder):
    """A module whose weights are those of bf16, so that every lossless way can hold them."""
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    module.train(False).requires_grad_(False)
    return module.bfloat16().float()


def logits(module, length: int = 40) -> torch.Tensor:
    ids = torch.randint(0, 250, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return module(input_ids=ids, use_cache=False).logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_same_logits_fused_and_packed(folder, name, way):
    """Each lossless way of holding, for each kind of module that the families have."""
    module = load(folder(name))
    expected = logits(module)
    tally = convert(module, plan(prefer=[way]), head=module.get_output_embeddings())
    assert relative(logits(module), expected) < 2e-5
    layers = module.config.num_hidden_layers
    assert tally.fused == FUSED_A_LAYER[name] * layers
    norms = NORMS_A_LAYER[name] * layers
    assert tally.norms == (norms + 1 if norms else 0)
    assert set(tally.held) == {way}
    assert tally.untouched == []


@pytest.mark.parametrize(
    ("chosen", "limit"), [("bf16", 1e-5), ("w8a8", 0.1), ("w8", 0.1), ("int4", 0.6)]
)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "deepseek_v3"])
def test_rounded_weights_stay_near(folder, name, chosen, limit):
    """Of each kind of linear layer: plain, fused, transposed (GPT-2), tied to the embedding."""
    module = load(folder(name))
    expected = logits(module)
    tally = convert(module, plan(chosen), head=module.get_output_embeddings())
    rows = (logits(module) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(rows.median()) < limit  # single tokens go to other experts
    assert any(way.startswith(chosen[:4]) for way in tally.held) or chosen == "bf16"


def test_each_part_has_its_own_format(folder):
    """Attention, MLP and head are told apart in a whole model."""
    module = load(folder("llama"))
    head = module.get_output_embeddings()
    chosen = plan(attention="w8a8", mlp="int4", head="fp32")
    convert(module, chosen, head=head)
    layer = module.model.layers[1]
    assert isinstance(layer.self_attn.q_proj.fused.linear, Int8Linear)
    assert isinstance(layer.self_attn.o_proj, Int8Linear)
    assert isinstance(layer.mlp.up_proj.fused.linear, Int4Linear)
    assert isinstance(layer.mlp.down_proj, Int4Linear)
    assert isinstance(module.lm_head, MkldnnLinear | PlainLinear)


def test_fused_layers_stand_under_their_old_names(folder):
    """Whoever changes the output of one of them finds its features, and changes no sibling's."""
    module = load(folder("qwen2"))
    convert(module, plan())
    attention = module.model.layers[1].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert [(one.in_features, one.out_features) for one in parts] == [(64, 64), (64, 32), (64, 32)]
    assert len({id(one.fused.linear) for one in parts}) == 1
    x = torch.randn(1, 3, 64)
    q, k, v = (one(x) for one in parts)
    before = q.clone(), v.clone()
    k += 1
    assert torch.equal(q, before[0])
    assert torch.equal(v, before[1])


class Counting(PackedLinear):
    """y = (x, 2 x), and how often it was asked."""

    def __init__(self) -> None:
        super().__init__(2, 4, None)
        self.slices = {"a": slice(0, 2), "b": slice(2, 4)}
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.cat([x, 2 * x], dim=-1)


def test_siblings_multiply_once_and_are_right_in_any_order():
    """The usual order costs one product; another tensor, a second call, a change cost more."""
    linear = Counting()
    fused = Fused(linear)
    a, b = FusedSlice(fused, "a"), FusedSlice(fused, "b")
    x, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 6.0]])
    assert torch.equal(a(x), x)
    assert torch.equal(b(x), 2 * x)
    assert linear.calls == 1
    assert torch.equal(a(x), x), "a second round computes again: x may have changed in place"
    assert linear.calls == 2
    assert torch.equal(b(other), 2 * other)
    assert torch.equal(a(other), other)
    x += 1
    assert torch.equal(a(x), x)
    assert torch.equal(a(x), x)
    assert linear.calls == 5
    assert fused._output is not None
    b(x)
    assert fused._output is None, "an output that nobody waits for is kept in memory"


def siblings(**layers: nn.Module) -> nn.Module:
    parent = nn.Module()
    for name, layer in layers.items():
        parent.add_module(name, layer)
    return parent.requires_grad_(False)


class Odd(nn.Linear):
    """A linear layer that is more than one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(
    "gate",
    [nn.Linear(16, 8), nn.Linear(8, 8, bias=False), Odd(8, 8), nn.LayerNorm(8)],
    ids=["another input", "another bias", "a subclass", "no linear layer"],
)
def test_siblings_of_another_structure_are_not_fused(gate):
    """Names alone decide nothing."""
    parent = siblings(gate_proj=gate, up_proj=nn.Linear(8, 8))
    tally = convert(parent, plan())
    assert tally.fused == 0
    assert isinstance(parent.up_proj, PackedLinear)
    assert isinstance(parent.gate_proj, PackedLinear) == (type(gate) is nn.Linear)


def test_one_layer_under_two_names_is_not_fused_with_itself():
    """A module that stands in two places would be multiplied twice in one."""
    one = nn.Linear(8, 8)
    tally = convert(siblings(gate_proj=one, up_proj=one), plan())
    assert tally.fused == 0


class StrangeRMSNorm(LlamaRMSNorm):
    """A norm with a term of its own, under a name that promises none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.01 * x


def test_a_norm_that_gives_something_else_is_left_alone():
    """The parity check decides, not the class's name."""
    parent = siblings(norm=StrangeRMSNorm(8), other=LlamaRMSNorm(8))
    tally = convert(parent, plan())
    assert type(parent.norm) is StrangeRMSNorm
    assert isinstance(parent.other, FusedNorm)
    assert tally.norms == 1


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e4])
def test_a_fused_norm_is_right_where_eps_rules_and_where_it_does_not(scale):
    """From rows so small that eps is all, up to rows whose squares are large; zeros stay zeros."""
    norm = LlamaRMSNorm(32, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(torch.rand(32))
    x = torch.randn(3, 32) * scale
    assert torch.allclose(FusedNorm(norm.weight, 1e-6)(x), norm(x), rtol=1e-5, atol=1e-7)
    assert torch.equal(FusedNorm(norm.weight, 1e-6)(torch.zeros(1, 32)), torch.zeros(1, 32))


def test_a_layer_that_rounding_spoils_is_held_without_loss():
    """A few large weights in a row leave no steps for the many small ones, which decide."""
    good = nn.Linear(1024, 16)
    bad = nn.Linear(1024, 16)
    with torch.no_grad():
        bad.weight[:, 0] = 3.0  # 0.02 on average beside it: half a step of 3 / 127
    parent = siblings(bad=bad, good=good)
    convert(parent, plan("w8a8"))
    assert isinstance(parent.good, Int8Linear)
    assert not isinstance(parent.bad, Int8Linear)
    x = torch.randn(3, 1024)
    assert torch.allclose(parent.bad(x), bad(x), atol=1e-4)


def test_a_router_keeps_its_weights():
    """Another choice of experts is another model: what stands beside `experts` is not rounded."""
    parent = siblings(gate=nn.Linear(64, 16), experts=nn.Identity(), other=nn.Linear(64, 16))
    convert(parent, plan("w8a8"))
    assert not isinstance(parent.gate, Int8Linear)
    assert isinstance(parent.gate, PackedLinear)
    assert isinstance(parent.other, Int8Linear)


@pytest.mark.parametrize("chosen", ["bf16", "w8a8", "w8", "int4"])
def test_a_folder_is_served_in_every_format(folder, chosen):
    """From load_model on: the proof passes within the format's limit and says how it is held."""
    weights = Weights(attention=chosen, mlp=chosen, head=chosen)
    model, _ = load_model(folder("llama"), kv_tokens=256, weights=weights)
    assert sum(model.weights.held.values()) == 13
    assert model.parameters == sum(weight.numel() for weight in load(folder("llama")).parameters())
