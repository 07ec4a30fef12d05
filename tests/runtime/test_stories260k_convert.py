"""The converted stories260K model is the one whose outputs were computed in float64 elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from cache.text import Detokenizer
from cache.tokens import Tokenizer
from tests.runtime.conftest import STORIES


@pytest.fixture(scope="module")
def golden(stories260k: Path) -> dict[str, Any]:
    return json.loads((STORIES / "golden.json").read_text())


@pytest.fixture(scope="module")
def model(stories260k: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(stories260k, dtype=torch.float32).eval()


def test_tokenizer_agrees_with_llama2c(stories260k: Path, golden: dict[str, Any]) -> None:
    """Ids are those of greedy merging by score, with byte fallback, a leading space and BOS."""
    tokenizer = Tokenizer.load(stories260k)
    for case in golden["tokenizer"]:
        ids = tokenizer.encode(case["text"], special=True)
        assert ids == case["ids"], case["text"]
        assert tokenizer.decode(ids) == case["roundtrip"]
    for run in golden["greedy"]:
        assert tokenizer.encode(run["prompt"], special=True) == run["prompt_ids"]


def test_streamed_continuation_is_the_text(stories260k: Path, golden: dict[str, Any]) -> None:
    """A continuation keeps its leading space after a prompt, and has none at a text's start."""
    tokenizer = Tokenizer.load(stories260k)
    for run in golden["greedy"]:
        stream = Detokenizer(tokenizer, run["prompt_ids"])
        text = "".join(map(stream.push, run["greedy_ids"])) + stream.finish()
        whole = tokenizer.decode(run["prompt_ids"] + run["greedy_ids"])
        assert run["prompt"] + text == whole == run["text"]


def test_mean_loss(golden: dict[str, Any], model: LlamaForCausalLM) -> None:
    """Teacher-forced loss on both passages; a wrong rotary layout or norm would show at once."""
    for passage in golden["teacher_forced"]:
        ids = torch.tensor([passage["ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        assert loss.item() == pytest.approx(passage["mean_nll"], abs=1e-3)


def test_greedy_run(golden: dict[str, Any], model: LlamaForCausalLM) -> None:
    """transformers' own greedy search writes the expected story."""
    run = next(run for run in golden["greedy"] if run["prompt"] == "Zoo")
    prompt = torch.tensor([run["prompt_ids"]])
    with torch.no_grad():
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(run["greedy_ids"]),
            do_sample=False,
        )
    assert ids[0, prompt.shape[1] :].tolist() == run["greedy_ids"]
