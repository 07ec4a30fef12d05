"""The openai package, which nobody here wrote, against the real stack: what most users will run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from tests.end_to_end.stack import Stack, assert_idle
from tests.gateway.world import on_loop

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.gateway.url}/v1", api_key="x", max_retries=0) as client:
        yield client


def test_a_chat_is_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    """Text, finish_reason and usage agree."""
    asked = {"model": "pocket", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    text, reason, usage = "", None, None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options=options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    assert (text, reason) == (whole.choices[0].message.content, whole.choices[0].finish_reason)
    assert usage.total_tokens == whole.usage.total_tokens
    assert whole.usage.prompt_tokens_details.cached_tokens is not None


def test_the_stream_helper_accumulates_an_answer(client: openai.OpenAI) -> None:
    """`chat.completions.stream` checks every event against the SDK's own state machine.

    It takes no answer that ends by its length, so this one stops at a text that surely comes.
    """
    asked = {"model": "pocket", "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    text = client.chat.completions.create(**asked).choices[0].message.content
    asked["stop"] = text[-1]
    with client.chat.completions.stream(**asked, logprobs=True, top_logprobs=2, n=2) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert len(final.choices) == 2
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, n=2)
    for one, other in zip(final.choices, whole.choices, strict=True):
        assert one.message.content == other.message.content
        assert len(one.logprobs.content) == len(other.logprobs.content)


def test_logprobs_and_choices_are_typed(client: openai.OpenAI) -> None:
    """`n` choices in order; alternatives with their bytes."""
    answer = client.chat.completions.create(
        model="pocket", messages=MESSAGES, n=3, seed=1, logprobs=True, top_logprobs=3, max_tokens=4
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    entry = answer.choices[0].logprobs.content[0]
    assert len(entry.top_logprobs) == 3
    assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token


def test_completions_take_token_ids_and_echo(client: openai.OpenAI) -> None:
    """The older endpoint, whole and streamed."""
    asked = {"model": "pocket", "prompt": [300, 301], "echo": True, "max_tokens": 4}
    whole = client.completions.create(**asked, logprobs=1, temperature=0)
    assert whole.choices[0].logprobs.token_logprobs[0] is None
    chunks = list(client.completions.create(**asked, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    """With the context length that tools ask for."""
    assert [model.id for model in client.models.list()] == ["pocket"]
    entry = client.models.retrieve("pocket").model_extra
    assert entry["max_model_len"] == 2048
    assert entry["sampling"] == {"temperature": 0.0}  # its generation_config.json: do_sample false


def test_unknown_fields_and_headers_do_no_harm(client: openai.OpenAI) -> None:
    """extra_body is how clients reach fields that the SDK does not know."""
    answer = client.chat.completions.create(
        model="pocket",
        messages=MESSAGES,
        max_completion_tokens=3,
        user="me",
        store=False,
        extra_body={"ignore_eos": True, "x_unknown": {"a": [1]}},
        extra_headers={"x-session-id": "s1", "x-slo-ttft-ms": "200"},
    )
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("change", "kind", "param", "code"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model", "model_not_found"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens", "invalid_value"),
        ({"messages": []}, openai.BadRequestError, "messages", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": "long " * 5000}]},
            openai.BadRequestError,
            "messages",
            "context_length_exceeded",
        ),
        (
            {"presence_penalty": 3},
            openai.BadRequestError,
            "presence_penalty",
            "invalid_value",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_problems_are_the_sdks_own_errors(
    client: openai.OpenAI, change: dict, kind: type, param: str, code: str, stream: bool
) -> None:
    """The class by the status, `param` and `code` filled in, also where a stream was asked for."""
    asked = {"model": "pocket", "messages": MESSAGES, "stream": stream} | change
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**asked)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.request_id
    assert caught.value.body["message"] in str(caught.value)


def test_a_stream_that_is_left_ends_at_the_worker(stack: Stack, client: openai.OpenAI) -> None:
    """Closing the SDK's stream is a disconnect."""
    stream = client.chat.completions.create(
        model="pocket", messages=MESSAGES, stream=True, extra_body={"ignore_eos": True}
    )
    for _ in range(3):
        next(stream)
    stream.close()
    assert_idle(stack.worker, 1.0)


@on_loop
async def test_thirty_two_async_streams_at_once(stack: Stack) -> None:
    """Each gets its own answer, which is the answer that it gets alone."""
    async with openai.AsyncOpenAI(base_url=f"{stack.gateway.url}/v1", api_key="x") as client:

        async def ask(number: int, stream: bool) -> str:
            asked = {
                "model": "pocket",
                "messages": [{"role": "user", "content": f"Repeat: {number}"}],
                "temperature": 0,
                "max_tokens": 8,
            }
            if not stream:
                return (await client.chat.completions.create(**asked)).choices[0].message.content
            parts = await client.chat.completions.create(**asked, stream=True)
            return "".join([part.choices[0].delta.content or "" async for part in parts])

        streamed = await asyncio.gather(*(ask(number, stream=True) for number in range(32)))
        assert streamed == [await ask(number, stream=False) for number in range(32)]
