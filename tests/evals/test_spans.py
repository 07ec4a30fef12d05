"""Requests come out of spans as they went in, whoever wrote them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from evals.spans import NoSpan, requests_of

TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}
ATTRIBUTES: dict[str, Any] = {
    "gen_ai.operation.name": "chat",
    "gen_ai.request.model": "m",
    "gen_ai.request.max_tokens": 7,
    "gen_ai.request.stop_sequences": ["x"],
    "gen_ai.conversation.id": "conv",
    "headgate.slo.tier": "batch",
    "headgate.tenant": "t",
    "gen_ai.tool.definitions": json.dumps([TOOL]),
    "gen_ai.input.messages": json.dumps(
        [
            {"role": "system", "parts": [{"type": "text", "content": "Be brief."}]},
            {"role": "user", "parts": [{"type": "text", "content": "hi"}]},
            {
                "role": "assistant",
                "parts": [{"type": "tool_call", "id": "c1", "name": "get", "arguments": "{}"}],
            },
            {
                "role": "tool",
                "parts": [{"type": "tool_call_response", "id": "c1", "response": "5"}],
            },
        ]
    ),
    "gen_ai.output.messages": json.dumps(
        [{"role": "assistant", "parts": [{"type": "text", "content": "Five."}]}]
    ),
}
SPAN: dict[str, Any] = {
    "trace_id": "t" * 32, "span_id": "s1", "start_time": "2026-11-26T10:00:00.500000+00:00",
    "end_time": "2026-11-26T10:00:01+00:00", "name": "chat m", "attributes": ATTRIBUTES,
}  # fmt: skip
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "get", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "5"},
]


def test_a_session_line_gives_its_requests_back() -> None:
    """Body, conversation, tier, tenant, and the answer that was recorded."""
    (one,) = requests_of({"trace_id": "t", "spans": [SPAN]})
    assert one.body == {
        "model": "m", "max_tokens": 7, "stop": ["x"], "tools": [TOOL], "messages": MESSAGES
    }  # fmt: skip
    assert (one.conversation, one.tier, one.answer) == ("conv", "batch", "Five.")
    assert one.meta == {"session": "conv", "tenant": "t"}
    assert one.id == "tttttttt-s1"
    (alone,) = requests_of(SPAN)
    assert alone == one


def test_otlp_says_the_same_in_its_own_words() -> None:
    """Attributes as a list of typed values, moments in nanoseconds."""

    def typed(value: Any) -> dict[str, Any]:
        if isinstance(value, list):
            return {"arrayValue": {"values": [typed(one) for one in value]}}
        return {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}

    span = {
        "traceId": "t" * 32, "spanId": "s1", "startTimeUnixNano": "1795687200500000000",
        "attributes": [{"key": key, "value": typed(value)} for key, value in ATTRIBUTES.items()],
    }  # fmt: skip
    (ours,) = requests_of(SPAN)
    (one,) = requests_of({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]})
    assert one == ours


def test_failures_and_other_spans_are_not_requests() -> None:
    """A retry that failed was no load of its own."""
    failed = SPAN | {"status": {"code": 2}}
    tool = SPAN | {"attributes": {"gen_ai.operation.name": "execute_tool"}}
    assert list(requests_of({"spans": [failed, tool]})) == []


def test_messages_of_openais_form_pass_as_they_are() -> None:
    """Some recorders never made parts of them; parts that are no text stay parts."""
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    parts = [{"type": "text", "content": "see"}, image]
    told = [{"role": "user", "content": "hi", "name": "a"}, {"role": "user", "parts": parts}]
    attributes = {"gen_ai.operation.name": "chat", "gen_ai.input.messages": told}
    (one,) = requests_of({"start_time": 12.5, "attributes": attributes})
    assert one.body["messages"] == [
        told[0],
        {"role": "user", "content": [{"type": "text", "text": "see"}, image]},
    ]
    assert (one.start_s, one.id, one.conversation) == (12.5, "", "")


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"start_time": "noon"}, "ISO 8601"),
        ({"start_time": None}, "missing"),
        ({"attributes": {"gen_ai.operation.name": "chat"}}, "was content recorded"),
        ({"attributes": ATTRIBUTES | {"gen_ai.input.messages": "["}}, "is not JSON"),
        ({"attributes": ATTRIBUTES | {"gen_ai.input.messages": "[3]"}}, "message as an object"),
    ],
)
def test_a_span_that_cannot_be_replayed_says_why(more: dict[str, Any], problem: str) -> None:
    with pytest.raises(NoSpan, match=problem):
        list(requests_of(SPAN | more))
