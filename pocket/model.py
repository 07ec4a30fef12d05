"""The two Llama models, and a forward pass over them that trains faster than the general one.

B batch, T tokens, H hidden, D head size. `hidden_states` computes what `LlamaForCausalLM` does
(`assert_parity` checks it) without masks and caches. Knows nothing of data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

SIZES: dict[str, dict[str, int]] = {
    "target": {
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "draft": {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    },
}


def build(size: str, vocabulary: int, context: int, pad_id: int, eos_id: int) -> LlamaForCausalLM:
    """A new model; layers start as the identity, because their outputs are zero."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        **SIZES[size],
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _attend(attention: LlamaAttention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, length, _ = x.shape
    shape = (batch, length, -1, attention.head_dim)
    query = _rotate(attention.q_proj(x).view(shape).transpose(1, 2), cos, sin)
    key = _rotate(attention.k_proj(x).view(shape).transpose(1, 2), cos, sin)
    value = attention.v_proj(x).view(shape).transpose(1, 2)
    groups = attention.num_key_value_groups
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
    out: Tensor = attention.o_proj(mixed)
    return out


def hidden_states(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Last hidden states [B, T, H] of `ids` [B, T]; padding may stand only on the right."""
    decoder = model.model
    x = decoder.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    cos, sin = decoder.rotary_emb(x, positions)
    for layer in decoder.layers:
        x = x + _attend(layer.self_attn, layer.input_layernorm(x), cos, sin)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    normed: Tensor = decoder.norm(x)
    return normed


def assert_parity(model: LlamaForCausalLM) -> None:
    """`hidden_states` gives the logits that transformers gives."""
    ids = torch.randint(0, model.config.vocab_size, (2, 48), device=model.device)
    with torch.no_grad():
        ours = model.lm_head(hidden_states(model, ids))
        theirs = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
