"""A request and its answer as one OpenTelemetry GenAI span (semantic conventions 1.41). Pure.

Messages are JSON text in OpenTelemetry's parts; what the conventions have no name for stands in
`headgate.request.other`. Every attribute has one type, so that tables can be made of many spans.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import orjson

from gateway.redact import Blot, blotted
from telemetry.genai import (
    ANSWER_ID,
    ANSWER_MODEL,
    CHAT,
    CONVERSATION,
    FINISH_REASONS,
    FIRST_CHUNK,
    INPUT,
    INPUT_TOKENS,
    LEAVES,
    OPERATION,
    OUTPUT,
    OUTPUT_TOKENS,
    PROVIDER,
    REQUEST,
    STREAM,
    TEXT,
    TOOLS,
    counted,
    requested,
)

# Says who asked, or how the answer was sent: neither is part of what was asked.
LEFT_OUT = frozenset(
    ("messages", "metadata", "prompt_cache_key", "safety_identifier", "store", "stream",
     "stream_options", "tools", "user")
)  # fmt: skip
_DATA = re.compile(rb"(?:^|[\r\n])data: ?([^\r\n]*)")


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the gateway knows of a request beside its bytes. Moments in seconds since 1970."""

    trace_id: str
    span_id: str
    request_id: str
    tenant: str
    tier: str
    began: float
    ended: float
    status: int  # 0: nothing was sent
    error: str = ""  # what went wrong, by its code
    ttft_s: float | None = None
    conversation: bool = False  # the client says that requests belong together
    consent: str = ""
    receipt: str = ""
    prompt_tokens: int | None = None  # by the gateway's own count
    arm: str = ""  # of a rollout
    trace: str = ""  # the request's own, which ends with it


@dataclass(slots=True)
class Answer:
    """The first choice of an answer, and what the server says of the whole."""

    head: dict[str, Any] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    calls: dict[int, dict[str, str]] = field(default_factory=dict)
    finish: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    pieces: int = 0  # that said something: about as many tokens

    def add(self, payload: Mapping[str, Any]) -> None:
        self.usage = payload.get("usage") or self.usage
        for name in ("id", "model", "system_fingerprint"):
            if isinstance(payload.get(name), str):
                self.head[name] = payload[name]
        for choice in payload.get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            said = choice.get("delta") or choice.get("message") or choice
            self.texts.append(said.get("content") or said.get("text") or "")
            self.pieces += bool(self.texts[-1] or said.get("tool_calls"))
            self.finish = choice.get("finish_reason") or self.finish
            for place, call in enumerate(said.get("tool_calls") or ()):
                self._add_call(call.get("index", place), call)

    def _add_call(self, at: int, call: Mapping[str, Any]) -> None:
        known = self.calls.setdefault(at, {"id": "", "name": "", "arguments": ""})
        function = call.get("function") or {}
        known["id"] = call.get("id") or known["id"]
        known["name"] = function.get("name") or known["name"]
        known["arguments"] += function.get("arguments") or ""

    def message(self) -> dict[str, Any]:
        text = "".join(self.texts)
        parts: list[dict[str, Any]] = [{"type": "text", "content": text}] if text else []
        parts += [{"type": "tool_call", **self.calls[at]} for at in sorted(self.calls)]
        return {"role": "assistant", "parts": parts, "finish_reason": self.finish}


def span_of(
    exchange: Exchange, body: Mapping[str, Any], answer: bytes, blot: Blot, *, content: bool
) -> dict[str, Any]:
    """The span of a request with this body."""
    heard = read_answer(answer)
    operation = CHAT if "messages" in body else TEXT
    attributes = {
        OPERATION: operation,
        PROVIDER: "headgate",
        STREAM: body.get("stream") is True,
        **requested(body),
        **_response(heard),
        **_usage(heard, exchange),
        **_facts(exchange),
    }
    if exchange.conversation:
        attributes[CONVERSATION] = exchange.trace_id
    if content:
        attributes |= _content(body, heard, operation, blot)
    return {
        "trace_id": exchange.trace_id,
        "span_id": exchange.span_id,
        "name": f"{operation} {body.get('model')}",
        "kind": "SERVER",
        "start_time": _moment(exchange.began),
        "end_time": _moment(exchange.ended),
        "status": {"code": 2 if exchange.error and exchange.error != LEAVES else 0},
        "attributes": attributes,
    }


def _usage(heard: Answer, exchange: Exchange) -> dict[str, Any]:
    """As the server counts; where the client did not ask it to, by the gateway's count of the
    prompt and the pieces of the answer, which is marked: tools that replay need lengths."""
    if heard.usage:
        prompt = heard.usage.get("prompt_tokens_details") or {}
        return counted(
            heard.usage.get("prompt_tokens"),
            heard.usage.get("completion_tokens"),
            prompt.get("cached_tokens"),
        )
    if exchange.prompt_tokens is None or not heard.pieces:
        return {}
    return {
        INPUT_TOKENS: exchange.prompt_tokens,
        OUTPUT_TOKENS: heard.pieces,
        "headgate.usage.estimated": True,
    }


def _response(heard: Answer) -> dict[str, Any]:
    found = {
        ANSWER_ID: heard.head.get("id"),
        ANSWER_MODEL: heard.head.get("model"),
        FINISH_REASONS: [heard.finish] if heard.finish else None,
        "headgate.config.fingerprint": heard.head.get("system_fingerprint"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _facts(exchange: Exchange) -> dict[str, Any]:
    found = {
        FIRST_CHUNK: exchange.ttft_s,
        "headgate.tenant": exchange.tenant,
        "headgate.slo.tier": exchange.tier,
        "headgate.consent": exchange.consent,
        "headgate.receipt": exchange.receipt or None,
        "headgate.request.id": exchange.request_id,
        "headgate.trace.id": exchange.trace or None,
        "headgate.arm": exchange.arm or None,
        "http.response.status_code": exchange.status or None,
        "error.type": exchange.error or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _content(body: Mapping[str, Any], heard: Answer, operation: str, blot: Blot) -> dict[str, str]:
    """Everything that people wrote, blotted, each attribute as JSON text."""
    other = {
        name: value
        for name, value in body.items()
        if name not in LEFT_OUT and name not in REQUEST and name != "stop" and value is not None
    }
    if operation == CHAT:
        messages = [_message(one) for one in body["messages"] if isinstance(one, dict)]
    elif isinstance(body.get("prompt"), str):
        messages = [{"role": "user", "parts": [_text(other.pop("prompt"))]}]
    else:
        messages = []
    found: dict[str, Any] = {}
    if messages:
        found[INPUT] = messages
    if body.get("tools"):
        found[TOOLS] = body["tools"]
    if other:
        found["headgate.request.other"] = other
    if (said := heard.message())["parts"]:
        found[OUTPUT] = [said]
    return {name: orjson.dumps(blotted(value, blot)).decode() for name, value in found.items()}


# ---- messages as parts --------------------------------------------------------------------------


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's message in parts."""
    role, content = given.get("role"), given.get("content")
    beside = {name: value for name, value in given.items() if name not in _IN_PARTS}
    if role == "tool":
        output = {"type": "tool_call_response", "id": given.get("tool_call_id")}
        return beside | {"parts": [output | {"response": _joined(content)}]}
    parts: list[dict[str, Any]] = []
    if isinstance(content, str):
        parts.append(_text(content))
    elif isinstance(content, list):
        parts += [_text(one["text"]) if _is_text(one) else one for one in content]
    for call in given.get("tool_calls") or ():
        function = call.get("function") or {}
        said = {"name": function.get("name"), "arguments": function.get("arguments")}
        parts.append({"type": "tool_call", "id": call.get("id"), **said})
    return beside | {"parts": parts}


_IN_PARTS = ("content", "tool_call_id", "tool_calls")


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "content": text}


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and "text" in part


def _joined(content: Any) -> str:
    if isinstance(content, list):
        return "".join(one["text"] for one in content if _is_text(one))
    return content if isinstance(content, str) else ""


# ---- answers ------------------------------------------------------------------------------------


def read_answer(answer: bytes) -> Answer:
    """Of a stream or a whole body; what cannot be read of it is left out."""
    heard = Answer()
    for piece in _payloads(answer):
        try:
            payload = orjson.loads(piece)
            if isinstance(payload, dict):
                heard.add(payload)
        except (AttributeError, TypeError, ValueError):  # not JSON, or of nobody's form
            continue
    return heard


def _payloads(answer: bytes) -> Iterator[bytes]:
    if answer.lstrip().startswith(b"{"):
        yield answer
        return
    for found in _DATA.finditer(answer):
        yield found[1]


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds")
