"""How an answer that was cut is asked for again, and how the second stream becomes the first. Pure.

By tokens: our own workers go on behind them, exactly where they are made of the same. By text:
vLLM, SGLang and ours take what was said as an open assistant's turn (`continue_final_message`).
Again: any server says a deterministic answer from its beginning, and what the client has is left
out, as long as it is the same.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import orjson

from gateway.call import CHAT_PATH, Call
from gateway.journal import MIXED, Journal
from policies.discovery import Kind

# With one of these, an answer is more than its text, or its form depends on all of it.
NOT_PLAIN = (
    "tools", "functions", "logprobs", "top_logprobs", "structured_outputs", "guided_json",
    "guided_regex", "guided_choice", "guided_grammar", "echo", "audio", "best_of",
    "begun_token_ids",
)  # fmt: skip


class Way(Enum):
    TOKENS = "tokens"
    TEXT = "text"
    AGAIN = "again"


def resumable(call: Call) -> bool:
    """Whether a stream of this call is text, of one choice, and nothing else."""
    data = call.data
    form = data.get("response_format")
    plain_form = form is None or (isinstance(form, dict) and form.get("type") == "text")
    plain = all(_is_off(data.get(name)) for name in NOT_PLAIN)
    one = data.get("n") in (None, 1) and (call.path == CHAT_PATH or _is_one(data.get("prompt")))
    return call.stream and plain and plain_form and one


def _is_off(value: Any) -> bool:
    return value is None or value is False or value == []  # a logprobs of 0 asks for some


def _is_one(prompt: Any) -> bool:
    return isinstance(prompt, str) or (
        isinstance(prompt, list) and all(type(one) is int for one in prompt)
    )


def ways(kind: Kind, call: Call, journal: Journal) -> list[Way]:
    """How a replica of this kind can go on, best first."""
    if not journal.text:
        return [Way.AGAIN]  # nothing has been said yet
    found: list[Way] = []
    if kind == "headgate" and journal.exact and journal.ids:
        found.append(Way.TOKENS)
    if kind != "openai" and (call.path == CHAT_PATH or isinstance(call.data.get("prompt"), str)):
        found.append(Way.TEXT)
    if call.data.get("temperature") == 0 or call.data.get("seed") is not None:
        found.append(Way.AGAIN)
    return found


def continuation(call: Call, journal: Journal, way: Way) -> bytes:
    """The body that asks for the rest."""
    if way is Way.AGAIN:
        return call.body
    body = orjson.loads(call.body)
    if way is Way.TOKENS:
        body["begun_token_ids"] = journal.ids
        return orjson.dumps(body)
    if call.path != CHAT_PATH:
        body["prompt"] += journal.said
    elif body.get("continue_final_message"):
        last = body["messages"][-1]
        last["content"] = f"{last.get('content') or ''}{journal.said}"
    else:
        body["messages"].append({"role": "assistant", "content": journal.said})
    if call.path == CHAT_PATH:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    for name in ("max_completion_tokens", "max_tokens"):
        if type(body.get(name)) is int:
            body[name] = max(1, body[name] - journal.chunks)
    return orjson.dumps(body)


class Diverged(Exception):
    """An answer that was to be the same again is another one."""


class Splice:
    """Makes the chunks of the second stream those of the first."""

    def __init__(self, journal: Journal, way: Way) -> None:
        self._journal = journal
        self._way = way
        self._said_tokens = journal.chunks
        self._known = journal.said if way is Way.AGAIN else ""  # still to be left out
        self._declared = False

    def chunk(self, chunk: dict[str, Any]) -> dict[str, Any] | None:
        """The chunk for the client, None for one that says nothing new. Raises Diverged."""
        if "error" in chunk:
            return chunk
        chunk |= self._journal.head
        worth = "usage" in chunk and chunk["usage"] is not None
        if worth and self._way is Way.TEXT:
            _count_once(chunk["usage"], self._said_tokens)
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta")
            if delta is not None and self._journal.opened:
                delta.pop("role", None)
            holder, name = (choice, "text") if delta is None else (delta, "content")
            holder[name] = self._leave_out(holder.get(name) or "")
            if choice.get("finish_reason") is not None and self._known:
                raise Diverged("the same answer ended earlier")
            worth = worth or bool(holder[name]) or choice.get("finish_reason") is not None
        if not worth:
            return None
        if not self._declared:
            self._declared = True
            exact = self._way is Way.TOKENS and self._is_of_the_same(chunk)
            chunk["headgate"] = {"resumed": {"by": self._way.value, "exact": exact}}
        return chunk

    def _is_of_the_same(self, chunk: dict[str, Any]) -> bool:
        """Whether whoever says it is made of what has said all before; else nobody is from now."""
        same: bool = chunk.get("system_fingerprint") == self._journal.fingerprint
        if not same:
            self._journal.fingerprint = MIXED
        return same

    def _leave_out(self, text: str) -> str:
        known = self._known
        if not known:
            return text
        length = min(len(known), len(text))
        if text[:length] != known[:length]:
            raise Diverged("the same answer went another way")
        self._known = known[length:]
        return text[length:]


def _count_once(usage: dict[str, Any], said_tokens: int) -> None:
    """What was said counts as answer, not as prompt; the sum is the replica's, the split is by the
    chunks that came."""
    prompt, answer = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is int and type(answer) is int:
        moved = min(said_tokens, prompt)
        usage["prompt_tokens"], usage["completion_tokens"] = prompt - moved, answer + moved
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and type(cached := details.get("cached_tokens")) is int:
            details["cached_tokens"] = min(cached, prompt - moved)  # of the prompt, no more
