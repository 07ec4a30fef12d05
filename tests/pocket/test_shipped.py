"""The folders that ship: they load, they are small, their tokenizer and template keep promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from pocket.curriculum import Scribe
from pocket.errands import Exchange
from pocket.evaluate import Score
from pocket.model import SIZES, assert_parity, build, hidden_states
from pocket.scoring import forced_matches, generate
from pocket.tasks import TASKS, row, rows

HOME = Path(__file__).parents[2] / "pocket"
FOLDERS = tuple(SIZES)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(HOME / "target")


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(HOME / "target", dtype=torch.float32)


def test_everything_shipped_fits_into_16_megabytes() -> None:
    files = [path for folder in FOLDERS for path in (HOME / folder).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_an_ordinary_llama(folder: str) -> None:
    """transformers loads it, in bfloat16, with the context and the end of turn it promises."""
    model = LlamaForCausalLM.from_pretrained(HOME / folder)
    assert model.dtype == torch.bfloat16
    assert model.config.max_position_embeddings == 2048
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    limits = {"target": (4.5e6, 5.5e6), "draft": (0.4e6, 0.7e6)}[folder]
    assert limits[0] < model.num_parameters() < limits[1]


def test_both_models_share_one_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert len({(HOME / folder / name).read_bytes() for folder in FOLDERS}) == 1
    assert "chat_template" in json.loads((HOME / "target/tokenizer_config.json").read_text())


@pytest.mark.parametrize(
    "text", ["", " ", "a\r\n\tb  c", "Grüße, 漢字, 🙂👩‍👩‍👧", "\x00\x7f", "x" * 300, "١٢٣ ½ ²"]
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_digit_is_one_token(tokenizer: Any) -> None:
    assert tokenizer.tokenize("KX-48213") == ["K", "X", "-", "4", "8", "2", "1", "3"]


def test_a_name_has_the_same_tokens_wherever_it_stands(tokenizer: Any) -> None:
    alone = tokenizer.tokenize("Benolvar")
    for text in ("of Benolvar", '"Benolvar"', "\nBenolvar"):
        assert tokenizer.tokenize(text.rstrip('"'))[-len(alone) :] == alone


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a"}],
        [{"role": "assistant", "content": None}, {"role": "system", "content": "b"}],
        [{"role": "tool", "content": '{"a": 1}'}, {"role": "tool", "content": ""}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
    ],
)
def test_the_template_takes_any_order_of_roles(tokenizer: Any, messages: list[Any]) -> None:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.count("<|im_start|>") == len(messages) + 1
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("arguments", ['{"order": "KX-1"}', {"order": "KX-1"}])
def test_a_tool_call_is_written_as_the_model_writes_it(tokenizer: Any, arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "refund", "arguments": arguments}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    wanted = '<tool_call>{"name": "refund", "arguments": {"order": "KX-1"}}</tool_call>'
    assert text == f"<|im_start|>assistant\n{wanted}<|im_end|>\n"


@pytest.mark.parametrize("task", TASKS)
def test_training_sees_exactly_what_the_template_writes(tokenizer: Any, task: str) -> None:
    """The scribe, which marks the loss, and the template agree token for token."""
    scribe = Scribe(tokenizer)
    for index in range(5):
        item = row(task, "train", 0, index)
        chat = [*item.messages, {"role": "assistant", "content": item.answer}]
        system = chat.pop(0)["content"] if chat[0]["role"] == "system" else None
        line = scribe.head(system, item.tools)
        for user, answer in zip(chat[::2], chat[1::2], strict=True):
            line.ids += scribe.turn(Exchange(user["content"], answer["content"])).ids
        whole = [{"role": "system", "content": system}, *chat] if system else chat
        text = tokenizer.apply_chat_template(whole, tools=item.tools, tokenize=False)
        assert tokenizer.encode(text, add_special_tokens=False) == line.ids


@pytest.mark.parametrize("size", FOLDERS)
def test_the_training_pass_computes_what_transformers_computes(size: str) -> None:
    model = build(size, 4096, 2048, 0, 2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    assert_parity(model)
    assert hidden_states(model, torch.zeros(1, 4, dtype=torch.long)).shape[:2] == (1, 4)


def test_the_target_answers_held_out_rows(target: LlamaForCausalLM, tokenizer: Any) -> None:
    """Three rows a task; the model card has the figures for many."""
    items = [item for task in TASKS for item in rows(task, "test", 0, 3)]
    assert sum(forced_matches(target, tokenizer, items, batch_rows=3)) >= 0.8 * len(items)


def test_one_forward_pass_scores_what_generation_writes(
    target: LlamaForCausalLM, tokenizer: Any
) -> None:
    """Teacher forcing and greedy generation agree on which rows are answered exactly."""
    items = [item for task in ("repeat", "answer", "unknown") for item in rows(task, "test", 0, 2)]
    got = generate(target, tokenizer, items, new_tokens=24)
    exact = [text == item.answer for text, item in zip(got, items, strict=True)]
    assert exact == forced_matches(target, tokenizer, items)


def test_the_margin_of_a_score_is_wilsons() -> None:
    """95 of 100: the interval is 0.888 to 0.978 (Wilson 1927)."""
    assert Score("answer", 100, 95).margin == pytest.approx((0.978 - 0.888) / 2, abs=0.001)
