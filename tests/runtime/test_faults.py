"""What goes wrong inside a step stays with the sequences of that step; requests are bounded."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
import torch

from cache.tokens import Tokenizer
from runtime import wire
from runtime.engine import Engine
from runtime.inbox import Order
from runtime.loading import load_model
from runtime.orders import chat_prompt, make_orders
from runtime.sequence import Output, Sampling, Service
from tests.runtime.tiny_models import FAMILIES, write_model

SAMPLING = Sampling(temperature=0, max_tokens=6, ignore_eos=True)
PROMPTS = [[5, 6, 7], [9] * 20, [30, 31]]
torch.set_num_threads(1)


class Spoiling:
    """A model that changes what its forward gives, as the test says."""

    def __init__(self, model: Any, change: Any) -> None:
        self._model = model
        self._change = change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, ids, positions, layout, keep):
        return self._change(ids, self._model.forward(ids, positions, layout, keep).clone())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"), *FAMILIES["llama"])


def play(engine: Engine, prompts: list[list[int]]) -> list[list[Output]]:
    keys = engine.submit([Order(prompt, SAMPLING) for prompt in prompts])
    outputs: list[Output] = []
    engine.take_orders(wait=False)
    while engine.load().running or engine.load().waiting:
        outputs += engine.step()
    return [[output for output in outputs if output.key == key] for key in keys]


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def engine_on(folder, change=lambda ids, logits: logits) -> Engine:
    model, _ = load_model(folder, kv_tokens=256)
    return Engine(Spoiling(model, change), Tokenizer.load(folder), emit=lambda _: None)


def test_logits_that_are_not_numbers_end_their_sequence_alone(folder):
    """The spoiled sequence fails with a reason, its neighbours' answers do not change."""
    expected = [tokens(outputs) for outputs in play(engine_on(folder), PROMPTS)]

    def spoil(ids, logits):
        if len(ids) == 3:  # the second step of three decodes: spoil the one in the middle
            logits[1] = float("nan")
        return logits

    engine = engine_on(folder, spoil)
    first, second, third = play(engine, PROMPTS)
    assert [tokens(first), tokens(third)] == [expected[0], expected[2]]
    assert "not finite" in (second[-1].error or "")
    assert engine.load().blocks.in_use == 0


def test_a_freed_block_of_spoiled_values_spoils_nobody(folder):
    """What a spoiled sequence left in the pool is wiped before its blocks are used again."""

    def spoil(ids, logits):
        for kv in engine.model._model._pool:
            kv.values[:] = float("nan")
        return torch.full_like(logits, float("nan"))

    engine = engine_on(folder, spoil)
    (failed,) = play(engine, [[4] * 250])  # nearly the whole pool
    assert failed[-1].error
    engine.model._change = lambda ids, logits: logits
    (answer,) = play(engine, [[5, 6, 7]])
    assert answer[-1].error is None
    assert tokens(answer) == tokens(play(engine_on(folder), [[5, 6, 7]])[0])


@pytest.mark.parametrize("error", [IndexError(), ValueError("odd"), MemoryError()])
def test_any_failure_of_a_step_is_told_and_the_engine_goes_on(folder, error):
    """Whatever a model raises, each sequence of the step ends with an error; the next one runs."""
    failures = [error]

    def fail(ids, logits):
        if failures:
            raise failures.pop()
        return logits

    engine = engine_on(folder, fail)
    assert all(outputs[-1].error for outputs in play(engine, PROMPTS))
    assert all(outputs[-1].error is None for outputs in play(engine, PROMPTS))
    assert engine.load().blocks.in_use == 0


def completion(**fields: Any) -> wire.CompletionRequest:
    return wire.parse_completion(orjson.dumps({"model": "m", **fields}))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": [[1, 2, 200]]}, "token_out_of_range"),
        ({"prompt": [[1]] * 100, "n": 2}, "too_many_choices"),
        ({"prompt": [[1] * 900] * 60, "echo": True, "logprobs": 20}, "too_many_logprobs"),
        ({"prompt": [[1] * 1000]}, "context_length_exceeded"),
        ({"prompt": [[]]}, "empty_prompt"),
    ],
)
def test_a_request_is_bounded_before_it_reaches_the_engine(fields, code):
    """Ids beyond the model's table, too many choices and too many scores are refused with 400."""
    asked = completion(**fields)
    with pytest.raises(wire.Problem) as refusal:
        make_orders(asked, asked.prompts(), limit_tokens=1000, vocabulary=200, service=Service())
    assert (refusal.value.status, refusal.value.code) == (400, code)
    assert refusal.value.param


def test_deep_nesting_in_a_message_is_refused(folder):
    """A field nested a thousand deep, which JSON allows, is the client's fault and said so."""
    nested = "[" * 1000 + "]" * 1000
    message = f'{{"role": "user", "content": "hi", "extra": {nested}}}'
    body = f'{{"model": "m", "messages": [{message}]}}'.encode()
    with pytest.raises(wire.Problem) as refusal:
        chat_prompt(wire.parse_chat(body), Tokenizer.load(folder), 1000)
    assert refusal.value.status == 400
    assert "nested" in refusal.value.message
