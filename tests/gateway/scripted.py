"""An upstream that says a known answer as engines do, and breaks where a test wants it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gateway.replica import Replica
from policies.discovery import Kind
from tests.gateway.world import DONE, Answer, Fake, Peer, events

TOKENS = ["The ", "quick ", "brown ", "fox ", "jumps ", "over ", "it", "."]
TEXT = "".join(TOKENS)
PROMPT_TOKENS = 9
ASKED: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "Say it."}],
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0,
}


@dataclass
class Engine:
    """Says TOKENS, from where the request has it already; `bodies` are the requests that came."""

    name: str
    takes_open_turn: bool = True
    tells_ids: bool = True
    fingerprint: str | None = None  # in each chunk
    text: list[str] = field(default_factory=lambda: list(TOKENS))
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def say(self, peer: Peer, *, until: int | None = None, ending: bool = True) -> None:
        """The stream, up to token `until`; without its `ending` it stays open."""
        body = json.loads(peer.request.body)
        self.bodies.append(body)
        if body.get("continue_final_message") and not self.takes_open_turn:
            error = {"message": "the last message may not be an assistant's", "code": "bad_turn"}
            await peer.json({"error": error}, status=400)
            return
        said, prompt_tokens, first = self._said(body)
        await peer.head()
        await peer.chunk(self.chunk({"role": "assistant", "content": ""}))
        tell = self.tells_ids and "x-headgate-token-ids" in peer.request.headers
        for at in range(said, len(self.text) if until is None else until):
            told = f": token-ids {100 + at}\n\n".encode() if tell else b""
            await peer.chunk(told + self.chunk({"content": self.text[at]}))
            await asyncio.sleep(0)
        if until is None:
            await peer.chunk(self.chunk({}, finish_reason="stop"))
            await peer.chunk(self.usage(prompt_tokens, len(self.text) - first))
        if until is None and ending:
            await peer.chunk(DONE)
            await peer.end()

    async def __call__(self, peer: Peer) -> None:
        await self.say(peer)

    def _said(self, body: dict[str, Any]) -> tuple[int, int, int]:
        """Tokens that need not be said; prompt tokens; tokens that are no answer to be counted."""
        if begun := body.get("begun_token_ids"):
            assert begun == [100 + at for at in range(len(begun))]
            return len(begun), PROMPT_TOKENS, 0
        if body.get("continue_final_message"):
            assert body["add_generation_prompt"] is False
            last = body["messages"][-1]
            assert last["role"] == "assistant"
            said = next(n for n in range(9) if "".join(TOKENS[:n]) == last["content"])
            return said, PROMPT_TOKENS + said, said
        return 0, PROMPT_TOKENS, 0

    def chunk(self, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": None} | more
        return self._event({"choices": [choice]})

    def usage(self, prompt: int, answer: int) -> bytes:
        counts = {"prompt_tokens": prompt, "completion_tokens": answer}
        return self._event({"choices": [], "usage": counts | {"total_tokens": prompt + answer}})

    def _event(self, more: dict[str, Any]) -> bytes:
        head = {"id": f"chatcmpl-{self.name}", "object": "chat.completion.chunk", "created": 17}
        if self.fingerprint is not None:
            head["system_fingerprint"] = self.fingerprint
        return b"data: " + json.dumps(head | {"model": "m"} | more).encode() + b"\n\n"


def cut(engine: Engine, after: int) -> Answer:
    """The connection is reset behind so many tokens."""

    async def answer(peer: Peer) -> None:
        await engine.say(peer, until=after)
        await asyncio.sleep(0.01)  # what was sent is read before the reset
        peer.abort()

    return answer


def stall(engine: Engine, after: int) -> Answer:
    """Nothing more comes behind so many tokens."""

    async def answer(peer: Peer) -> None:
        await engine.say(peer, until=after)
        await asyncio.Event().wait()

    return answer


def garble(engine: Engine, after: int) -> Answer:
    """An event that is no JSON comes behind so many tokens, and the rest behind it."""

    async def answer(peer: Peer) -> None:
        await engine.say(peer, until=after)
        await peer.chunk(b'data: {"id":"chatcmpl-1","choices":[{"delta":{"cont\n\n')
        await peer.chunk(engine.chunk({"content": "nonsense"}) + DONE)
        await peer.end()

    return answer


def refuse(status: int, code: str, **headers: str) -> Answer:
    """An error in OpenAI's shape, always."""

    async def answer(peer: Peer) -> None:
        error = {"message": code, "type": "invalid_request_error", "param": None, "code": code}
        await peer.json({"error": error}, status=status, **headers)

    return answer


def in_turn(*answers: Answer) -> Answer:
    """One after the other, and the last one from then on."""
    rest = list(answers)

    async def answer(peer: Peer) -> None:
        await (rest.pop(0) if len(rest) > 1 else rest[0])(peer)

    return answer


def fleet(primary: Fake, *others: Fake, kind: Kind = "vllm") -> list[Replica]:
    """The first one is asked first, whatever runs there."""
    return [
        Replica(one.url, own=True, kind=kind, weight=1000.0 if one is primary else 1.0)
        for one in (primary, *others)
    ]


@dataclass(frozen=True)
class Heard:
    """A streamed answer as its client has it."""

    text: str
    ids: set[str]
    usage: dict[str, int] | None
    error: dict[str, Any] | None
    resumed: dict[str, Any] | None
    roles: int
    done: int


def heard(body: bytes) -> Heard:
    """Every event must be JSON, but for the terminator, which must come last."""
    found: Iterable[Any] = events(body)
    chunks = [one for one in found if isinstance(one, dict)]
    choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
    assert body.endswith(DONE)
    return Heard(
        "".join(choice["delta"].get("content") or "" for choice in choices),
        {chunk["id"] for chunk in chunks if "id" in chunk},
        next((chunk["usage"] for chunk in chunks if chunk.get("usage")), None),
        next((chunk["error"] for chunk in chunks if "error" in chunk), None),
        next((chunk["headgate"]["resumed"] for chunk in chunks if "headgate" in chunk), None),
        sum("role" in choice["delta"] for choice in choices),
        body.count(b"data: [DONE]"),
    )
