"""Streamed answers from any OpenAI-compatible server. Knows a base URL; knows no terminal."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_CONNECT_S = 5.0
_SILENCE_S = 600.0
_EVENT_BYTES_MAX = 4 * 2**20
# Where neither a person nor the model's makers say anything: lively, and seldom nonsense.
DEFAULT_TEMPERATURE = 0.7
KEY_VARIABLE = "HEADGATE_API_KEY"  # of a client's key
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class AnswerError(Exception):
    """No answer, or half of one; the text says why."""


class WrongUsage(AnswerError):
    """What was typed, or stands in the environment, names nothing that could be asked."""


@dataclass(slots=True)
class Clock:
    """What one answer cost; seconds since the request, tokens as the server counts them."""

    first_s: float | None = None
    last_s: float = 0.0
    pieces: int = 0
    usage: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """`57 tokens · first after 0.12 s · 48.1 tokens/s`."""
        count = self.usage.get("completion_tokens")
        tokens = count if isinstance(count, int) else self.pieces
        parts = [f"{tokens} token{'' if tokens == 1 else 's'}"]
        if self.first_s is not None:
            parts.append(f"first after {self.first_s:.2f} s")
            if tokens > 1 and self.last_s > self.first_s:
                parts.append(f"{(tokens - 1) / (self.last_s - self.first_s):.1f} tokens/s")
        return " · ".join(parts)


@dataclass(slots=True)
class Talk:
    """A conversation: what was said so far, and with whom."""

    url: str
    model: str
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    sampling: dict[str, float] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return {
            "model": self.model,
            "messages": head + self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.sampling,
        }


def key_of(variable: str) -> dict[str, str]:
    """The header that brings a key of the environment; none where it has none. Raises WrongUsage
    for one that cannot be sent."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise WrongUsage(f"{variable} has letters that no key has: line ends, or not ASCII")
    return {"authorization": f"Bearer {key}"} if key else {}


def visible(text: str) -> str:
    """Text without the control characters that could command a terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


async def offered(url: str) -> dict[str, dict[str, Any]]:
    """The gateway's models by name, in its order. Raises AnswerError when it does not tell any."""
    async with _session(url) as session, session.get(f"{url}/v1/models") as response:
        if response.status != 200:
            raise AnswerError(await _complaint(response))
        offers = _object(await response.read())
    listed = offers.get("data")
    entries = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    models = {one["id"]: one for one in entries if isinstance(one.get("id"), str)}
    if not models:
        raise AnswerError(f"{url} offers no model: give --model")
    return models


def sampling_of(entry: dict[str, Any], temperature: float | None) -> dict[str, float]:
    """How to sample: what the model's entry in the list recommends, and `temperature` above it."""
    told = entry.get("sampling")
    known = told if isinstance(told, dict) else {}
    fields = {n: known[n] for n in _SAMPLING if isinstance(known.get(n), int | float)}
    if temperature is not None:
        fields["temperature"] = temperature
    return {"temperature": DEFAULT_TEMPERATURE} | fields


async def stream(conversation: Talk, clock: Clock) -> AsyncIterator[str]:
    """The answer's text as it comes; `clock.usage` is filled at the end. Raises AnswerError."""
    url = f"{conversation.url}/v1/chat/completions"
    async with (
        _session(conversation.url) as session,
        session.post(url, json=conversation.body()) as response,
    ):
        if response.status != 200:
            raise AnswerError(await _complaint(response))
        finished = False
        async for data in _events(response):
            if data == b"[DONE]":
                return
            chunk = _object(data)
            if chunk.get("error"):
                raise AnswerError(f"the answer broke off: {_message(chunk)}")
            usage = chunk.get("usage")
            if isinstance(usage, dict):
                clock.usage = usage
            for choice in _choices(chunk):
                finished = finished or bool(choice.get("finish_reason"))
                delta = choice.get("delta")
                text = delta.get("content") if isinstance(delta, dict) else None
                if text and isinstance(text, str):
                    yield text
        if not finished:
            raise AnswerError("the answer broke off: the stream ended before the answer did")


@contextlib.asynccontextmanager
async def _session(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A session whose failures are AnswerErrors."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
    try:
        key = key_of(KEY_VARIABLE)
        async with aiohttp.ClientSession(timeout=timeout, headers=key) as session:
            yield session
    except aiohttp.InvalidURL:
        raise WrongUsage(f"{url!r} is not a URL such as http://127.0.0.1:8080") from None
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
        raise AnswerError(f"nothing answers at {url}: start it with headgate serve") from None
    except TimeoutError:
        raise AnswerError(f"{url} has been silent for {_SILENCE_S:g} s") from None
    except aiohttp.ClientError as error:
        raise AnswerError(f"the connection to {url} broke: {error}") from None


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each server-sent event; one line each, as JSON is sent."""
    rest = b""
    async for block in response.content.iter_any():
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
        if len(rest) > _EVENT_BYTES_MAX:
            raise AnswerError(f"an event is longer than {_EVENT_BYTES_MAX} bytes")


async def _complaint(response: aiohttp.ClientResponse) -> str:
    """An HTTP problem in one line, with its advice to wait if it has one."""
    body = await response.content.read(65536)
    try:
        told = _message(_object(body))
    except AnswerError:
        told = visible(body.decode("utf-8", "replace"))[:300] or str(response.reason)
    if response.status == 401:
        told += f" ({KEY_VARIABLE} is sent along)"
    wait = response.headers.get("Retry-After")
    return f"HTTP {response.status}: {told}" + (f" (try again in {wait} s)" if wait else "")


def _choices(payload: dict[str, Any]) -> list[dict[str, Any]]:
    choices = payload.get("choices")
    return (
        [choice for choice in choices if isinstance(choice, dict)]
        if isinstance(choices, list)
        else []
    )


def _message(payload: dict[str, Any]) -> str:
    error = payload.get("error")
    told = error.get("message") if isinstance(error, dict) else error
    return visible(str(told or payload))


def _object(data: bytes) -> dict[str, Any]:
    try:
        payload = json.loads(data)
    except ValueError:
        payload = None
    if not isinstance(payload, dict):
        raise AnswerError(f"not a JSON object from the server: {data[:200]!r}")
    return payload
