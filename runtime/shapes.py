"""OpenAI's answer shapes, whole and streamed: choices, deltas, log-probabilities, usage.

Knows the fields and their order of nesting (specification 2.3.0); knows no request, no engine.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One position: the chosen token and the most likely ones, natural logarithms.

    `logprob` is None for the first token of an echoed prompt: nothing came before it. `offset` is
    where the token's text begins, in characters of the prompt or of the answer; the tokens of one
    character share its place.
    """

    token: str
    token_id: int
    utf8: bytes
    logprob: float | None
    top: tuple[tuple[str, bytes, float], ...] = ()
    offset: int = 0

    def chat(self) -> dict[str, Any]:
        def entry(token: str, utf8: bytes, logprob: float | None) -> dict[str, Any]:
            return {"token": token, "logprob": logprob, "bytes": list(utf8)}

        own = entry(self.token, self.utf8, self.logprob)
        return own | {"top_logprobs": [entry(*top) for top in self.top]}


@dataclass(slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    accepted_tokens: int = 0  # of the answer, guessed right
    rejected_tokens: int = 0  # guessed wrong, and in no answer

    def payload(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.accepted_tokens,
                "rejected_prediction_tokens": self.rejected_tokens,
            },
        }


FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of the tool call at place `at`: id and name come first, then arguments."""

    at: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None

    def payload(self) -> dict[str, Any]:
        if self.id is None:
            return {"index": self.at, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.at, "id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Piece:
    """A step's new text of one choice, or a piece of a call instead; `logprobs` has one entry a
    token when asked for."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    call: CallDelta | None = None
    tokens: int = 0  # of this text, and how many of them a draft had guessed; where it is asked for
    guessed: int = 0
    rejected: int = 0  # guesses beside them that were wrong


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every chunk of one answer repeats."""

    id: str
    created: int
    model: str
    object: str
    fingerprint: str

    @classmethod
    def chat(cls, model: str, created: int, fingerprint: str, *, stream: bool) -> Envelope:
        name = "chat.completion.chunk" if stream else "chat.completion"
        return cls(f"chatcmpl-{secrets.token_hex(12)}", created, model, name, fingerprint)

    @classmethod
    def completion(cls, model: str, created: int, fingerprint: str) -> Envelope:
        name = "text_completion"
        return cls(f"cmpl-{secrets.token_hex(12)}", created, model, name, fingerprint)

    def wrap(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }


def chat_logprobs(entries: Iterable[TokenLogprob] | None) -> dict[str, Any] | None:
    if entries is None:
        return None
    return {"content": [entry.chat() for entry in entries], "refusal": None}


def chat_role(piece: Piece) -> dict[str, Any]:
    """What an answer that begins with this piece begins with: a call has null content before it."""
    return {"role": "assistant", "content": "" if piece.call is None else None}


def chat_delta(piece: Piece, role: dict[str, Any] | None = None) -> dict[str, Any]:
    """One choice of a chat chunk; the first of an answer carries its role."""
    delta = dict(role or {})
    if piece.call:
        delta["tool_calls"] = [piece.call.payload()]
    if piece.text:
        delta["content"] = piece.text
    return {
        "index": piece.index,
        "delta": delta,
        "logprobs": chat_logprobs(piece.logprobs),
        "finish_reason": piece.finish_reason,
    }


def whole_calls(deltas: Iterable[CallDelta]) -> list[dict[str, Any]]:
    """The calls that these pieces make up, as a whole answer lists them."""
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if delta.id is not None:
            function = {"name": delta.name, "arguments": delta.arguments}
            calls.append({"id": delta.id, "type": "function", "function": function})
        else:
            calls[delta.at]["function"]["arguments"] += delta.arguments
    return calls


def chat_choice(piece: Piece, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """One choice of a whole chat answer; null content when there are only calls."""
    content = piece.text if piece.text or not calls else None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message["tool_calls"] = calls
    return {
        "index": piece.index,
        "message": message,
        "logprobs": chat_logprobs(piece.logprobs),
        "finish_reason": piece.finish_reason,
    }


def completion_choice(piece: Piece) -> dict[str, Any]:
    """One choice of /v1/completions, whole or a chunk."""
    return {
        "index": piece.index,
        "text": piece.text,
        "logprobs": completion_logprobs(piece.logprobs),
        "finish_reason": piece.finish_reason,
    }


def completion_logprobs(entries: tuple[TokenLogprob, ...] | None) -> dict[str, Any] | None:
    """The four parallel lists of the older API; an echoed first token has nulls, as vLLM sends."""
    if entries is None:
        return None
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [
            {token: logprob for token, _, logprob in entry.top}
            if entry.logprob is not None
            else None
            for entry in entries
        ],
        "text_offset": [entry.offset for entry in entries],
    }
