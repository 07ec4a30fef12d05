"""What an answer looked like on its way to a client: its times, its tokens and its faults.

Knows SSE and OpenAI's shapes as far as that; keeps of the text only its end and a digest, and tells
neither. Sits on an answer only while a rollout runs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import orjson
from starlette.types import Send

from gateway.call import CHAT_PATH
from gateway.edge import Asked, Edge
from gateway.journal import Journal
from gateway.onlooker import Onlooker
from gateway.reply import Outgoing
from runtime.wire import KEEP_ALIVE, Problem
from telemetry import Observation, Outcome

WHOLE_MAX_BYTES = 2**20  # of a body that is no stream
LOOP_CHARS, PERIOD_CHARS = 240, 40  # so long an end of an answer, made of so short a piece
UNREADABLE_MIN, UNREADABLE_SHARE = 4, 0.05  # of an answer's characters
UNREADABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")
LEFT = 499  # as nginx has it: the client left
NOTHING: Mapping[str, Any] = {}


class Speech:
    """What was said, as far as its faults show."""

    def __init__(self) -> None:
        self.chars = 0
        self.end = ""
        self.acts = False  # it calls tools, or thinks: no text is no fault then
        self._unreadable = 0
        self._digest = blake2b(digest_size=16)

    def add(self, text: str) -> None:
        self.chars += len(text)
        self.end = (self.end + text)[-LOOP_CHARS:]
        self._unreadable += len(UNREADABLE.findall(text))
        self._digest.update(text.encode("utf-8", "surrogatepass"))

    @property
    def digest(self) -> bytes:
        """The same for the same text."""
        return self._digest.digest()

    def fault(self) -> str:
        """What is wrong with a whole answer; "" where nothing shows."""
        if not self.chars:
            return "" if self.acts else "empty"
        garbage = self._unreadable >= max(UNREADABLE_MIN, UNREADABLE_SHARE * self.chars)
        return "garbage" if garbage else "looped" if looped(self.end) else ""


def looped(end: str) -> bool:
    """Whether a text's end of LOOP_CHARS only repeats a short piece."""
    if len(end) < LOOP_CHARS:
        return False
    return any(end[period:] == end[:-period] for period in range(1, PERIOD_CHARS + 1))


class Watch(Onlooker):
    """Sits on the ways out of one answer, and reads what goes by."""

    def __init__(self, send: Send, outgoing: Outgoing | None) -> None:
        super().__init__(send, outgoing)
        self.when_relayed: Callable[[], None] = lambda: None
        self.relayed = False  # something of the answer itself has gone to the client
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.speech = Speech()
        self.pieces = 0  # with text: about as many tokens
        self.first_at: float | None = None
        self.last_at = 0.0
        self.gap_max_s: float | None = None
        self.fingerprint = ""
        self.finish_reason = ""
        self.resumed = False  # another replica went on with it
        self.usage: Mapping[str, Any] = NOTHING
        self._journal = Journal()
        self._whole = b""

    # ---- the ways out ---------------------------------------------------------------------------

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = dict(message["headers"])
        elif (body := message.get("body")) and body != KEEP_ALIVE:
            self._note_relayed()
            if b"event-stream" not in self.headers.get(b"content-type", b""):
                self._whole += body[: WHOLE_MAX_BYTES - len(self._whole)]
        await super().__call__(message)

    def stream(self, chunk: bytes) -> bool:
        if not self.relayed:
            self._note_relayed()
        in_time = super().stream(chunk)
        now = time.monotonic()
        for _, payload, _ in self._journal.take(chunk):
            if payload is not None:
                self._read(payload, now)
        return in_time

    def _note_relayed(self) -> None:
        self.relayed = True
        self.when_relayed()

    # ---- what goes by ---------------------------------------------------------------------------

    def _read(self, payload: Mapping[str, Any], now: float | None) -> None:
        """One chunk, or with no moment a whole answer."""
        fingerprint = payload.get("system_fingerprint")
        if isinstance(fingerprint, str):
            self.fingerprint = fingerprint
        told = payload.get("headgate")
        self.resumed = self.resumed or (isinstance(told, dict) and "resumed" in told)
        usage, choices = payload.get("usage"), payload.get("choices")
        if isinstance(usage, dict):
            self.usage = usage
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, dict):
                continue
            reason = choice.get("finish_reason")
            if isinstance(reason, str):
                self.finish_reason = reason
            said = choice.get("delta") or choice.get("message") or choice
            if isinstance(said, dict):
                self._hear(said, now)

    def _hear(self, said: Mapping[str, Any], now: float | None) -> None:
        text = said.get("content") or said.get("text")
        acts = any(said.get(name) for name in ("tool_calls", "reasoning_content", "reasoning"))
        self.speech.acts = self.speech.acts or acts
        if isinstance(text, str) and text:
            self.speech.add(text)
        elif not acts:
            return
        if now is None:
            return
        self.pieces += 1
        if self.first_at is None:
            self.first_at = now
        else:
            self.gap_max_s = max(self.gap_max_s or 0.0, now - self.last_at)
        self.last_at = now

    def end(self) -> None:
        """Reads an answer that was no stream."""
        if self._whole and self.status == 200:
            with suppress(orjson.JSONDecodeError):
                payload = orjson.loads(self._whole)
                if isinstance(payload, dict):
                    self._read(payload, None)


# ---- as an observation --------------------------------------------------------------------------


def observation(
    edge: Edge, asked: Asked, watch: Watch, arm: str, cluster: str, now: float
) -> Observation:
    """A request that has just ended well, or been answered by an error. It began when its answer
    was due, as its trace has it."""
    e2e_s = time.monotonic() - asked.came
    watch.end()
    call, usage = asked.call, watch.usage
    counted = _count(usage, "completion_tokens")
    tokens = watch.pieces if counted is None and call.stream else counted
    tpot_s = None
    if watch.first_at is not None and tokens is not None and tokens > 1:
        tpot_s = (watch.last_at - watch.first_at) / (tokens - 1)
    fault = watch.speech.fault() if watch.status == 200 and _most(call.data) != 0 else ""
    ttft_s, per_token_s = _targets(edge, asked)
    receipt = edge.routing.receipts.get(_named(watch, b"x-headgate-receipt"))
    prompt_tokens = _count(usage, "prompt_tokens")
    if prompt_tokens is None and receipt is not None:
        prompt_tokens = receipt.prompt_tokens
    broken = watch.resumed and arm == "candidate"
    return Observation(
        id=asked.reply.request_id,
        source="live",
        arm=arm,
        cluster=cluster,
        tier=_named(watch, b"x-headgate-tier"),
        tenant=asked.tenant.name,
        turn=_turn(asked),
        at_s=now - e2e_s,
        outcome="error" if broken else _outcome(watch.status),
        status=watch.status,
        problem="it broke, and another replica went on" if broken else fault,
        ttft_s=None if watch.first_at is None else watch.first_at - asked.came,
        tpot_s=tpot_s,
        gap_max_s=watch.gap_max_s,
        e2e_s=e2e_s,
        ttft_target_s=ttft_s,
        tpot_target_s=per_token_s,
        prompt_tokens=prompt_tokens,
        cached_tokens=_count(usage.get("prompt_tokens_details"), "cached_tokens"),
        completion_tokens=tokens,
        max_tokens=_most(call.data),
        accepted_tokens=_count(
            usage.get("completion_tokens_details"), "accepted_prediction_tokens"
        ),
        rejected_tokens=_count(
            usage.get("completion_tokens_details"), "rejected_prediction_tokens"
        ),
        finish_reason=watch.finish_reason,
        fingerprint=watch.fingerprint,
        replica=receipt.attempts[-1].url if receipt is not None and receipt.attempts else "",
        scores={"bad_output": 1.0 if fault else 0.0} if watch.status == 200 else {},
    )


def failed(seen: Observation, problem: Problem) -> Observation:
    """The same request, ended by a problem; in the middle of an answer, too."""
    return replace(
        seen, outcome=_outcome(problem.status), status=problem.status,
        problem=problem.code or str(problem), scores={},
    )  # fmt: skip


def _outcome(status: int) -> Outcome:
    if status == LEFT:
        return "cancelled"
    if status == 504:
        return "timeout"
    if status == 429 or 400 <= status < 500:
        return "refused"
    return "error" if status >= 500 else "ok"


def _count(counts: Any, name: str) -> int | None:
    value: object = counts.get(name) if isinstance(counts, Mapping) else None
    return value if isinstance(value, int) else None


def _most(data: Mapping[str, Any]) -> int | None:
    most: object = data.get("max_completion_tokens") or data.get("max_tokens")
    return most if isinstance(most, int) else None


def _turn(asked: Asked) -> int:
    messages = asked.call.data.get("messages") if asked.call.path == CHAT_PATH else None
    if not isinstance(messages, list):
        return 0
    said = [one for one in messages if isinstance(one, dict) and one.get("role") == "user"]
    return max(0, len(said) - 1)


def _named(watch: Watch, name: bytes) -> str:
    return watch.headers.get(name, b"").decode("latin-1")


def _targets(edge: Edge, asked: Asked) -> tuple[float | None, float | None]:
    """What was promised, in seconds."""
    try:
        service = edge.tiers.tier(asked.call, asked.tenant)
    except Problem:
        return None, None
    ttft_ms, tpot_ms = service.ttft_ms, service.tpot_ms
    return (
        None if ttft_ms is None else ttft_ms / 1000,
        None if tpot_ms is None else tpot_ms / 1000,
    )
