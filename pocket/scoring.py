"""Exact match of a model on rows, by teacher forcing and by greedy generation.

When every token of the right answer is the model's first choice given those before it, greedy
decoding writes exactly that answer: one forward pass scores a row. Generation is the plain
reference, and also credits an answer that is spelt with other tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from pocket.tasks import Row


def prompt_text(tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
    tools: list[Any] | None = row.tools
    return str(
        tokenizer.apply_chat_template(
            row.messages, tools=tools, tokenize=False, add_generation_prompt=True
        )
    )


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the answer with its end of turn."""
    prompt = tokenizer.encode(prompt_text(tokenizer, row), add_special_tokens=False)
    answer = tokenizer.encode(row.answer, add_special_tokens=False)
    return prompt, [*answer, tokenizer.eos_token_id]


@torch.no_grad()
def forced_choices(
    model: LlamaForCausalLM, prompts: list[list[int]], answers: list[list[int]]
) -> list[list[int]]:
    """The first choice of the model at every position of the answers, each given as written."""
    pairs = list(zip(prompts, answers, strict=True))
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.zeros(len(pairs), length, dtype=torch.long)
    for index, (prompt, answer) in enumerate(pairs):
        ids[index, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    hidden: Tensor = model.model(ids.to(model.device), use_cache=False).last_hidden_state
    return [
        model.lm_head(hidden[i, len(p) - 1 : len(p) + len(a) - 1]).argmax(-1).tolist()
        for i, (p, a) in enumerate(pairs)
    ]


def forced_matches(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    batch_rows: int = 20,
) -> list[bool]:
    """Whether greedy decoding writes the right answer of each row."""
    encoded = [encode_row(tokenizer, row) for row in rows]
    matches: list[bool] = []
    for at in range(0, len(encoded), batch_rows):
        prompts = [prompt for prompt, _ in encoded[at : at + batch_rows]]
        answers = [answer for _, answer in encoded[at : at + batch_rows]]
        choices = forced_choices(model, prompts, answers)
        matches += [got == wanted for got, wanted in zip(choices, answers, strict=True)]
    return matches


@torch.no_grad()
def generate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    new_tokens: int = 96,
) -> list[str]:
    """What the model writes for each row, greedy, as one batch padded on the left."""
    prompts = [encode_row(tokenizer, row)[0] for row in rows]
    length = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    written = model.generate(  # type: ignore[misc]  # the mixin types its own self
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return [
        str(text) for text in tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
    ]
