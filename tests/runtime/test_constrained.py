"""The engine holds answers to their grammars, in mixed batches, when preempted and at dead ends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from cache.tokens import Tokenizer
from runtime.adjust import DEAD_END
from runtime.engine import Engine
from runtime.inbox import Order
from runtime.lark import GrammarSpec
from runtime.loading import load_model
from runtime.model import Model
from runtime.sequence import Output, Sampling
from tests.runtime.tiny_models import FAMILIES, write_model

torch.set_num_threads(1)
PROMPT = [5, 17, 60, 61, 62, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99, 100, 101, 102]
SCHEMAS: list[dict[str, Any]] = [
    {"type": "array", "items": {"enum": ["a", "bb", 3, None]}, "maxItems": 5},
    {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": -5, "maximum": 99}, "ok": {"const": 1}},
        "required": ["n", "ok"],
        "additionalProperties": False,
    },
    {"type": "string", "minLength": 2, "maxLength": 6},
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-z]{3}$"}]},
]


def valid(schema: dict[str, Any]) -> Callable[[str], None]:
    return lambda text: jsonschema.validate(json.loads(text), schema)


def matches(pattern: str) -> Callable[[str], None]:
    def check(text: str) -> None:
        assert re.fullmatch(pattern, text), text

    return check


FORMS: list[tuple[GrammarSpec, Callable[[str], None]]] = [
    *((GrammarSpec("json_schema", json.dumps(one)), valid(one)) for one in SCHEMAS),
    (GrammarSpec("regex", "[0-9]{2,4}(é|日)?"), matches("[0-9]{2,4}(é|日)?")),
    (GrammarSpec("choice", '["red", "green", "grey"]'), matches("red|green|grey")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), *FAMILIES["llama"])


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[int, Model]:
    """By blocks of the pool: one so small that sequences are preempted, and a large one."""
    return {blocks: load_model(folder, kv_tokens=16 * blocks)[0] for blocks in (9, 128)}


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def run(engine: Engine, samplings: list[Sampling]) -> list[list[Output]]:
    """Each one's outputs, all of them submitted at once."""
    keys = engine.submit([Order([*PROMPT, at], one) for at, one in enumerate(samplings)])
    outputs: dict[int, list[Output]] = {key: [] for key in keys}
    engine.take_orders(wait=False)
    while not all(got and got[-1].finish_reason for got in outputs.values()):
        for output in engine.step():
            outputs[output.key].append(output)
    engine.check()
    assert engine.load().blocks.in_use == 0
    return list(outputs.values())


def text_of(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    forms=st.lists(st.integers(-1, len(FORMS) - 1), min_size=1, max_size=8),
    seed=st.integers(0, 2**32),
    blocks=st.sampled_from([9, 128]),
)
def test_whatever_ends_by_itself_has_its_form_and_nothing_depends_on_the_batch(
    models: dict[int, Model], tokenizer: Tokenizer, forms: list[int], seed: int, blocks: int
) -> None:
    """A random model's answers under grammars, beside free ones with penalties; a pool in which
    they push each other out gives the same tokens as one after the other."""
    engine = Engine(models[blocks], tokenizer, emit=lambda _: None, step_tokens=64)
    free = Sampling(
        max_tokens=40,
        ignore_eos=True,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
    )
    samplings = [
        replace(free, seed=seed + at)
        if form < 0
        else Sampling(
            temperature=1.5,
            seed=seed + at,
            max_tokens=60,
            grammar=engine.grammars.compile(FORMS[form][0]),
        )
        for at, form in enumerate(forms)
    ]
    together = run(engine, samplings)
    for form, outputs in zip(forms, together, strict=True):
        assert outputs[-1].error is None
        if form >= 0 and outputs[-1].finish_reason == "stop":
            FORMS[form][1](text_of(outputs))
    alone = Engine(models[128], tokenizer, emit=lambda _: None)
    for at, (one, outputs) in enumerate(zip(samplings, together, strict=True)):
        keys = alone.submit([Order([*PROMPT, at], one)])
        again: list[Output] = []
        alone.take_orders(wait=False)
        while not (again and again[-1].finish_reason):
            again += alone.step()
        assert [output.key for output in again] == keys * len(again)
        assert tokens_of(again) == tokens_of(outputs)


def test_without_its_grammar_the_model_writes_nothing_of_the_kind(
    models: dict[int, Model], tokenizer: Tokenizer
) -> None:
    """The test above says something: this model's own answers have none of the forms."""
    engine = Engine(models[128], tokenizer, emit=lambda _: None)
    for outputs in run(engine, [Sampling(seed=seed, max_tokens=30) for seed in range(10)]):
        for _, check in FORMS:
            with pytest.raises((ValueError, AssertionError, jsonschema.ValidationError)):
                check(text_of(outputs))


class Narrow:
    """A model whose table ends before some tokens that its tokenizer has."""

    def __init__(self, model: Model, vocabulary: int) -> None:
        self._model = model
        self._vocabulary = vocabulary

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, *args: Any) -> torch.Tensor:
        return self._model.forward(*args)[:, : self._vocabulary]


def test_a_dead_end_ends_its_own_answer_with_an_error(
    models: dict[int, Model], tokenizer: Tokenizer
) -> None:
    """Nothing hangs, the neighbours go on, and all blocks come back."""
    z = tokenizer.encode("z", special=False)[0]
    engine = Engine(Narrow(models[128], z), tokenizer, emit=lambda _: None)  # type: ignore[arg-type]
    lost = engine.grammars.compile(GrammarSpec("choice", '["z"]'))
    half = engine.grammars.compile(GrammarSpec("choice", '["Az"]'))
    samplings = [Sampling(grammar=lost), Sampling(max_tokens=5), Sampling(grammar=half)]
    first, second, third = run(engine, [replace(one, ignore_eos=True) for one in samplings])
    assert [output.error for output in first] == [DEAD_END]
    assert first[-1].error_code == "grammar_failed"
    assert second[-1].error is None
    assert len(tokens_of(second)) == 5
    assert [output.error for output in third] == [None, DEAD_END]


def test_a_stop_id_ends_an_answer_only_where_its_grammar_allows_the_token(
    models: dict[int, Model], tokenizer: Tokenizer
) -> None:
    """Stop ids and stop strings count within a form as elsewhere: the answer is cut there."""
    engine = Engine(models[128], tokenizer, emit=lambda _: None)
    grammar = engine.grammars.compile(GrammarSpec("regex", "ab{3}c"))
    a, b, c = (tokenizer.encode(char, special=False)[0] for char in "abc")
    whole, by_id, by_text, by_other = run(
        engine,
        [
            Sampling(grammar=grammar, max_tokens=20),
            Sampling(grammar=grammar, max_tokens=20, stop_ids=frozenset({c})),
            Sampling(grammar=grammar, max_tokens=20, stop=("bb",)),
            Sampling(grammar=grammar, max_tokens=20, stop_ids=frozenset({7})),
        ],
    )
    assert tokens_of(whole) == [a, b, b, b, c, min(tokenizer.eos_ids)]
    assert text_of(by_id) == "abbb"
    assert text_of(by_text) == "a"
    assert text_of(by_other) == "abbbc"
    assert {outputs[-1].finish_reason for outputs in (whole, by_id, by_text, by_other)} == {"stop"}
