"""What an answer says and when it said it, from its bytes and the moments they came.

Knows OpenAI's chat and text completions, streamed and whole, and the fields that engines add; knows
no connection. A stream counts as whole once it says how it finished, or `[DONE]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from evals.sse import Events

Reads = Sequence[tuple[float, bytes]]  # moment, bytes that came then
TOKEN_IDS = b"token-ids "  # a comment of our own workers, see runtime/wire.py
PROBLEM_CHARS_MAX = 500


class Unreadable(Exception):
    """An answer that is none: broken JSON, an early end, or an error inside a stream."""

    def __init__(self, said: str, code: str = "") -> None:
        super().__init__(said)
        self.code = code


@dataclass(slots=True)
class Said:
    """One answer, the first choice of it. Moments are those of the reads."""

    text: str = ""
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    first: float | None = None  # the first content, tool call or reasoning that is not empty
    last: float | None = None  # the last one
    gap_max_s: float | None = None
    chunks: int = 0  # events that carried any of these
    finish_reason: str = ""
    fingerprint: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    scored_from: int = 0  # of an echo, the tokens from this character on
    _echoed: int = 0
    _texts: list[str] = field(default_factory=list)

    @property
    def completion_tokens(self) -> int | None:
        return _count(self.usage, "completion_tokens")

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first; None for fewer than two, or where nobody counted."""
        tokens = self.completion_tokens
        if self.first is None or self.last is None or tokens is None or tokens < 2:
            return None
        return (self.last - self.first) / (tokens - 1)

    def fields(self) -> dict[str, Any]:
        """As an Observation has it, but for the moments that need to know when it was asked."""
        prompt = self.usage.get("prompt_tokens_details") or {}
        answer = self.usage.get("completion_tokens_details") or {}
        return {
            "text": self.text,
            "tool_calls": tuple(self.calls[at] for at in sorted(self.calls)),
            "finish_reason": self.finish_reason,
            "fingerprint": self.fingerprint,
            "tpot_s": self.tpot_s,
            "gap_max_s": self.gap_max_s,
            "prompt_tokens": _count(self.usage, "prompt_tokens"),
            "completion_tokens": self.completion_tokens,
            "cached_tokens": _count(prompt, "cached_tokens"),
            "accepted_tokens": _count(answer, "accepted_prediction_tokens"),
            "rejected_tokens": _count(answer, "rejected_prediction_tokens"),
            "token_ids": tuple(self.token_ids) or None,
            "logprobs": tuple(self.logprobs) or None,
        }

    # ---- taking in ------------------------------------------------------------------------------

    def add(self, payload: Mapping[str, Any], at: float) -> None:
        """One chunk of a stream, or a whole answer. Raises Unreadable for an error."""
        if error := payload.get("error"):
            raise Unreadable(*_error(error))
        try:
            self._add(payload, at)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            shown = _shown(orjson.dumps(payload))
            raise Unreadable(f"{shown} is no answer of OpenAI's shape: {error}") from None

    def _add(self, payload: Mapping[str, Any], at: float) -> None:
        self.usage = payload.get("usage") or self.usage
        self.fingerprint = payload.get("system_fingerprint") or self.fingerprint
        choice = _first_choice(payload.get("choices"))
        if choice is None:
            return
        delta = choice.get("delta") or choice.get("message") or choice
        if self._add_delta(delta):
            self._tick(at)
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        ids = choice.get("token_ids")
        self.token_ids += [one for one in ids if type(one) is int] if ids else []
        self._add_logprobs(choice.get("logprobs"))

    def _add_delta(self, delta: Mapping[str, Any]) -> bool:
        """Whether it holds anything that a reader waits for."""
        text = delta.get("content") or delta.get("text") or ""
        if isinstance(text, str):
            self._texts.append(text)
        calls = delta.get("tool_calls") or ()
        for place, call in enumerate(calls):
            self._add_call(call.get("index", place), call)
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        return bool(text or calls or reasoning)

    def _add_logprobs(self, told: Mapping[str, Any] | None) -> None:
        """Of chat (`content[].logprob`) or of a text completion (`token_logprobs`, null at first),
        where tokens say themselves how long they are: offsets leave special ones out.
        """
        if not told:
            return
        if (entries := told.get("content")) is not None:
            self.logprobs += [float(one["logprob"]) for one in entries]
            return
        logprobs = told.get("token_logprobs") or ()
        tokens = told.get("tokens") or [""] * len(logprobs)
        for token, logprob in zip(tokens, logprobs, strict=True):
            if logprob is not None and self._echoed >= self.scored_from:
                self.logprobs.append(float(logprob))
            self._echoed += len(token)

    def _add_call(self, at: int, call: Mapping[str, Any]) -> None:
        known = self.calls.setdefault(
            at, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        )
        known["id"] = call.get("id") or known["id"]
        function = call.get("function") or {}
        known["function"]["name"] = function.get("name") or known["function"]["name"]
        known["function"]["arguments"] += function.get("arguments") or ""

    def _tick(self, at: float) -> None:
        self.chunks += 1
        if self.first is None:
            self.first = at
        else:
            assert self.last is not None
            self.gap_max_s = max(self.gap_max_s or 0.0, at - self.last)
        self.last = at

    def end(self) -> None:
        self.text = "".join(self._texts)


def read_stream(reads: Reads, said: Said) -> None:
    """Takes in a whole stream of events. Raises Unreadable; what came before it stays in `said`."""
    events = Events()
    done = False
    try:
        for at, piece in reads:
            for data in events.feed(piece):
                if data == b"[DONE]":
                    done = True
                elif not done:
                    said.add(_object(data), at)
    finally:
        said.end()
        for comment in events.comments:
            if comment.startswith(TOKEN_IDS):
                said.token_ids += map(int, comment.removeprefix(TOKEN_IDS).split(b","))
    if not done and not said.finish_reason:
        raise Unreadable("the stream ended without [DONE] and without a finish reason")


def read_whole(body: bytes, said: Said, at: float) -> None:
    """Takes in an answer that is no stream, whose tokens have no moments. Raises Unreadable."""
    try:
        said.add(_object(body), at)
    finally:
        said.end()
        said.first = said.last = None
    if not said.finish_reason and not said.usage:
        raise Unreadable(f"the answer has no choice: {_shown(body)}")


def problem_of(body: bytes) -> tuple[str, str]:
    """What the body of an answer other than 200 complains of: in words, and its code."""
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _shown(body), ""
    return _error(payload.get("error", payload) if isinstance(payload, dict) else payload)


def _error(error: Any) -> tuple[str, str]:
    if not isinstance(error, dict):
        return str(error)[:PROBLEM_CHARS_MAX], ""
    said = error.get("message") or error.get("detail") or error
    return str(said)[:PROBLEM_CHARS_MAX], str(error.get("code") or "")


def _object(data: bytes) -> Mapping[str, Any]:
    try:
        payload = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Unreadable(f"{_shown(data)} is not JSON: {error}") from None
    if not isinstance(payload, dict):
        raise Unreadable(f"{_shown(data)} is not a JSON object")
    return payload


def _shown(data: bytes) -> str:
    return repr(data[:PROBLEM_CHARS_MAX].decode("utf-8", "replace"))


def _first_choice(choices: Iterable[Mapping[str, Any]] | None) -> Mapping[str, Any] | None:
    return next((one for one in choices or () if one.get("index", 0) == 0), None)


def _count(counts: Mapping[str, Any], name: str) -> int | None:
    value = counts.get(name)
    return value if type(value) is int else None
