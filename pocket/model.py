"""The two Llama models, and a forward pass over them that trains faster than the general one.

B batch, T tokens, H hidden, D head size. `hidden_states` computes what `LlamaForCausalLM` does
(`assert_parity` checks it) without masks and caches. Knows nothing of data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention


@dataclass(frozen=True, slots=True)
class Size:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_size: int


ROPE_THETA = 500_000.0  # as in Llama 3: slow pairs match contents whatever their distance

SIZES: dict[str, Size] = {
    "target": Size(hidden=256, intermediate=640, layers=6, heads=4, key_heads=2, head_size=64),
    "draft": Size(hidden=96, intermediate=192, layers=2, heads=4, key_heads=2, head_size=32),
}


def build(size: str, vocabulary: int, context: int, pad_id: int, eos_id: int) -> LlamaForCausalLM:
    """A new model; layers start as the identity, because their outputs are zero."""
    shape = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_size,
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
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
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
