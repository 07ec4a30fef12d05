"""One request's moments on its way through the gateway, noted as it goes: a trace's cheap half.

Moments are seconds of the monotonic clock. What is made of them, phases and spans, is made when the
request has ended (phases.py, spans.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from telemetry.genai import LEAVES, REQUEST, stops_of
from telemetry.phases import Phases
from telemetry.trace import RANDOM, TRACEPARENT, TRACESTATE, new_span_id, traceparent

if TYPE_CHECKING:
    from gateway.call import Call
    from gateway.receipt import Decision, Receipt
    from gateway.replica import Replica
    from gateway.tiers import Service
    from gateway.trim import Trimmed
    from gateway.usage import Usage

HEAD_BYTES = 256  # of an answer, in which its id stands
STOPS, STOP_CHARS = 4, 64  # sequences, of each
MODEL_CHARS = 256  # of a name that a client asks for
_ID = re.compile(rb'"id" ?: ?"([^"\\]{1,128})"')
_NUMBERS = (int, float)
now = time.monotonic


class Hop:
    """One request to one replica."""

    __slots__ = (
        "_flags", "_trace_id", "_tracestate", "began", "broke", "decision", "ended", "first",
        "head", "outcome", "replica", "span_id", "told",
    )  # fmt: skip

    def __init__(self, trail: Trail, replica: Replica, decision: Decision) -> None:
        # Not the trail itself, which has its hops: such a circle is left to the collector.
        self._trace_id, self._flags = trail.trace_id, trail.flags
        self._tracestate = trail.tracestate
        self.replica = replica
        self.decision = decision
        self.span_id = new_span_id() if trail.trace_id else ""
        self.began = now()
        self.first: float | None = None  # its first event, or the head of a whole answer
        self.ended: float | None = None
        self.head = b""  # of its answer
        self.outcome = "left"  # as `Tried` has it
        self.broke = False  # its answer began, and the replica failed in the middle of it
        self.told: Phases | None = None  # by the replica, of its own share of the time

    def mark(self, headers: MutableMapping[str, str]) -> None:
        """Lets the replica's spans join this one."""
        if self._trace_id:
            headers[TRACEPARENT] = traceparent(self._trace_id, self.span_id, self._flags)
            if self._tracestate:
                headers[TRACESTATE] = self._tracestate
            else:
                headers.pop(TRACESTATE, None)

    def answered(self, told: Phases | None, head: bytes) -> None:
        """The answer has begun."""
        self.first = now()
        if told is not None:
            self.told = told
        self.head = head[:HEAD_BYTES]

    def end(self, *, failed: bool = False) -> None:
        """The request has left the replica, which failed, or did not; twice is once."""
        if self.ended is None:
            self.broke = failed and self.first is not None
            self.ended = now()


@dataclass(slots=True)
class Interval:
    """When a part of the way began and ended; 0 where the request did not come so far."""

    began: float = 0.0
    ended: float = 0.0

    def __enter__(self) -> None:
        self.began = now()

    def __exit__(self, *_: object) -> None:
        self.ended = now()

    @property
    def s(self) -> float:
        """So far, where it is under way: a stream's head may go while its request waits."""
        return (self.ended or now()) - self.began if self.began else 0.0


NEVER = Interval()


class Trail:
    """One request."""

    __slots__ = (
        "admit", "arm", "asked", "at", "began", "done", "download", "due", "ended", "error",
        "flags", "head", "hops", "keep", "last", "model", "parent_id", "path", "prompt", "queue",
        "read", "receipt", "request_id", "seen_tokens", "service", "shadow", "span_id", "spoke",
        "status", "stream", "tenant", "trace_id", "tracestate", "trim", "trimmed", "usage",
    )  # fmt: skip

    def __init__(self, request_id: str, path: str, began: float, read: float) -> None:
        self.request_id = request_id
        self.path = path
        self.began = began  # the first byte of the request came to its socket
        self.due = began  # later by what its client took to send it (arrival.Coming)
        self.read = read  # and was read; of several pieces, the last
        self.at = time.time() - (now() - began)  # the same, since 1970
        self.trace_id = ""  # "": nothing but phases is wanted of it
        self.parent_id = ""
        self.span_id = ""
        self.flags = RANDOM
        self.tracestate = ""
        self.model = ""
        self.tenant = ""
        self.stream = False
        self.asked: Mapping[str, Any] = {}  # what the body says
        self.service: Service | None = None
        self.arm = ""
        self.trim = Interval()
        self.trimmed: Trimmed | None = None
        self.prompt = Interval()  # templated, tokenized, hashed
        self.admit = self.queue = NEVER  # of limits, of a place: whoever gives it has them
        self.receipt: Receipt | None = None
        self.hops: list[Hop] = []
        self.head = b""  # of an answer that is no stream
        self.spoke: float | None = None  # a stream's first piece that says something was here
        self.seen_tokens = 0  # of a stream, about: a piece is one
        self.done: float | None = None  # the replica has said everything
        self.last: float | None = None  # the last byte has gone to the client
        self.download = NEVER  # what lay there at the end was on its way to a client that lagged
        self.ended = 0.0
        self.status = 0
        self.error = ""
        self.usage: Usage | None = None
        self.keep = ""  # why its trace is sent whether sampled or not
        self.shadow: Trail | None = None  # the same request, as a candidate answered it for nobody

    # ---- noted on the way -----------------------------------------------------------------------

    def received(self, due: float, read: float) -> None:
        """It has been read, or nobody waits for the rest of it."""
        self.due, self.read = due, read

    def parsed(self, call: Call) -> None:
        """What is asked for is known."""
        self.model = call.model
        self.stream = call.stream
        self.asked = call.data

    def close(self) -> None:
        """It is over; nothing is kept of what was asked but how to answer, as numbers and where to
        stop: no other text, and nothing that is as large as a client likes."""
        asked = self.asked
        kept: dict[str, Any] = {
            name: value
            for name, value in asked.items()
            if name in REQUEST and type(value) in _NUMBERS
        }
        if stops := stops_of(asked.get("stop")):
            kept["stop"] = [one[:STOP_CHARS] for one in stops[:STOPS]]
        self.asked = kept
        self.model = self.model[:MODEL_CHARS]

    def beside(self) -> Trail:
        """Of the same request, asked once more beside it: its hops are spans below this root."""
        at = now()
        shadow = self.shadow = Trail(self.request_id, self.path, at, at)
        shadow.trace_id, shadow.span_id = self.trace_id, self.span_id
        shadow.flags, shadow.tracestate = self.flags, self.tracestate
        shadow.model, shadow.stream, shadow.asked = self.model, self.stream, self.asked
        shadow.arm = "shadow"
        return shadow

    def hop(self, replica: Replica, receipt: Receipt) -> Hop:
        """It is being sent there."""
        self.receipt = receipt
        hop = Hop(self, replica, receipt.decisions[-1])
        self.hops.append(hop)
        return hop

    def whole(self, body: bytes) -> None:
        """An answer that is no stream is about to go."""
        self.done = now()
        self.head = body[:HEAD_BYTES]

    def said(self, told: Phases | None) -> None:
        """The replica has said everything, and perhaps how long that took it."""
        self.done = now()
        if told is not None and self.hops:
            self.hops[-1].told = told

    # ---- read afterwards ------------------------------------------------------------------------

    @property
    def way(self) -> Sequence[Hop]:
        """The attempts since it was admitted. A candidate's came before, where the baseline was
        admitted in its stead."""
        hops = self.hops
        admitted = self.queue.ended or self.admit.ended
        if hops and hops[0].began < admitted:
            return [one for one in hops if one.began >= admitted]
        return hops

    @property
    def asked_of(self) -> Sequence[Hop]:
        """Every request to a replica, those that a candidate answered for nobody counted in."""
        return self.hops if self.shadow is None else [*self.hops, *self.shadow.hops]

    @property
    def answered(self) -> Hop | None:
        return answered(self.way)

    @property
    def failed(self) -> bool:
        """It is neither whole, nor given up by its client, nor refused for what the client did."""
        refused = 400 <= self.status < 500 or is_refusal(self.error)
        return bool(self.error) and self.error != LEAVES and not refused

    @property
    def ttft_s(self) -> float | None:
        """Of a stream: since it was due, until its first piece that says something was here."""
        if not self.stream or self.spoke is None:
            return None
        return self.spoke - self.due

    @property
    def tpot_s(self) -> float | None:
        """Of a stream whose tokens were counted."""
        usage, spoke, done = self.usage, self.spoke, self.done
        if not self.stream or usage is None or usage.answer_tokens < 2:
            return None
        return None if spoke is None or done is None else (done - spoke) / (usage.answer_tokens - 1)

    @property
    def e2e_s(self) -> float:
        return self.ended - self.began

    @property
    def answer_id(self) -> str:
        """As the answer names itself; "" where it has none."""
        hop = self.answered
        found = _ID.search(self.head or (hop.head if hop is not None else b""))
        return found.group(1).decode("utf-8", "replace") if found else ""

    def at_s(self, moment: float) -> float:
        """A moment in seconds since 1970."""
        return self.at + (moment - self.began)


def answered(way: Sequence[Hop]) -> Hop | None:
    """The attempt whose answer the client has: the first good one, with which later ones go on;
    else the last one that had any."""
    last = None
    for hop in way:
        if hop.first is not None:
            last = hop
            if hop.outcome == "200":
                break
    return last


def is_refusal(why: str) -> bool:
    """Whether a status says that the client was wrong."""
    return why.startswith("4") and why.isdigit()
