"""Answers in a form, over real sockets: gateway, worker and pocket, whole and streamed."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from cache.tokens import Tokenizer
from tests.end_to_end.stack import CHAT, COMPLETIONS, ROOT, Stack, events

TOKENIZER = Tokenizer.load(ROOT / "pocket" / "target")
LETTER = (
    "Give me JSON with amount, city: The amount is 704 euros. My order is HH-3667. "
    "My name is Binmu. My city is Loshis."
)
SCHEMA = {
    "type": "object",
    "properties": {
        "amount": {"type": "integer", "minimum": 0, "maximum": 9999},
        "city": {"type": "string", "maxLength": 40},
    },
    "required": ["amount", "city"],
    "additionalProperties": False,
}
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "letter", "schema": SCHEMA, "strict": True},
}
ASKED = {"messages": [{"role": "user", "content": LETTER}], "max_tokens": 200}


def streamed(stack: Stack, **body: Any) -> tuple[str, str]:
    """Text and finish_reason, put together from the chunks."""
    text, reason = "", ""
    *chunks, done = events(stack.post(CHAT, body | {"stream": True}).content)
    assert done == "[DONE]"
    for chunk in chunks:
        for choice in chunk["choices"]:
            text += choice["delta"].get("content", "")
            reason = choice["finish_reason"] or reason
    return text, reason


def test_extraction_by_schema_gives_the_facts_of_the_letter(stack: Stack) -> None:
    """Pocket, asked for two fields of a letter, gives just these as JSON, whole and streamed."""
    choice = stack.ask(CHAT, **ASKED, response_format=FORMAT)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["message"]["content"]) == {"amount": 704, "city": "Loshis"}
    assert streamed(stack, **ASKED, response_format=FORMAT) == (
        choice["message"]["content"],
        "stop",
    )


@pytest.mark.parametrize("seed", range(4))
def test_hot_sampling_still_gives_valid_json(stack: Stack, seed: int) -> None:
    """At temperature 2 the words are nonsense and the form holds, or the answer ends by length."""
    body = stack.ask(
        CHAT, **ASKED, response_format=FORMAT, temperature=2, seed=seed, n=3, logprobs=True
    )
    for choice in body["choices"]:
        assert choice["finish_reason"] in ("stop", "length")
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        assert all(entry["logprob"] <= 0 for entry in choice["logprobs"]["content"])
    assert {choice["finish_reason"] for choice in body["choices"]} >= {"stop"}


def test_an_answer_cut_in_its_middle_ends_by_length(stack: Stack) -> None:
    """max_tokens wins over the form."""
    body = ASKED | {"max_tokens": 5}
    choice = stack.ask(CHAT, **body, response_format=FORMAT)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_object"}}, r"\{.*\}"),
        ({"structured_outputs": {"json": SCHEMA}}, r"\{.*\}"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, r"\{.*\}"),
        ({"structured_outputs": {"regex": r"[A-Z]{2}-\d{4}"}}, r"[A-Z]{2}-[0-9]{4}"),
        ({"structured_outputs": {"choice": ["refund", "delivery"]}}, "refund|delivery"),
        ({"structured_outputs": {"grammar": 'start: "a" /[0-9]{3}/'}}, "a[0-9]{3}"),
        ({"structured_outputs": {"json_object": True}}, r"\{.*\}"),
        ({"guided_json": SCHEMA}, r"\{.*\}"),
        ({"guided_regex": "yes|no"}, "yes|no"),
        ({"guided_choice": ["one", "two"]}, "one|two"),
        ({"guided_grammar": 'root ::= "x" [0-9]'}, "x[0-9]"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_every_field_for_a_form_is_obeyed(
    stack: Stack, path: str, fields: dict[str, Any], pattern: str
) -> None:
    """OpenAI's and vLLM's fields, new and old, on both endpoints.

    A bias for what closes strings and objects keeps pocket from rambling on within them.
    """
    quote, brace = (str(TOKENIZER.encode(text, special=False)[0]) for text in '"}')
    closing = {quote: 100, brace: 50}
    body = {"max_tokens": 200, "logit_bias": closing, **(ASKED if path == CHAT else {})}
    choice = stack.ask(path, **body, **fields)["choices"][0]
    text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
    assert choice["finish_reason"] == "stop", text
    assert re.fullmatch(pattern, text, re.DOTALL), text


def test_forms_and_free_answers_share_batches(stack: Stack) -> None:
    """Twelve requests at once, of three kinds: each gets what it gets alone."""
    kinds: list[dict[str, Any]] = [
        ASKED | {"response_format": FORMAT},
        ASKED | {"guided_choice": ["refund", "delivery"]},
        ASKED | {"max_tokens": 20, "temperature": 0.7, "seed": 3, "presence_penalty": 1.0},
    ]
    alone = [stack.ask(CHAT, **kind)["choices"][0] for kind in kinds]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda at: stack.ask(CHAT, **kinds[at % 3]), range(12)))
    for at, body in enumerate(together):
        assert body["choices"][0] == alone[at % 3]


def test_penalties_and_bias_change_what_is_said(stack: Stack) -> None:
    """A banned token does not come, a wanted one always does, and repetition can be ended."""
    free = stack.ask(COMPLETIONS, prompt=[300], max_tokens=40, ignore_eos=True)["choices"][0]
    wanted = {"logit_bias": {"301": 100}, "max_tokens": 5, "prompt": [300], "ignore_eos": True}
    always = stack.ask(COMPLETIONS, **wanted, logprobs=0)["choices"][0]
    assert len(set(always["logprobs"]["tokens"])) == 1
    assert min(always["logprobs"]["token_logprobs"]) < -1, "logprobs are the model's own"
    fresh = stack.ask(
        COMPLETIONS,
        prompt=[300],
        max_tokens=40,
        ignore_eos=True,
        frequency_penalty=2,
        presence_penalty=2,
        repetition_penalty=5,
        logprobs=0,
    )["choices"][0]
    assert len(set(fresh["logprobs"]["tokens"])) == 40
    assert fresh["text"] != free["text"]


def test_echo_scores_the_prompt_as_ever_beside_a_form(stack: Stack) -> None:
    """Prompt log-probabilities are the model's own, whatever the answer must look like."""
    asked = {"prompt": "Order 12 is", "max_tokens": 10, "echo": True, "logprobs": 1}
    free = stack.ask(COMPLETIONS, **asked)["choices"][0]["logprobs"]
    formed = stack.ask(COMPLETIONS, **asked, guided_choice=["here"])["choices"][0]
    assert formed["text"] == "Order 12 ishere"
    count = formed["logprobs"]["text_offset"].index(len("Order 12 is"))
    assert formed["logprobs"]["token_logprobs"][:count] == free["token_logprobs"][:count]


class Letter(pydantic.BaseModel):
    """What the openai package turns into a strict schema."""

    amount: int
    city: str


class Label(pydantic.BaseModel):
    name: Literal["refund", "delivery"]


class Verdict(pydantic.BaseModel):
    label: Label
    second: Label | None
    urgent: bool


def test_the_openai_package_parses_into_a_pydantic_model(stack: Stack) -> None:
    """`chat.completions.parse` and `.stream` with a model class, as its users write it."""
    with openai.OpenAI(base_url=f"{stack.gateway.url}/v1", api_key="x", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "pocket", "temperature": 0, **ASKED}
        answer = client.chat.completions.parse(**asked, response_format=Letter)
        assert answer.choices[0].message.parsed == Letter(amount=704, city="Loshis")
        nested = client.chat.completions.parse(**asked, response_format=Verdict)
        assert isinstance(nested.choices[0].message.parsed, Verdict)
        with client.chat.completions.stream(**asked, response_format=Letter) as stream:
            for _ in stream:
                pass
            final = stream.get_final_completion()
        assert final.choices[0].message.parsed == Letter(amount=704, city="Loshis")
