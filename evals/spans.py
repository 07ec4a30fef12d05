"""OpenTelemetry GenAI spans as requests to send again: what the gateway's recorder writes.

Reads one object a line: a span, `{"trace_id", "spans": [...]}`, or OTLP's `resourceSpans`;
attributes as an object or as OTLP's list; messages as JSON text or not, in parts or as OpenAI's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import orjson

from telemetry.genai import (
    CHAT,
    CONVERSATION,
    FIELDS,
    FIRST_CHUNK,
    INPUT,
    INPUT_TOKENS,
    OPERATION,
    OUTPUT,
    OUTPUT_TOKENS,
    SYSTEM,
    TEXT,
    TOOLS,
)

CHATS = (CHAT, "generate", TEXT, "generate_content")
FAILED = (2, "2", "ERROR", "STATUS_CODE_ERROR")


class NoSpan(Exception):
    """A line that is none, and why."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A request that was answered once, and what was answered. Without a `body` only how long both
    were was recorded."""

    start_s: float  # since 1970
    id: str
    body: Mapping[str, Any] | None
    conversation: str = ""
    tier: str = ""
    answer: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)


def requests_of(line: Mapping[str, Any]) -> Iterator[Recorded]:
    """The requests in a line; those that failed, and spans of other kinds, are left out.

    Raises NoSpan for one that cannot be read.
    """
    spans = list(_spans(line))
    for span in spans:
        attributes = _attributes(span)
        operation = attributes.get(OPERATION)
        is_chat = operation in CHATS or (operation is None and INPUT in attributes)
        failed = (span.get("status") or {}).get("code") in FAILED
        if is_chat and not failed:
            yield _recorded(span, attributes, in_session=len(spans) > 1)


def _recorded(
    span: Mapping[str, Any], attributes: Mapping[str, Any], *, in_session: bool
) -> Recorded:
    tokens = [attributes.get(name) for name in (INPUT_TOKENS, OUTPUT_TOKENS)]
    without_text = INPUT not in attributes and all(tokens)
    body = None if without_text else _body(attributes)
    name = str(span.get("span_id") or span.get("spanId") or "")
    trace = str(span.get("trace_id") or span.get("traceId") or "")
    session = attributes.get(CONVERSATION)
    said = [_message(one)[0].get("content") for one in _decoded(attributes, OUTPUT) or ()]
    meta = {ours: attributes[theirs] for theirs, ours in _META.items() if theirs in attributes}
    return Recorded(
        start_s=_moment(span.get("start_time") or span.get("startTimeUnixNano")),
        id=f"{trace[:8]}-{name}" if name else "",
        body=body,
        conversation=str(session or (trace if in_session else "")),
        tier=str(attributes.get("headgate.slo.tier", "")),
        answer=said[0] if said and isinstance(said[0], str) else None,
        prompt_tokens=tokens[0] or 0,
        output_tokens=tokens[1] or 0,
        meta=meta,
    )


_META = {
    CONVERSATION: "session",
    "headgate.tenant": "tenant",
    INPUT_TOKENS: "prompt_tokens",
    OUTPUT_TOKENS: "completion_tokens",
    FIRST_CHUNK: "ttft_s",
}


# ---- the body -----------------------------------------------------------------------------------


def _body(attributes: Mapping[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = dict(_decoded(attributes, "headgate.request.other") or {})
    for name, ours in FIELDS.items():
        if name in attributes:
            body[ours] = attributes[name]
    if (tools := _decoded(attributes, TOOLS)) is not None:
        body["tools"] = tools
    if "prompt" in body:  # of a text completion, as token ids or as a list
        return body
    told = _decoded(attributes, INPUT)
    if not isinstance(told, list) or not told:
        raise NoSpan(f"{INPUT}: expected a list of messages; was content recorded?")
    system = _decoded(attributes, SYSTEM)
    messages = _message({"role": "system", "parts": system}) if system else []
    for one in told:
        messages += _message(one)
    if attributes.get(OPERATION) == TEXT:
        body["prompt"] = messages[-1].get("content") or ""
    else:
        body["messages"] = messages
    return body


def _message(given: Any) -> list[dict[str, Any]]:
    """One message as OpenAI has it; a turn with several tools' outputs becomes one for each."""
    if not isinstance(given, dict):
        raise NoSpan(f"expected a message as an object, got {given!r:.60}")
    parts = given.get("parts")
    if not isinstance(parts, list):
        return [dict(given)]
    beside = {name: value for name, value in given.items() if name not in _OF_PARTS}
    outputs = [one for one in parts if one.get("type") == "tool_call_response"]
    if outputs:
        return [
            beside | {"tool_call_id": one.get("id"), "content": _output(one)} for one in outputs
        ]
    calls = [_call(one) for one in parts if one.get("type") == "tool_call"]
    contents = [one for one in parts if one.get("type") not in ("tool_call", "reasoning")]
    message = beside | {"content": _content(contents)}
    return [message | {"tool_calls": calls} if calls else message]


_OF_PARTS = ("finish_reason", "parts")


def _content(parts: list[dict[str, Any]]) -> Any:
    """Text for one part of it, nothing for none, OpenAI's parts for several."""
    if not parts:
        return None
    if len(parts) == 1 and parts[0].get("type") == "text":
        return parts[0].get("content", "")
    return [
        {"type": "text", "text": one.get("content", "")} if one.get("type") == "text" else one
        for one in parts
    ]


def _call(part: Mapping[str, Any]) -> dict[str, Any]:
    arguments = part.get("arguments", "")
    if not isinstance(arguments, str):
        arguments = orjson.dumps(arguments).decode()
    function = {"name": part.get("name", ""), "arguments": arguments}
    return {"id": part.get("id"), "type": "function", "function": function}


def _output(part: Mapping[str, Any]) -> Any:
    told = part.get("response", part.get("result", ""))
    return told if isinstance(told, str | list) else orjson.dumps(told).decode()


# ---- the span -----------------------------------------------------------------------------------


def _spans(line: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "resourceSpans" in line:
        for resource in line["resourceSpans"]:
            for scope in resource.get("scopeSpans", ()):
                yield from scope.get("spans", ())
    elif "spans" in line:
        yield from line["spans"]
    else:
        yield line


def _attributes(span: Mapping[str, Any]) -> dict[str, Any]:
    given = span.get("attributes") or {}
    if isinstance(given, dict):
        return given
    return {one["key"]: _value(one.get("value") or {}) for one in given}


def _value(told: Mapping[str, Any]) -> Any:
    """OTLP's: `{"intValue": "7"}`, arrays of such, and so on."""
    if "intValue" in told:
        return int(told["intValue"])
    if "arrayValue" in told:
        return [_value(one) for one in told["arrayValue"].get("values", ())]
    return next(iter(told.values()), None)


def _decoded(attributes: Mapping[str, Any], name: str) -> Any:
    value = attributes.get(name)
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise NoSpan(f"{name}: is not JSON: {error}") from None


def _moment(value: Any) -> float:
    """ISO 8601, or nanoseconds since 1970 as OTLP has them."""
    if isinstance(value, str) and not value.isdigit():
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise NoSpan(f"start_time: expected an ISO 8601 moment, got {value!r}") from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if value is None:
        raise NoSpan("start_time: missing")
    number = float(value)
    return number / 1e9 if number > 1e16 else number
