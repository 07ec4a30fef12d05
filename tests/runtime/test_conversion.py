"""Loading layer by layer: the reference is the untouched model's, and memory never holds both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from policies.schema import Weights
from runtime.conversion import run_and_convert
from runtime.linear import PackedLinear
from runtime.loading import load_model
from runtime.model import ModelRefused
from runtime.proof import own_logits, proof_prompts
from runtime.surgery import Plan
from tests.runtime.tiny_models import FAMILIES, write_model, write_tokenizer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PLAN = Plan(Weights(), torch.float32, CPU)
torch.set_num_threads(1)


def as_bf16(folder: Path) -> Path:
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    module.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_bf16_checkpoint_gives_what_transformers_gives(tmp_path, name, dtype):
    """Weights stay in the dtype of their file until they are used; buffers such as embedding
    scales are those of the dtype that is computed in, not rounded to that of the file."""
    folder = as_bf16(write_model(tmp_path, *FAMILIES[name]))
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="eager")
    ids = torch.randint(0, 250, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = own(input_ids=ids, use_cache=False).logits.float()
    model, _ = load_model(folder, kv_tokens=64, dtype=dtype)
    model.module.set_attn_implementation("eager")
    with torch.inference_mode():
        found = model.module(input_ids=ids, use_cache=False).logits.float()
    far = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    # In bf16 single tokens may go to other experts; the middle one may not.
    assert float(far.max() if dtype == "fp32" else far.median()) < (
        2e-5 if dtype == "fp32" else 0.1
    )


def test_the_reference_is_the_untouched_model(tmp_path):
    """Logits of the pass in which every layer is replaced behind itself."""
    folder = write_model(tmp_path, *FAMILIES["gemma3"])
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    module.train(False).requires_grad_(False)
    prompts = proof_prompts(module.config.vocab_size, CPU)
    with torch.inference_mode():
        before = [module(input_ids=ids, use_cache=False).logits[0, -1] for ids in prompts]
    rounded = Plan(Weights(attention="int4", mlp="int4", head="int4"), torch.float32, CPU)
    logits, tally = run_and_convert(
        module, rounded, None, lambda: own_logits(module, prompts, folder)
    )
    for one, other in zip(before, logits, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert tally.held["int4-torch"] == 12
    with torch.inference_mode():
        after = own_logits(module, prompts, folder)
    assert float((after[0] - before[0]).norm() / before[0].norm()) > 0.01


class ReadsWeights(LlamaMLP):
    """A class that uses a layer's weight behind the layer's back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0 * (x @ self.up_proj.weight.t()).sum()


class ReadsTwice(LlamaMLP):
    """A class whose output says whether its layers are the ones that it was born with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 if type(self.up_proj) is nn.Linear else 100)


@pytest.mark.parametrize("kind", [ReadsWeights, ReadsTwice])
def test_a_layer_that_surgery_breaks_is_put_back(tmp_path, kind):
    """Each single replacement is right, and yet the layer fails, or gives something else."""
    folder = write_model(tmp_path, *FAMILIES["llama"])
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    module.train(False).requires_grad_(False)
    module.model.layers[1].mlp.__class__ = kind
    prompts = proof_prompts(module.config.vocab_size, CPU)
    with torch.inference_mode():
        before = own_logits(module, prompts, folder)
    _, tally = run_and_convert(module, PLAN, None, lambda: own_logits(module, prompts, folder))
    assert tally.untouched == ["LlamaDecoderLayer"]
    layers = module.model.layers
    assert type(layers[1].mlp.up_proj) is nn.Linear
    assert type(layers[1].self_attn.q_proj) is nn.Linear
    assert isinstance(layers[0].mlp.down_proj, PackedLinear)
    with torch.inference_mode():
        after = own_logits(module, prompts, folder)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(before, after, strict=True))


def test_a_bias_that_its_class_keeps_in_fp32_stays_so(tmp_path):
    """DeepSeek's router adds a bias that bf16 would round."""
    folder = write_model(tmp_path, *FAMILIES["deepseek_v3"])
    model, _ = load_model(folder, kv_tokens=64, dtype="bf16")
    router = model.module.model.layers[1].mlp.gate
    assert router.e_score_correction_bias.dtype == torch.float32
    assert router.weight.dtype == torch.bfloat16


def test_rounding_that_moves_the_logits_too_far_is_refused(tmp_path):
    """A model that multiplies every error until nothing is left says which setting is at fault."""
    chaos = {"num_hidden_layers": 48, "initializer_range": 0.3}
    folder = write_model(tmp_path, "LlamaConfig", chaos)
    with pytest.raises(ModelRefused, match=r"runtime.weights move the logits too far .*; take a"):
        load_model(folder, kv_tokens=64, weights=Weights(attention="int4", mlp="int4"))


PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama
from policies.schema import Weights
from runtime import loading
def now():
    lines = Path("/proc/self/status").read_text().splitlines()
    told = dict(line.split(":") for line in lines if line.startswith(("VmRSS", "VmHWM")))
    return {name: int(value.split()[0]) / 1024 for name, value in told.items()}
before = now()["VmRSS"]
chosen = sys.argv[2]
weights = Weights(attention=chosen, mlp=chosen, head=chosen)
model, _ = loading.load_model(Path(sys.argv[1]), kv_tokens=64, weights=weights)
print(json.dumps({"before": before, **now(), "held": model.weights.held_bytes / 2**20}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A bf16 checkpoint of 212 MiB whose output layer is tied to a table of 68 MiB."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=70_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    module.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("chosen", ["auto", "fp32", "w8a8"])
def test_loading_never_needs_much_more_than_the_model(large, chosen):
    """At most 1.3 times what the loaded model takes, measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(large), chosen],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    final, peak = told["VmRSS"] - told["before"], told["VmHWM"] - told["before"]
    assert peak <= 1.3 * final, told
    # Nothing is there twice: neither the tied table beside the output layer, nor what was read.
    assert final <= 1.05 * told["held"] + 60, told
