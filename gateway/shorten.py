"""A request on its way through the policy's trimming, with the cuts of sessions.

The cut of a session is kept in the store, so that every gateway uses the same one, and found again
from the conversation itself where the store has forgotten it (gateway/trim.py). Sizes are counted
by the model's own tokenizer, message by message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import orjson

from cache.store import Store, StoreDown, key
from gateway import passages
from gateway.call import Call
from gateway.trim import UNCUT, Cut, Message, Trimmed, apply, mask_tool_output, trim
from policies.trimming import Cutting, Trim
from runtime.wire import parse_object

KEPT_S = 24 * 3600.0  # a cut outlives its session's last cut by this
TURN_TOKENS = 4  # what a template writes around a message, about
COUNTS_MAX = 65_536  # messages whose size is remembered
INLINE_CHARS = 2**16  # more text is counted off the event loop

Count = Callable[[str, str], int]  # model, text -> tokens


@dataclass(slots=True)
class Shortened:
    """Texts of which a part was left out, before and after, by what left it out."""

    tool_outputs: list[tuple[str, str]] = field(default_factory=list)
    passages: list[tuple[str, str]] = field(default_factory=list)

    @property
    def chars(self) -> int:
        return sum(len(before) for before, _ in (*self.tool_outputs, *self.passages))


@dataclass(slots=True)
class Totals:
    """What trimming did so far, in tokens; `net` is removed less again."""

    prompts: int = 0
    cut_prompts: int = 0
    cuts_moved: int = 0
    removed_tokens: int = 0
    again_tokens: int = 0

    def add(self, trimmed: Trimmed | None) -> None:
        self.prompts += 1
        if trimmed is None:
            return
        self.cut_prompts += trimmed.removed_tokens > 0
        self.cuts_moved += trimmed.moved
        self.removed_tokens += trimmed.removed_tokens
        self.again_tokens += trimmed.again_tokens

    def told(self) -> Mapping[str, int]:
        return {
            "prompts": self.prompts,
            "cut_prompts": self.cut_prompts,
            "cuts_moved": self.cuts_moved,
            "removed_tokens": self.removed_tokens,
            "again_tokens": self.again_tokens,
            "net_tokens": self.removed_tokens - self.again_tokens,
        }


class Shortener:
    """Trims calls by one policy. `count` tells a text's tokens for a model."""

    def __init__(self, settings: Trim, count: Count, store: Store, arm: str = "") -> None:
        """Arms of an experiment, which cut in different ways, keep their cuts apart."""
        self.settings = settings
        self.on = not settings.off
        self._kind = f"cut{arm}"
        self.totals = Totals()
        self._count = count
        self._store = store
        self._sizes: dict[tuple[str, int, int], int] = {}

    async def trim(self, call: Call, tenant: str, tier: str) -> tuple[Call, Trimmed | None]:
        """The call as it goes on, and what was left out of it, if anything."""
        messages = _readable(call.data.get("messages")) if self.on else None
        if messages is None:
            return call, None
        kept, documents, shortened = self._shorten_each(messages, call.data.get("documents"))
        cutting = self.settings.cutting(call.model, tier)
        trimmed = None
        # A token has at least a byte: a body below the budget needs no counting.
        if cutting.drop != "off" and len(call.body) > cutting.budget_tokens:
            trimmed = await self._cut(call, tenant, cutting, kept)
            kept = apply(kept, trimmed.cut) if trimmed else kept
        if shortened.chars:
            if shortened.chars > INLINE_CHARS:
                gone = await asyncio.to_thread(self._gone, call.model, shortened)
            else:
                gone = self._gone(call.model, shortened)
            trimmed = (trimmed or UNCUT).shortened(*gone)
        self.totals.add(trimmed)
        return _with(call, messages, kept, documents), trimmed

    def _shorten_each(
        self, messages: Sequence[Message], documents: Any
    ) -> tuple[Sequence[Message], Any, Shortened]:
        """Tool outputs and passages: message by message, so that each is the same in every turn."""
        most, chosen = self.settings.tool_output_chars, self.settings.passages
        done = Shortened()
        if most is not None:
            masked = [mask_tool_output(message, most) for message in messages]
            done.tool_outputs += _changed(messages, masked)
            messages = masked
        if chosen is None:
            return messages, documents, done
        if isinstance(documents, list) and all(isinstance(one, dict) for one in documents):
            whole = documents
            documents = passages.shorten_documents(whole, _question(messages), chosen)
            if len(documents) < len(whole):
                texts = orjson.dumps(whole).decode(), orjson.dumps(documents).decode()
                done.passages.append(texts)
        chosen_of = [_shorten_passages(message, chosen) for message in messages]
        done.passages += _changed(messages, chosen_of)
        return chosen_of, documents, done

    def _gone(self, model: str, shortened: Shortened) -> tuple[int, int]:
        """Tokens that were left out of tools' outputs, and of passages."""
        outputs, chosen = (
            sum(self._size(model, before) - self._size(model, after) for before, after in texts)
            for texts in (shortened.tool_outputs, shortened.passages)
        )
        return max(0, outputs), max(0, chosen)  # what says that something is missing has tokens too

    async def _cut(
        self, call: Call, tenant: str, cutting: Cutting, messages: Sequence[Message]
    ) -> Trimmed | None:
        tools = call.data.get("tools")
        fixed_text = orjson.dumps(tools).decode() if tools else ""
        if len(call.body) > INLINE_CHARS:
            sizes, fixed = await asyncio.to_thread(self._measure, call.model, messages, fixed_text)
        else:
            sizes, fixed = self._measure(call.model, messages, fixed_text)
        if fixed + sum(sizes) <= cutting.budget_tokens:
            return None
        name = key(self._kind, tenant, call.model, *_session(call, messages))
        known = await self._known(name, messages)
        trimmed = trim(messages, sizes, fixed, cutting, known)
        if trimmed.cut != known:
            await self._keep(name, messages, trimmed.cut)
        return trimmed

    def _measure(
        self, model: str, messages: Sequence[Message], fixed_text: str
    ) -> tuple[list[int], int]:
        fixed = self._size(model, fixed_text) if fixed_text else 0
        sizes = [self._size(model, _text(message)) + TURN_TOKENS for message in messages]
        return sizes, fixed + TURN_TOKENS

    def _size(self, model: str, text: str) -> int:
        name = (model, len(text), hash(text))
        known = self._sizes.get(name)
        if known is None:
            known = self._count(model, text)
            if len(self._sizes) >= COUNTS_MAX:
                self._sizes.clear()
            self._sizes[name] = known
        return known

    async def _known(self, name: str, messages: Sequence[Message]) -> Cut | None:
        """The session's last cut, if it was made of this very conversation."""
        try:
            value = await self._store.get(name)
        except StoreDown:
            return None
        if value is None:
            return None
        chain, *places = orjson.loads(value)
        cut = Cut(*places)
        return cut if chain == _chain(messages, cut) else None

    async def _keep(self, name: str, messages: Sequence[Message], cut: Cut) -> None:
        value = [_chain(messages, cut), cut.start, cut.end, cut.inner_start, cut.inner_end]
        try:
            await self._store.put(name, orjson.dumps(value), KEPT_S)
        except StoreDown:
            return  # it is found again from the conversation


def _changed(before: Sequence[Message], after: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """The texts of messages that are not what they were."""
    for was, now in zip(before, after, strict=True):
        if now is not was:
            yield _text(was), _text(now)


def _readable(messages: Any) -> Sequence[Message] | None:
    """None for messages that are wrong: they are the replica's to refuse."""
    if isinstance(messages, list) and all(isinstance(one, dict) for one in messages):
        return messages
    return None


def _with(call: Call, before: Any, messages: Sequence[Message], documents: Any) -> Call:
    """The call with other messages; every field of its body that is not trimmed stays."""
    same_documents = documents is call.data.get("documents")
    same = len(messages) == len(before)
    if same and same_documents and all(a is b for a, b in zip(messages, before, strict=True)):
        return call
    change = {"messages": list(messages)}
    if not same_documents:
        change["documents"] = documents
    body = orjson.dumps({**parse_object(call.body), **change})
    return replace(call, body=body, data={**call.data, **change})


def _shorten_passages(message: Message, chosen: Any) -> Message:
    content = message.get("content")
    if message.get("role") != "user" or not isinstance(content, str):
        return message
    text = passages.shorten_text(content, chosen)
    return message if text == content else {**message, "content": text}


def _question(messages: Sequence[Message]) -> str:
    """What documents are chosen by: the conversation's first question, so that they stay the same
    in later turns."""
    for message in messages:
        if message.get("role") == "user":
            return _text(message)
    return ""


def _text(message: Message) -> str:
    """Everything of a message that a template may write."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "\n".join(part for part in parts if isinstance(part, str))
    text = content if isinstance(content, str) else ""
    more = {
        name: message[name]
        for name in ("tool_calls", "function_call", "reasoning_content", "reasoning")
        if message.get(name)
    }
    return text + orjson.dumps(more).decode() if more else text


def _session(call: Call, messages: Sequence[Message]) -> tuple[str, ...]:
    """What names the conversation: the client's own name of it, or how it begins."""
    named = call.session(("prompt_cache_key",))
    if named is not None:
        return "named", named
    first = next((at for at, one in enumerate(messages) if one.get("role") == "user"), 0)
    return "begins", _digest(messages[: first + 1])


def _chain(messages: Sequence[Message], cut: Cut) -> str:
    return _digest(messages[: max(cut.end, cut.inner_end)])


def _digest(messages: Sequence[Message]) -> str:
    return blake2b(orjson.dumps(messages), digest_size=16).hexdigest()
