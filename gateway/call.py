"""One client's request on its way in: a body within bounds, parsed as little as routing needs.

The body stays the bytes that came: everything beyond `model`, `stream` and the presence of a prompt
is the replica's to judge.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Receive

from gateway import problems
from gateway.ids import ids
from policies.schema import Gateway
from runtime.wire import LARGE_BODY_BYTES, collector_off, parse_object

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"

FORWARDED = frozenset(
    (
        b"x-correlation-id",
        b"x-session-id",
        b"x-session-affinity",
        b"x-headgate-tier",
        b"x-headgate-route",
        b"x-headgate-marks",
        b"traceparent",
        b"tracestate",
        b"baggage",
    )
)
# What the gateway itself reads of a body. The rest of the tree is given up at once, so that the
# garbage collector has nothing of it to walk; the bytes go on whole.
READ = frozenset((
    "add_generation_prompt", "audio", "begun_token_ids", "best_of", "cache_salt",
    "chat_template_kwargs", "continue_final_message", "documents", "echo", "frequency_penalty",
    "functions", "guided_choice", "guided_grammar", "guided_json", "guided_regex", "logprobs",
    "max_completion_tokens", "max_tokens", "messages", "n", "presence_penalty", "priority",
    "prompt", "prompt_cache_key", "response_format", "seed", "service_tier", "stop",
    "stream_options", "structured_outputs", "temperature", "tool_choice", "tools", "top_k",
    "top_logprobs", "top_p", "user",
))  # fmt: skip
SESSION_HEADERS = ("x-session-id", "x-session-affinity")
# Several of them are one list (W3C); of two `traceparent` it makes one that is not valid.
LISTS = frozenset((b"traceparent", b"tracestate", b"baggage"))
FORWARDED_PREFIX = b"x-slo-"
FORWARDED_MAX = 32  # headers
HEADER_VALUE_MAX_BYTES = 4096
REQUEST_ID_MAX_BYTES = 128
DOTS = frozenset((".", ".."))  # as a part of a path they lead elsewhere, encoded or not

_ids = ids(12)

RawHeaders = Sequence[tuple[bytes, bytes]]


class ClientGone(Exception):
    """The client closed its connection before its request was complete: nobody waits for us."""


@dataclass(slots=True)
class Call:
    """A request that can be routed. `headers` are those that go on to a replica."""

    path: str
    model: str
    stream: bool
    body: bytes = field(repr=False)
    headers: dict[str, str] = field(default_factory=dict)
    authorization: str | None = field(default=None, repr=False)
    data: Mapping[str, Any] = field(default_factory=dict, repr=False)  # of the body: READ

    def session(self, fields: Sequence[str]) -> str | None:
        """What the client calls that which the request belongs to: by a header, else by the first
        of these fields of its body."""
        for name in SESSION_HEADERS:
            if named := self.headers.get(name):
                return named
        for name in fields:
            value = self.data.get(name)
            if value and isinstance(value, str):
                return value
        return None


async def read_body(
    headers: RawHeaders, receive: Receive, settings: Gateway, *, waits: bool = True
) -> bytes:
    """The whole body; where all of it has come it `waits` for nothing, and needs no limit.

    Raises Problem 400, 408, 413 or 415, and ClientGone."""
    _check_headers(headers, settings.max_body_bytes)
    if not waits:
        return await _collect(receive, settings.max_body_bytes)
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            return await _collect(receive, settings.max_body_bytes)
    except TimeoutError:
        raise problems.body_too_slow(settings.body_timeout_s) from None


def _check_headers(headers: RawHeaders, limit_bytes: int) -> None:
    """Refuses by the headers alone, so that a client that expects 100-continue sends nothing."""
    for name, value in headers:
        if name == b"upgrade":
            raise problems.upgrade_offered(value.decode("latin-1"))
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise problems.body_encoded(value.decode("latin-1"))
        if name == b"content-length" and int(value) > limit_bytes:  # digits: the parser saw to it
            raise problems.body_too_large(limit_bytes)


async def _collect(receive: Receive, limit_bytes: int) -> bytes:
    pieces: list[bytes] = []
    size_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        size_bytes += len(piece)
        if size_bytes > limit_bytes:
            raise problems.body_too_large(limit_bytes)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces) if len(pieces) > 1 else piece


def parse_call(path: str, body: bytes, headers: RawHeaders, request_id: str) -> Call:
    """Raises Problem 400 that names the field.

    A long body is not parsed in a thread: orjson keeps the interpreter's lock, so that the loop
    would wait all the same.
    """
    if len(body) <= LARGE_BODY_BYTES:
        return _parse(path, body, headers, request_id)
    with collector_off(body):
        return _parse(path, body, headers, request_id)


def _parse(path: str, body: bytes, headers: RawHeaders, request_id: str) -> Call:
    data = parse_object(body)
    model = _model(data)
    stream = _stream(data)
    if path == CHAT_PATH:
        _check_messages(data)
    elif data.get("prompt") is None:
        raise problems.missing("prompt", "a string, a list of strings, or token ids")
    forwarded = {"x-request-id": request_id}
    authorization = None
    for name, value in headers:
        if name == b"authorization":
            authorization = _plain(value)
        elif name in FORWARDED or name.startswith(FORWARDED_PREFIX):
            text = _plain(value)
            if text is None and name.startswith(
                FORWARDED_PREFIX
            ):  # not in silence: it is a promise
                raise problems.wrong_value(name.decode("latin-1"), "milliseconds", "other bytes")
            if text is not None and len(forwarded) < FORWARDED_MAX:
                _forward(forwarded, name, text)
    return Call(
        path,
        model,
        stream,
        body,
        forwarded,
        authorization,
        {name: value for name, value in data.items() if name in READ},
    )


def _forward(forwarded: dict[str, str], name: bytes, text: str) -> None:
    key = name.decode("latin-1")
    before = forwarded.get(key) if name in LISTS else None
    if before is None:
        forwarded[key] = text
    elif len(before) + len(text) < HEADER_VALUE_MAX_BYTES:
        forwarded[key] = f"{before},{text}"


def request_id(headers: RawHeaders) -> str:
    """The client's own x-request-id when it is short, printable and can be a part of a path, else a
    new one: what is kept of a request is opened by it."""
    for name, value in headers:
        if name == b"x-request-id" and 0 < len(value) <= REQUEST_ID_MAX_BYTES:
            text = _plain(value)
            if text is not None and DOTS.isdisjoint(text.split("/")):
                return text
    return f"req_{next(_ids)}"


def _plain(value: bytes) -> str | None:
    """A header's value if it is short printable ASCII; others could not go on as they are."""
    if len(value) > HEADER_VALUE_MAX_BYTES or not value.isascii():
        return None
    text = value.decode("ascii")
    return text if text.isprintable() else None


def _model(data: dict[str, Any]) -> str:
    model = data.get("model")
    if model is None:
        raise problems.missing("model", "the name of a model, see /v1/models")
    if not isinstance(model, str):
        raise problems.wrong_value("model", "a string", _kind(model))
    if not model:
        raise problems.wrong_value("model", "the name of a model, see /v1/models", "''")
    return model


def _stream(data: dict[str, Any]) -> bool:
    stream = data.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise problems.wrong_value("stream", "true, false or null", _kind(stream))
    return bool(stream)


def _check_messages(data: dict[str, Any]) -> None:
    messages = data.get("messages")
    if messages is None:
        raise problems.missing("messages", "a list of messages")
    if not isinstance(messages, list):
        raise problems.wrong_value("messages", "a list of messages", _kind(messages))
    if not messages:
        raise problems.wrong_value("messages", "at least one message", "an empty list")


KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


def _kind(value: object) -> str:
    """The JSON name of a value's type, for messages."""
    return KINDS.get(type(value), "a number")
