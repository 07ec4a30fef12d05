"""Initial weights in which looking things up already works.

A small model spends most of its training before heads appear that find an earlier occurrence of
the current token and copy what came after it (Olsson et al. 2022). The pair of heads is simple
enough to be written down: a head of the first layer carries every token's predecessor along, and
heads of the second layer match the current token with those. All of it stays trainable.

H hidden, D head size. Hidden dimensions: [content | previous token (D) | one constant].
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

_EMBEDDING = 0.02  # size of an entry of the embedding
_CONSTANT = 4.0  # the constant dimension, in units of an entry
_SHARP = 6.0  # how much the step back by one is preferred to other steps
_MATCH = 12.0  # attention logit of a match; a mismatch has mean zero
_COPY = 3.0  # how much stronger the copied token is than the current one
_FAST_PAIRS = 6  # rotary pairs that tell neighbours apart
_SLOWEST_TURN = 0.0033  # radians a token; slower pairs match contents over hundreds of tokens


@torch.no_grad()
def plant(model: LlamaForCausalLM) -> None:
    """Write the two kinds of heads into a freshly built model of at least two layers."""
    config = model.config
    head, width = config.head_dim, config.hidden_size
    content = width - head - 1
    embedding = model.model.embed_tokens.weight
    embedding.zero_()
    embedding[:, :content] = _EMBEDDING * torch.randn(len(embedding), content).sign()
    embedding[:, -1] = _CONSTANT * _EMBEDDING
    entry = (width / (content + _CONSTANT**2)) ** 0.5  # of a normalized embedding
    _step_back(model, entry, content)
    _match_and_copy(model, entry, content)
    model.model.norm.weight.fill_(4.0)


def _step_back(model: LlamaForCausalLM, entry: float, content: int) -> None:
    """First layer, first head: attend to the token before, and write it beside the current one."""
    attention = model.model.layers[0].self_attn
    head = attention.head_dim
    turns = model.model.rotary_emb.inv_freq
    scale = (_SHARP * head**0.5) ** 0.5 / (_CONSTANT * entry)
    for matrix in (attention.q_proj, attention.k_proj, attention.v_proj):
        matrix.weight[:head] = 0.0
    pairs = torch.arange(_FAST_PAIRS)
    attention.k_proj.weight[pairs, -1] = scale
    attention.q_proj.weight[pairs, -1] = scale * turns[pairs].cos()
    attention.q_proj.weight[pairs + head // 2, -1] = -scale * turns[pairs].sin()
    lanes = torch.arange(min(head, content))
    attention.v_proj.weight[lanes, lanes] = 1.0
    attention.o_proj.weight[content + lanes, lanes] = _EMBEDDING / entry


def _match_and_copy(model: LlamaForCausalLM, entry: float, content: int) -> None:
    """Second layer, one head for each key head: match the current token, copy what followed it."""
    config = model.config
    attention = model.model.layers[1].self_attn
    head, groups = config.head_dim, attention.num_key_value_groups
    slow = (model.model.rotary_emb.inv_freq < _SLOWEST_TURN).nonzero().squeeze(1)
    slots = torch.cat((slow, slow + head // 2))[: head // config.num_key_value_heads]
    entry *= (config.hidden_size / (config.hidden_size + head * entry**2)) ** 0.5
    scale = (_MATCH * head**0.5 / len(slots)) ** 0.5 / entry
    for index in range(config.num_key_value_heads):
        keys, queries = index * head, index * groups * head
        attention.k_proj.weight[keys : keys + head] = 0.0
        attention.v_proj.weight[keys : keys + head] = 0.0
        attention.q_proj.weight[queries : queries + head] = 0.0
        matched = torch.arange(len(slots)) + index * len(slots)
        attention.q_proj.weight[queries + slots, matched] = scale
        attention.k_proj.weight[keys + slots, content + matched] = scale
        lanes = torch.arange(min(head, content // config.num_key_value_heads))
        copied = lanes + index * len(lanes)
        attention.v_proj.weight[keys + lanes, copied] = 1.0
        attention.o_proj.weight[copied, queries + lanes] = _COPY * _EMBEDDING / entry
