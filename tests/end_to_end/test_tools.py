"""Tool calls through gateway and worker, from a model that learned to call tools."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from pocket.tasks import Row, rows
from tests.end_to_end.stack import CHAT, Stack, assert_idle, events
from tests.end_to_end.test_wire import assert_conforms, counted, needs_specification

ROWS: list[Row] = list(rows("tool", "test", 0, 6))
CALLS = [
    json.loads(row.answer.removeprefix("<tool_call>").removesuffix("</tool_call>")) for row in ROWS
]


def asked(row: Row, **more: Any) -> dict[str, Any]:
    return {"messages": row.messages, "tools": row.tools, "max_tokens": 96} | more


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.gateway.url}/v1", api_key="x", max_retries=0) as client:
        yield client


def right_calls(calls: list[tuple[str, str]]) -> int:
    """How many of the answers are just the call that the row wants."""
    wanted = [(call["name"], call["arguments"]) for call in CALLS]
    got = [(name, json.loads(arguments)) for name, arguments in calls]
    return sum(one == other for one, other in zip(got, wanted, strict=True))


def test_held_out_rows_are_answered_by_the_right_call(client: openai.OpenAI) -> None:
    """With the SDK, whole: nothing but the call, and the reason says so."""
    calls = []
    for row in ROWS:
        answer = client.chat.completions.create(model="pocket", temperature=0, **asked(row))
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert call.id.startswith("call_")
        calls.append((call.function.name, call.function.arguments))
    assert right_calls(calls) >= len(ROWS) - 1


def test_the_stream_helper_accumulates_calls(client: openai.OpenAI) -> None:
    """The SDK's own state machine puts the deltas together, arguments in more than one piece."""
    calls = []
    for row in ROWS:
        with client.chat.completions.stream(model="pocket", temperature=0, **asked(row)) as stream:
            kinds = [event.type for event in stream]
            (choice,) = stream.get_final_completion().choices
        assert kinds.count("tool_calls.function.arguments.delta") > 1
        assert kinds.count("tool_calls.function.arguments.done") == 1
        assert choice.finish_reason == "tool_calls"
        assert not choice.message.content
        (call,) = choice.message.tool_calls
        calls.append((call.function.name, call.function.arguments))
    assert right_calls(calls) >= len(ROWS) - 1


@needs_specification
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("logprobs", [{}, {"logprobs": True, "top_logprobs": 2}])
def test_a_call_conforms_and_streams_what_it_says_whole(
    stack: Stack, n: int, logprobs: dict[str, Any]
) -> None:
    """Every chunk and the whole against OpenAI's specification; logprobs of every token, markers
    too, in the order of the tokens; usage counts them all."""
    body = asked(ROWS[0], n=n, **logprobs)
    whole = stack.ask(CHAT, **body)
    assert_conforms("CreateChatCompletionResponse", whole)
    options = {"include_usage": True}
    chunks = events(stack.post(CHAT, body | {"stream": True, "stream_options": options}).content)
    assert chunks.pop() == "[DONE]"
    assert counted(chunks.pop()["usage"]) == counted(whole["usage"])
    for chunk in chunks:
        assert_conforms("CreateChatCompletionStreamResponse", chunk)
    for choice in whole["choices"]:
        mine = [one for c in chunks for one in c["choices"] if one["index"] == choice["index"]]
        deltas = [one["delta"] for one in mine]
        assert [one["finish_reason"] for one in mine][-1] == choice["finish_reason"] == "tool_calls"
        assert deltas[0]["role"] == "assistant"
        assert all("role" not in delta for delta in deltas[1:])
        assert not any(delta.get("content") for delta in deltas)
        pieces = [one for delta in deltas for one in delta.get("tool_calls", [])]
        assert [(one["type"], one["function"]["arguments"]) for one in pieces[:1]] == [
            ("function", "")
        ]
        (call,) = choice["message"]["tool_calls"]
        assert pieces[0]["function"]["name"] == call["function"]["name"]
        assert (
            "".join(one["function"]["arguments"] for one in pieces)
            == (call["function"]["arguments"])
        )
        assert {one["index"] for one in pieces} == {0}
        if logprobs:
            entries = [e for one in mine for e in (one["logprobs"] or {}).get("content", [])]
            assert [e["token"] for e in entries] == [
                e["token"] for e in choice["logprobs"]["content"]
            ]
            assert len(entries) * n == whole["usage"]["completion_tokens"]
            assert "<tool_call>" in "".join(e["token"] for e in entries)
        else:
            assert choice["logprobs"] is None


def test_a_cut_call_is_no_finished_call(stack: Stack) -> None:
    """Cut by max_tokens: reason `length`, the arguments as far as they came."""
    whole = stack.ask(CHAT, **asked(ROWS[0]))["choices"][0]["message"]["tool_calls"][0]["function"]
    for limit in range(2, 60, 6):
        (choice,) = stack.ask(CHAT, **asked(ROWS[0], max_tokens=limit))["choices"]
        if choice["finish_reason"] == "tool_calls":
            break
        assert choice["finish_reason"] == "length"
        for call in choice["message"].get("tool_calls", []):
            assert choice["message"]["content"] is None
            assert call["function"]["name"] == whole["name"]
            assert whole["arguments"].startswith(call["function"]["arguments"])
    else:
        pytest.fail("the call never became whole")


def test_a_round_trip_is_answered(client: openai.OpenAI) -> None:
    """Question, call, result, answer; with the SDK's own message as what the assistant said."""
    row = ROWS[0]
    first = client.chat.completions.create(model="pocket", temperature=0, **asked(row))
    said = first.choices[0].message
    result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": '{"done": true}'}
    messages = [*row.messages, said.model_dump(exclude_unset=True), result]
    answer = client.chat.completions.create(
        model="pocket", messages=messages, tools=row.tools, temperature=0, max_tokens=32
    )
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")
    assert answer.usage.prompt_tokens > first.usage.prompt_tokens


@pytest.mark.parametrize("form", [str, json.loads], ids=["text", "object"])
def test_arguments_of_past_calls_are_text_or_objects(stack: Stack, form: Any) -> None:
    """Both are the same prompt."""
    text = json.dumps(CALLS[0]["arguments"])
    call = {"id": "1", "type": "function"}
    call |= {"function": {"name": CALLS[0]["name"], "arguments": form(text)}}
    messages = [
        *ROWS[0].messages,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]
    said = {"role": "assistant", "content": f"<tool_call>{json.dumps(CALLS[0])}</tool_call>"}
    usages = []
    for turn in (messages[-2], said):
        messages[-2] = turn
        answer = stack.ask(CHAT, **asked(ROWS[0], messages=messages, max_tokens=1))
        usages.append(counted(answer["usage"]))
    assert usages[0] == usages[1]


def test_only_one_call_where_parallel_calls_are_off(stack: Stack) -> None:
    """The answer ends behind its first call, and its sequence with it."""
    on = stack.ask(CHAT, **asked(ROWS[0], ignore_eos=True))
    off = stack.ask(CHAT, **asked(ROWS[0], n=2, ignore_eos=True, parallel_tool_calls=False))
    assert on["usage"]["completion_tokens"] == 96
    assert off["usage"]["completion_tokens"] < 2 * 96
    for choice in off["choices"]:
        assert choice["finish_reason"] == "tool_calls"
        assert len(choice["message"]["tool_calls"]) == 1
    assert_idle(stack.worker)


def test_no_calls_are_read_where_none_are_wanted(stack: Stack) -> None:
    """`tool_choice: none` shows no tools; without tools, text that looks like a call is text."""
    (choice,) = stack.ask(CHAT, **asked(ROWS[0], tool_choice="none"))["choices"]
    assert "tool_calls" not in choice["message"]
    assert isinstance(choice["message"]["content"], str)


# ---- forced -------------------------------------------------------------------------------------

BOOK = {
    "type": "function",
    "function": {
        "name": "book_table",
        "description": "Book a table in a restaurant",
        "parameters": {
            "type": "object",
            "properties": {
                "guests": {"type": "integer", "minimum": 1, "maximum": 9},
                "area": {"enum": ["inside", "terrace"]},
            },
            "required": ["guests", "area"],
            "additionalProperties": False,  # at a high temperature, their text might never end
        },
    },
}
HI = {"messages": [{"role": "user", "content": "Hi"}], "tools": [BOOK], "max_tokens": 512}
UNENFORCEABLE = {"name": "f", "strict": True, "parameters": {"not": {}}}
NAMED = {"type": "function", "function": {"name": "book_table"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_obeys_its_schema(
    stack: Stack, client: openai.OpenAI, choice: Any, stream: bool
) -> None:
    """Also where the model would never have called, at a high temperature, streamed and not."""
    for seed in range(4):
        body = HI | {"tool_choice": choice, "temperature": 1.5, "seed": seed, "model": "pocket"}
        body |= {"parallel_tool_calls": False}
        if stream:
            with client.chat.completions.stream(**body) as events_:
                answer = events_.get_final_completion().choices[0]
        else:
            answer = client.chat.completions.create(**body).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert not answer.message.content
        (call,) = answer.message.tool_calls
        assert call.function.name == "book_table"
        jsonschema.validate(json.loads(call.function.arguments), BOOK["function"]["parameters"])


def test_the_right_call_stays_right_when_forced(stack: Stack) -> None:
    """The grammar takes what the model would write by itself, so it writes the same."""
    free, forced = (
        [
            stack.ask(CHAT, **asked(row, **more))["choices"][0]["message"]["tool_calls"]
            for row in ROWS[:3]
        ]
        for more in ({}, {"tool_choice": "required", "parallel_tool_calls": False})
    )
    for one, other in zip(free, forced, strict=True):
        assert [call["function"] for call in one] == [call["function"] for call in other]


def test_strict_tools_hold_answers_that_may_be_text(stack: Stack) -> None:
    """auto with `strict: true`: the model answers, or calls with arguments that obey."""
    strict = copy.deepcopy(BOOK)
    strict["function"]["strict"] = True
    said = called = 0
    for seed in range(4):
        more = {"tools": [strict], "temperature": 1.5, "seed": seed, "max_tokens": 48}
        (choice,) = stack.ask(CHAT, **HI | more)["choices"]
        for call in choice["message"].get("tool_calls", []):
            called += 1
            if choice["finish_reason"] == "tool_calls":
                arguments = json.loads(call["function"]["arguments"])
                jsonschema.validate(arguments, strict["function"]["parameters"])
        said += bool(choice["message"]["content"])
    assert said + called
    row = ROWS[0]
    tools = [one | {"function": one["function"] | {"strict": True}} for one in row.tools]
    answer = stack.ask(CHAT, **asked(row, tools=tools))
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    plain = stack.ask(CHAT, **asked(row))
    assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"], "strict is shown"


def test_tools_and_a_form_leave_calls_or_that_form(stack: Stack) -> None:
    """Agents ask for both: a call where one is due, else an answer of the schema."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    (choice,) = stack.ask(CHAT, **asked(ROWS[0], response_format=form))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (choice,) = stack.ask(CHAT, **HI | {"response_format": form, "max_tokens": 64})["choices"]
    if choice["finish_reason"] == "stop":
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)
    regex = {"structured_outputs": {"regex": "[0-9]{3}"}}
    (choice,) = stack.ask(CHAT, **asked(ROWS[0], **regex))["choices"]
    assert len(choice["message"]["content"]) == 3


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"ignore_eos": True}, "ignore_eos", "tool_choice"),
        ({"structured_outputs": {"regex": "a"}}, "tool_choice", "regex"),
        ({"tools": [{"type": "function", "function": UNENFORCEABLE}]}, "tools", "not"),
    ],
)
def test_what_cannot_be_forced_is_refused(
    stack: Stack, change: dict[str, Any], param: str, says: str
) -> None:
    """With 400, the field and the reason."""
    response = stack.post(CHAT, HI | {"tool_choice": "required"} | change)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert says in error["message"]


class Pickup(pydantic.BaseModel):
    """Book a pickup"""

    city: str
    day: Literal["Monday", "Tuesday"]
    boxes: int


def test_the_sdks_own_tools_are_parsed(client: openai.OpenAI) -> None:
    """`pydantic_function_tool` makes strict tools; `parse` gives instances of their class."""
    answer = client.chat.completions.parse(
        model="pocket",
        messages=[{"role": "user", "content": "Send the van to Benolvar on Monday."}],
        tools=[openai.pydantic_function_tool(Pickup)],
        tool_choice="required",
        temperature=0,
        max_tokens=128,
    )
    for call in answer.choices[0].message.tool_calls:
        assert isinstance(call.function.parsed_arguments, Pickup)
