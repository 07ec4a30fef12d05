"""Tiny random models of many families, with a byte-level tokenizer, written as ordinary folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 260
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 257,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
WINDOW = 24
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
SLIDING_3 = {**SLIDING, "layer_types": SLIDING["layer_types"][:3]}

# Every family that the README promises: configuration class and what differs from COMMON.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama3_rope": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
    ),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW, "head_dim": 16}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": None}),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 16, **SLIDING_3}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "query_pre_attn_scalar": 16, **SLIDING_3}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", SLIDING_3),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 1, 0]}),
    "gpt_neox": ("GPTNeoXConfig", {"hidden_act": "gelu"}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.2, "residual_multiplier": 0.5}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "cohere2": ("Cohere2Config", SLIDING_3),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
    "gpt2": (
        "GPT2Config",
        {"n_positions": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "initializer_range": 0.2},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "kv_lora_rank": 16,
            "q_lora_rank": None,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
    ),
}

NO_INTERFACE = "does not use transformers' attention interface"
NO_LIMIT = {"max_position_embeddings": None}  # their configurations have no such field

# Families that are refused, and the words that say why.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "dynamic_rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        "rope_type 'dynamic'",
    ),
    "longrope": (
        "Phi3Config",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
            },
        },
        "rope_type 'longrope'",
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING_3},
        "attention sinks",
    ),
    "mamba2": (
        "Mamba2Config",
        {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16, **NO_LIMIT},
        NO_INTERFACE,
    ),
    "mamba": ("MambaConfig", {"state_size": 16, **NO_LIMIT}, NO_INTERFACE),
    "recurrent_gemma": ("RecurrentGemmaConfig", {}, "calls the attention interface 1 times"),
    "lfm2": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention", "conv"]},
        "1 times for 3 layers: some layers are not plain attention",
    ),
    "bloom": ("BloomConfig", {"n_head": 4, "n_layer": 3, **NO_LIMIT}, NO_INTERFACE),
    "gptj": (
        "GPTJConfig",
        {"n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8, "n_positions": 512},
        NO_INTERFACE,
    ),
    "mpt": ("MptConfig", {"d_model": 64, "n_heads": 4, "n_layers": 3, **NO_LIMIT}, NO_INTERFACE),
    "falcon": ("FalconConfig", {"alibi": False}, NO_INTERFACE),
    "falcon_alibi": ("FalconConfig", {"alibi": True}, NO_INTERFACE),
}


def write_model(folder: Path, config_name: str, changes: dict[str, Any], seed: int = 0) -> Path:
    """A model folder with random weights in float32; returns the folder."""
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**{**COMMON, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """One token a byte, then <end>, <begin>, <user>, <bot>; a chat template without refusals."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: at for at, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<begin>", "<user>", "<bot>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    config = {"eos_token": "<end>", "bos_token": "<begin>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
