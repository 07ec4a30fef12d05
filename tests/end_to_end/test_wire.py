"""Every form of answer, through gateway and worker, against OpenAI's own specification."""

from __future__ import annotations

import copy
import functools
import gzip
import json
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import pytest

from cache.tokens import Tokenizer
from tests.end_to_end.stack import CHAT, COMPLETIONS, ROOT, Stack, events

SPECIFICATION = ROOT.parent / "shared" / "data" / "openai" / "openapi_core.json.gz"
needs_specification = pytest.mark.skipif(
    not SPECIFICATION.exists(), reason="../shared/data with OpenAI's specification is not here"
)

USAGE_OPTIONS: tuple[dict[str, bool] | None, ...] = (
    None,
    {"include_usage": True},
    {"continuous_usage_stats": True},
    {"include_usage": True, "continuous_usage_stats": True},
)
SENTENCE = "The status of order 12 is"
ASSISTANT_OPEN = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Order 12"},
    ],
    "continue_final_message": True,
}
PARTS = [{"type": "text", "text": "Facts: order 12 is packed."}, {"type": "text", "text": " And?"}]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CHATS: dict[str, dict[str, Any]] = {
    "system and turns": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Order 12?"},
            {"role": "assistant", "content": "packed"},
            {"role": "user", "content": "Order 13?"},
        ]
    },
    "content parts": {"messages": [{"role": "user", "content": PARTS}]},
    "null content": {
        "messages": [{"role": "assistant", "content": None}, {"role": "user", "content": "hi"}]
    },
    "continued": ASSISTANT_OPEN,
    "tools": {"tools": [WEATHER], "tool_choice": "auto"},
    "stop strings": {"stop": ["e", "\n"]},
    "one stop string": {"stop": "o"},
    "one token": {"max_tokens": 1},
    "max_completion_tokens": {"max_tokens": None, "max_completion_tokens": 3},
    "past the end token": {"ignore_eos": True},
    "unknown fields": {"store": False, "user": "u", "metadata": {"a": "b"}, "x_future": [1]},
    "emoji": {"messages": [{"role": "user", "content": "Repeat: 🦊é漢"}]},
}
TEXTS: dict[str, dict[str, Any]] = {
    "token ids": {"prompt": [300, 301, 302]},
    "lists of token ids": {"prompt": [[300, 301], [302]]},
    "several texts": {"prompt": ["Order 12 is", "é🦊"]},
    "stop strings": {"stop": ["e", "\n"]},
    "stop ids": {"stop_token_ids": [300]},
    "one token": {"max_tokens": 1},
    "default length": {"max_tokens": None},
}


# ---- the specification --------------------------------------------------------------------------


@functools.cache
def specification() -> dict[str, Any]:
    """Component schemas, with our stated deviations as schemas of their own.

    They concern only the older completions API, whose specification describes whole answers and
    says "the streamed and non-streamed response objects share the same shape": OpenAI's own streams
    have a null finish_reason until the last chunk, and a null usage before the usage chunk.
    """
    schemas: dict[str, Any] = json.loads(gzip.decompress(SPECIFICATION.read_bytes()))["components"][
        "schemas"
    ]
    chunk = copy.deepcopy(schemas["CreateCompletionResponse"])
    reason = chunk["properties"]["choices"]["items"]["properties"]["finish_reason"]
    reason |= {"type": ["string", "null"], "enum": [*reason["enum"], None]}
    chunk["properties"]["usage"] = {"anyOf": [chunk["properties"]["usage"], {"type": "null"}]}
    schemas["CompletionChunk"] = chunk
    schemas["EchoedCompletion"] = with_null_first(schemas["CreateCompletionResponse"])
    schemas["EchoedChunk"] = with_null_first(chunk)
    return schemas


def with_null_first(schema: dict[str, Any]) -> dict[str, Any]:
    """An echoed prompt's first token has no logprob: nothing came before it; vLLM sends null."""
    schema = copy.deepcopy(schema)
    logprobs = schema["properties"]["choices"]["items"]["properties"]["logprobs"]["anyOf"][0]
    for name in ("token_logprobs", "top_logprobs"):
        of_list = logprobs["properties"][name]
        of_list["prefixItems"] = [{"anyOf": [of_list["items"], {"type": "null"}]}]
    return schema


@functools.cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = {
        "$ref": f"#/components/schemas/{name}",
        "components": {"schemas": specification()},
    }
    return jsonschema.Draft202012Validator(schema)


def assert_conforms(name: str, payload: Any) -> None:
    problems = [f"{e.json_path}: {e.message}" for e in validator(name).iter_errors(payload)]
    assert not problems, f"{name}: {problems}\n{json.dumps(payload)[:2000]}"


# ---- streams, put together ----------------------------------------------------------------------


@dataclass
class Choice:
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[float | None] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def add(self, logprobs: dict[str, Any] | None) -> None:
        if logprobs is None:
            return
        if "content" in logprobs:
            self.tokens += [entry["token"] for entry in logprobs["content"]]
            self.logprobs += [entry["logprob"] for entry in logprobs["content"]]
        else:
            self.tokens += logprobs["tokens"]
            self.logprobs += logprobs["token_logprobs"]
            self.offsets += logprobs["text_offset"]


def of_whole(answer: dict[str, Any]) -> list[Choice]:
    choices = []
    for at, given in enumerate(answer["choices"]):
        assert given["index"] == at
        text = (given["message"]["content"] or "") if "message" in given else given["text"]
        choice = Choice(text, given["finish_reason"])
        choice.add(given["logprobs"])
        choices.append(choice)
    return choices


def of_stream(chunks: list[Any], options: dict[str, bool] | None) -> tuple[list[Choice], Any]:
    """Choices and usage of a stream, whose order is checked on the way."""
    assert chunks.pop() == "[DONE]"
    assert len({(one["id"], one["created"], one["model"], one["object"]) for one in chunks}) == 1
    usages = [one.get("usage", "absent") for one in chunks]
    usage = None
    if (options or {}).get("include_usage"):
        last = chunks.pop()
        assert last["choices"] == []
        usage = last["usage"]
    if (options or {}).get("continuous_usage_stats"):
        counts = [one["completion_tokens"] for one in usages]
        assert counts == sorted(counts)
        usage = usages[-1]
    elif usage is not None:
        assert set(map(str, usages[:-1])) <= {"None"}
    else:
        assert set(usages) == {"absent"}
    found: dict[int, Choice] = {}
    for chunk in chunks:
        for given in chunk["choices"]:
            new = given["index"] not in found
            choice = found.setdefault(given["index"], Choice())
            assert choice.finish_reason is None, "a choice goes on after its finish_reason"
            if "delta" in given:
                assert ("role" in given["delta"]) == new
                choice.text += given["delta"].get("content") or ""
            else:
                choice.text += given["text"]
            choice.finish_reason = given["finish_reason"]
            choice.add(given["logprobs"])
    return [found[index] for index in sorted(found)], usage


def counted(usage: dict[str, Any] | None) -> dict[str, Any] | None:
    """A usage without what is found in the cache: the second time, that is more."""
    if usage is None:
        return None
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert 0 <= cached < usage["prompt_tokens"]
    return {name: value for name, value in usage.items() if name != "prompt_tokens_details"}


def assert_same(one: list[Choice], other: list[Choice]) -> None:
    assert [(c.text, c.finish_reason, c.tokens, c.offsets) for c in one] == [
        (c.text, c.finish_reason, c.tokens, c.offsets) for c in other
    ]
    for mine, yours in zip(one, other, strict=True):
        known = [value for value in mine.logprobs if value is not None]
        assert known == pytest.approx([v for v in yours.logprobs if v is not None], abs=1e-3)


# ---- every form ---------------------------------------------------------------------------------


def forms(variants: dict[str, dict[str, Any]], *plain: dict[str, Any]) -> list[Any]:
    """The plain request with each of `plain`; every variant once with all of the last of them."""
    cases = [({}, more) for more in plain]
    cases += [(variants[name], plain[-1]) for name in variants]
    names = [f"plain-{'-'.join(f'{k}={v}' for k, v in more.items())}" for more in plain]
    return [
        pytest.param(more | one, id=id_)
        for (one, more), id_ in zip(cases, [*names, *variants], strict=True)
    ]


LOGPROBS = ({}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 5})
OLD_LOGPROBS = ({}, {"logprobs": 0}, {"logprobs": 3})


@needs_specification
@pytest.mark.parametrize(
    "asked", forms(CHATS, *({"n": n} | more for n in (1, 3) for more in LOGPROBS))
)
def test_every_chat_answer_conforms_and_streams_what_it_says_whole(
    stack: Stack, asked: dict[str, Any]
) -> None:
    """Role first, finish_reason last, then [DONE]; text, logprobs and usage as in one piece."""
    asked = {"max_tokens": 8} | asked
    whole = stack.ask(CHAT, **asked)
    assert_conforms("CreateChatCompletionResponse", whole)
    expected = of_whole(whole)
    assert len(expected) == asked["n"]
    for options in USAGE_OPTIONS:
        response = stack.post(CHAT, asked | {"stream": True, "stream_options": options})
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response.content)
        for chunk in chunks[:-1]:
            assert_conforms("CreateChatCompletionStreamResponse", chunk)
        choices, usage = of_stream(chunks, options)
        assert_same(choices, expected)
        assert counted(usage) == (counted(whole["usage"]) if options else None)


@needs_specification
@pytest.mark.parametrize(
    "asked",
    forms(
        TEXTS,
        *({"n": n} | more for n in (1, 3) for more in OLD_LOGPROBS),
        *({"n": 2, "echo": True} | more for more in OLD_LOGPROBS),
    ),
)
def test_every_completion_conforms_and_streams_what_it_says_whole(
    stack: Stack, asked: dict[str, Any]
) -> None:
    """Also with several prompts, and with an echo, whose first token alone has no logprob."""
    asked = {"max_tokens": 8} | asked
    whole = stack.ask(COMPLETIONS, **asked)
    echoed = asked.get("echo") and "logprobs" in asked
    assert_conforms("EchoedCompletion" if echoed else "CreateCompletionResponse", whole)
    expected = of_whole(whole)
    for choice in expected:
        assert choice.logprobs.count(None) == (1 if echoed else 0)
    for options in USAGE_OPTIONS:
        chunks = events(
            stack.post(COMPLETIONS, asked | {"stream": True, "stream_options": options}).content
        )
        for chunk in chunks[:-1]:
            assert_conforms("EchoedChunk" if echoed else "CompletionChunk", chunk)
        choices, usage = of_stream(chunks, options)
        assert_same(choices, expected)
        assert counted(usage) == (counted(whole["usage"]) if options else None)


@needs_specification
def test_the_list_of_models_conforms(stack: Stack) -> None:
    """The list, and each model by its name."""
    listing = stack.client.get(f"{stack.gateway.url}/v1/models").json()
    assert_conforms("ListModelsResponse", listing)
    assert [model["id"] for model in listing["data"]] == ["pocket"]
    assert_conforms("Model", stack.client.get(f"{stack.gateway.url}/v1/models/pocket").json())


# ---- what the fields mean -----------------------------------------------------------------------


def test_usage_counts_each_choice_and_the_prompt_once(stack: Stack) -> None:
    """`n` choices of 5 tokens from a prompt of 3: 3 and 5 n; cached tokens are part of it."""
    asked = {"prompt": [300, 301, 302], "max_tokens": 5, "ignore_eos": True}
    for n in (1, 4):
        usage = stack.ask(COMPLETIONS, n=n, **asked)["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 5 * n)
        assert usage["total_tokens"] == 3 + 5 * n
        assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= 3


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(stack: Stack) -> None:
    """n=2 of prompts a, b: a, a, b, b, as OpenAI numbers them."""
    answer = stack.ask(COMPLETIONS, prompt=["a", "b"], n=2, echo=True, max_tokens=1)
    assert [choice["text"][0] for choice in answer["choices"]] == ["a", "a", "b", "b"]


def test_content_parts_are_the_same_prompt_as_their_joined_text(stack: Stack) -> None:
    """Clients split text into parts freely."""
    joined = "".join(part["text"] for part in PARTS)
    answers = [
        stack.ask(CHAT, messages=[{"role": "user", "content": content}], max_tokens=8)
        for content in (PARTS, joined)
    ]
    assert counted(answers[0]["usage"]) == counted(answers[1]["usage"])
    assert of_whole(answers[0]) == of_whole(answers[1])


def test_a_text_prompt_is_the_same_as_its_token_ids(stack: Stack) -> None:
    """One text, one prompt of ids, a list of either."""
    ids = Tokenizer.load(ROOT / "pocket" / "target").encode(SENTENCE, special=True)
    forms: tuple[Any, ...] = (SENTENCE, [SENTENCE], ids, [ids])
    answers = [stack.ask(COMPLETIONS, prompt=form, max_tokens=8) for form in forms]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert len({json.dumps(counted(answer["usage"])) for answer in answers}) == 1


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_seed_fixes_the_answer(stack: Stack, path: str) -> None:
    """The same seed gives the same choices, another seed others; choices of one request differ."""

    def texts(seed: int) -> list[str]:
        asked = {"temperature": 2.0, "max_tokens": 16, "ignore_eos": True, "n": 3, "seed": seed}
        return [choice.text for choice in of_whole(stack.ask(path, **asked))]

    assert texts(7) == texts(7)
    assert texts(7) != texts(8)
    assert len(set(texts(7))) == 3


def test_without_a_seed_answers_differ(stack: Stack) -> None:
    """Nothing is fixed that was not asked for."""
    asked = {"temperature": 2.0, "max_tokens": 16, "ignore_eos": True}
    assert len({stack.ask(CHAT, **asked)["choices"][0]["message"]["content"] for _ in "123"}) == 3


def test_a_stop_string_ends_the_answer_and_is_not_in_it(stack: Stack) -> None:
    """The text is the unstopped one, cut before the first occurrence."""
    asked = {"prompt": SENTENCE, "max_tokens": 24, "temperature": 2.0, "seed": 1}
    asked |= {"ignore_eos": True}
    free = stack.ask(COMPLETIONS, **asked)["choices"][0]["text"]
    assert len(free) >= 4
    stop = free[2:4]
    stopped = stack.ask(COMPLETIONS, stop=[stop, "\0never"], **asked)["choices"][0]
    assert stopped["text"] == free[: free.index(stop)]
    assert stopped["finish_reason"] == "stop"


def test_echo_gives_the_answers_own_logprobs(stack: Stack) -> None:
    """What a token cost when sampled, it costs when scored as a prompt, as lm_eval does."""
    tokenizer = Tokenizer.load(ROOT / "pocket" / "target")
    prompt = tokenizer.encode(SENTENCE, special=True)
    asked = {"max_tokens": 8, "ignore_eos": True, "logprobs": 1}
    answer = stack.ask(COMPLETIONS, prompt=prompt, **asked)["choices"][0]["logprobs"]
    ids = {tokenizer.token_text(token): token for token in reversed(range(tokenizer.vocab_size))}
    whole = prompt + [ids[text] for text in answer["tokens"]]
    for length in (0, 1):
        echoed = stack.ask(
            COMPLETIONS, prompt=whole, echo=True, logprobs=1, max_tokens=length, temperature=0
        )["choices"][0]["logprobs"]
        scored = echoed["token_logprobs"][len(prompt) : len(whole)]
        assert scored == pytest.approx(answer["token_logprobs"], abs=1e-3)
        assert echoed["tokens"][: len(prompt)] == [tokenizer.token_text(one) for one in prompt]
        assert sum(scored) == pytest.approx(sum(answer["token_logprobs"]), abs=1e-2)


def test_text_offsets_are_places_in_the_text(stack: Stack) -> None:
    """Each whole-character token of an echo stands where its offset says, accents and all."""
    choice = stack.ask(
        COMPLETIONS,
        prompt="caf\u00e9 \U0001f98a fox",
        echo=True,
        logprobs=1,
        max_tokens=6,
        temperature=0,
    )["choices"][0]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    whole = [
        (token, at) for token, at in zip(tokens, offsets, strict=True) if "\ufffd" not in token
    ]
    assert len(whole) > 6
    for token, at in whole:
        if not token.startswith("<|"):  # control tokens leave no text
            assert choice["text"][at:].startswith(token)


def test_alternatives_are_the_most_likely_first(stack: Stack) -> None:
    """A greedy token is its own first alternative, with the same logprob."""
    choice = stack.ask(CHAT, logprobs=True, top_logprobs=5, max_tokens=6)["choices"][0]
    for entry in choice["logprobs"]["content"]:
        values = [one["logprob"] for one in entry["top_logprobs"]]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert values[0] == pytest.approx(entry["logprob"], abs=1e-5)
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
