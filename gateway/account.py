"""One request as this gateway's counts have it: filled while it goes on, closed at its end.

Knows moments, counts and how it ended; knows no text. What all requests come to is meters.py's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import orjson

from gateway.call import CHAT_PATH, Call, ClientGone
from gateway.retries import error_in_band
from gateway.token_ledger import Entry
from runtime.wire import Problem
from telemetry import Outcome

if TYPE_CHECKING:
    from gateway.meters import Meters
    from gateway.prompt import Prompt
    from gateway.reply import Reply
    from gateway.resume import Opened
    from gateway.tiers import Service
    from gateway.trim import Trimmed
    from gateway.usage import Usage

log = logging.getLogger("headgate.gateway")

Arm = Literal["baseline", "candidate"]
CLIENTS_FAULT = range(400, 500)
DEADLINE = "deadline_exceeded"  # the code of an error: it came too late
BROKEN = b'data: {"error"'  # a replica's stream that ends in an error


class Account:
    """Around the answer to one request by one arm; `with` it, and its end is counted."""

    __slots__ = (
        "_meters", "arm", "began", "call", "charged", "marked", "prompt", "read", "replica",
        "reply", "rescued", "resumed", "served", "service", "status", "streamed", "strict",
        "trace_id", "trimmed", "usage",
    )  # fmt: skip

    def __init__(
        self,
        meters: Meters,
        arm: Arm,
        call: Call,
        reply: Reply,
        began: float,
        read: float,
        served: Callable[[], bool],
    ) -> None:
        """`began`: since when an answer is due, and `read`: when the request was read, monotonic
        seconds. `served`: whether any replica has named the model."""
        self._meters = meters
        self.arm = arm
        self.call = call
        self.reply = reply
        self.began = began
        self.read = read
        self.served = served
        self.service: Service | None = None
        self.trimmed: Trimmed | None = None
        self.prompt: Prompt | None = None
        self.replica = ""
        self.status = 200
        self.usage: Usage | None = None
        self.streamed: int | None = None  # tokens that came in the stream, where they are told
        self.marked: tuple[int, int] | None = None  # guesses in it, right and wrong ones, likewise
        self.charged: int | None = None  # to the tenant's limits
        self.resumed = False  # another replica went on: what it read is not the prompt alone
        self.strict = False  # the other arm answers instead of its failing
        self.rescued = False  # and does
        self.trace_id = ""  # of a trace that is kept

    def __enter__(self) -> Account:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.rescued = self.strict and error is not None and not self.reply.started
        try:
            self._meters.ended(self, self.outcome(error), time.monotonic())
        except Exception:  # what became of the request is not for whoever counts to change
            log.exception("request %s could not be counted", self.reply.request_id)

    def outcome(self, error: BaseException | None) -> Outcome:
        """How it ended, by what ended it, or by the replica's own status."""
        if error is None:
            told = told_at_end(self.reply.recent)
            return outcome_of(told[0] if told is not None else self.status)
        if isinstance(error, ClientGone | asyncio.CancelledError):
            return "cancelled"
        return outcome_of(error.status) if isinstance(error, Problem) else "error"

    def answered(self, answer: Opened) -> None:
        """A replica's answer begins."""
        self.replica = answer.attempt.replica.url
        self.status = answer.status

    def relayed(self, answer: Opened) -> None:
        """The whole answer has gone to the client."""
        self.streamed = answer.told_tokens
        self.marked = answer.told_guesses
        self.resumed = answer.resumes > 0

    @property
    def trace(self) -> tuple[str, float] | None:
        """For an exemplar."""
        return (self.trace_id, time.time()) if self.trace_id else None

    def entry(self) -> Entry:
        """Its line in the token ledger."""
        prompt, usage, trimmed = self.prompt, self.usage, self.trimmed
        exact = prompt is not None and prompt.exact and not self.resumed
        counted = prompt.tokens if prompt is not None and exact else None
        removed = trimmed.removed_tokens if trimmed is not None else 0
        received = trimmed.before_tokens if trimmed is not None else None
        if received is None and prompt is not None:
            received = prompt.tokens + removed
        if usage is None:
            return Entry(received=received, trimmed=removed, counted=counted)
        return Entry(
            received=received,
            trimmed=removed,
            counted=counted,
            templated=usage.prompt_tokens,
            cached=usage.cached_tokens,
            accepted=usage.accepted_tokens,
            rejected=usage.rejected_tokens,
            emitted=usage.answer_tokens,
            streamed=self.streamed,
            marked_accepted=self.marked[0] if self.marked is not None else None,
            marked_rejected=self.marked[1] if self.marked is not None else None,
            billed=usage.total_tokens,
            charged=self.charged,
            allowed=allowed(self.call),
        )


def told_at_end(recent: Iterable[bytes]) -> tuple[int, Mapping[str, Any]] | None:
    """Status and error that a stream tells in its last pieces, as a worker does when a deadline
    passes after the first token; None where it tells none."""
    said = b"".join(recent)
    at = said.find(BROKEN)
    found = error_in_band(said[at:]) if at >= 0 else None
    if found is None:
        return None
    error: Mapping[str, Any] = orjson.loads(found[1])["error"]
    return (504 if error.get("code") == DEADLINE else found[0]), error


def outcome_of(status: int) -> Outcome:
    if status == 504:
        return "timeout"
    if status in CLIENTS_FAULT:
        return "refused"
    return "error" if status >= 500 else "ok"


def allowed(call: Call) -> int | None:
    """Tokens of all its answers together, at most; None where the request names no limit."""
    data: Mapping[str, Any] = call.data
    most = data.get("max_completion_tokens") or data.get("max_tokens")
    choices = data.get("n") or 1
    if type(most) is not int or type(choices) is not int:
        return None
    prompts = data.get("prompt") if call.path != CHAT_PATH else None
    many = isinstance(prompts, list) and prompts and not isinstance(prompts[0], int)
    return most * choices * (len(prompts) if many and prompts is not None else 1)
