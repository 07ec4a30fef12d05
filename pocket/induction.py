"""Initial weights in which looking things up already works.

A small model spends most of its training before heads appear that find an earlier occurrence of
what was just said and copy what came after it (Olsson et al. 2022). Such heads are simple enough
to be written down. In the first layer four heads carry the tokens one to four places back along.
In the second layer one head matches the last two tokens with those before each earlier token, and
one the two tokens before the last two; both copy what they find. All of it stays trainable.

H hidden, D head size. Hidden dimensions: [content | stored tokens, seven lanes | one constant].
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

_EMBEDDING = 0.5  # size of an entry of the embedding
_CONSTANT = 4.0  # the constant dimension, in units of an entry
_SHARP = 8.0  # how much the wanted step back is preferred to other steps
_MATCH = 12.0  # attention logit of a full match; a mismatch has mean zero
_COPY = 3.0  # how much stronger a copied token is than the current one
_SURE = 10.0  # logit of a token that the last hidden state spells exactly
_FAST_PAIRS = 8  # rotary pairs that tell neighbours apart
_SLOWEST_TURN = 0.0033  # radians a token; slower pairs match contents over hundreds of tokens
# Which half of a token's code (0 or 1) is stored for which step back, lane by lane.
_LANES = ((1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (4, 1))


@torch.no_grad()
def plant(model: LlamaForCausalLM) -> None:
    """Write the heads into a freshly built model with four heads and two key heads a layer."""
    embedding = model.model.embed_tokens.weight
    slots = _slow_dimensions(model)
    half, width = len(slots) // 2, embedding.shape[1]
    stored = half * len(_LANES)
    content = width - stored - 1
    embedding.zero_()
    embedding[:, :content] = _EMBEDDING * torch.randn(len(embedding), content).sign()
    embedding[:, -1] = _CONSTANT * _EMBEDDING
    entry = (width / (content + _CONSTANT**2)) ** 0.5  # of a normalized embedding
    _step_back(model, entry, half, content)
    entry = (width / (content + _CONSTANT**2 + stored)) ** 0.5
    _match_and_copy(model, entry, slots, content)
    model.model.norm.weight.fill_(_SURE / (content * _EMBEDDING * entry))


def _slow_dimensions(model: LlamaForCausalLM) -> Tensor:
    """Dimensions of a head that turn so slowly that distance hardly matters; an even number."""
    turns = model.model.rotary_emb.inv_freq
    slow = (turns < _SLOWEST_TURN).nonzero().squeeze(1)
    return torch.cat((slow, slow + len(turns)))


def _step_back(model: LlamaForCausalLM, entry: float, half: int, content: int) -> None:
    """First layer: head h attends h + 1 places back and stores halves of that token's code."""
    attention = model.model.layers[0].self_attn
    head = attention.head_dim
    pairs = torch.arange(_FAST_PAIRS)
    turns = model.model.rotary_emb.inv_freq[pairs]
    scale = (_SHARP * head**0.5) ** 0.5 / (_CONSTANT * entry)
    for matrix in (attention.q_proj, attention.k_proj, attention.v_proj):
        matrix.weight.zero_()
    groups = attention.num_key_value_groups
    for start in range(0, attention.k_proj.out_features, head):
        attention.k_proj.weight[start + pairs, -1] = scale
        lanes = torch.arange(2 * half)
        attention.v_proj.weight[start + lanes, lanes] = 1.0
    for index in range(groups * attention.k_proj.out_features // head):
        start, step = index * head, index + 1
        attention.q_proj.weight[start + pairs, -1] = scale * (step * turns).cos()
        attention.q_proj.weight[start + pairs + head // 2, -1] = -scale * (step * turns).sin()
    for lane, (step, part) in enumerate(_LANES):
        kept = torch.arange(half)
        source = (step - 1) * head + part * half + kept
        attention.o_proj.weight[content + lane * half + kept, source] = _EMBEDDING / entry


def _match_and_copy(model: LlamaForCausalLM, entry: float, slots: Tensor, content: int) -> None:
    """Second layer: each key head matches two tokens in order, and copies what followed them."""
    attention = model.model.layers[1].self_attn
    head, groups = attention.head_dim, attention.num_key_value_groups
    half = len(slots) // 2
    scale = (_MATCH * head**0.5 / len(slots)) ** 0.5 / entry

    def lanes_of(step: int, part: int) -> Tensor:
        start = content + _LANES.index((step, part)) * half if step else part * half
        return start + torch.arange(half)

    for index, (asked, given) in enumerate((((0, 1), (1, 2)), ((2, 3), (3, 4)))):
        keys, queries = index * head, index * groups * head
        attention.k_proj.weight[keys : keys + head] = 0.0
        attention.v_proj.weight[keys : keys + head] = 0.0
        attention.q_proj.weight[queries : queries + head] = 0.0
        for part in (0, 1):
            to = slots[part * half : (part + 1) * half]
            attention.q_proj.weight[queries + to, lanes_of(asked[part], part)] = scale
            attention.k_proj.weight[keys + to, lanes_of(given[part], part)] = scale
        count = min(head, content)
        copied = torch.arange(count) + index * (content - count)
        lanes = torch.arange(count)
        attention.v_proj.weight[keys + lanes, copied] = 1.0
        attention.o_proj.weight[copied, queries + lanes] = _COPY * _EMBEDDING / entry
