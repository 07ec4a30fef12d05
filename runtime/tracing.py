"""What becomes of one request inside a worker, as spans below the gateway's.

    SERVER   llm_request                     from its arrival to its last byte
      INTERNAL engine.tokenize               parsed, templated, tokenized
      INTERNAL engine.queue, engine.prefill, engine.decode     of each choice

Moments are seconds of the engine's clock, which is the monotonic one. The engine's thread notes
chunks and guesses of a sequence on its track; spans are made when somebody asks, or when they are
to be sent.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence as Many
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from policies.tracing import Tracing
from runtime.inbox import Order
from runtime.wire import Problem
from telemetry.genai import LEAVES, asked_of, counted, latencies
from telemetry.otlp import Exporter
from telemetry.phases import TIMING_HEADER, Phases
from telemetry.trace import (
    EVENTS_MAX,
    SAMPLED,
    Context,
    Event,
    Kind,
    Span,
    begun,
    carried,
    new_span_id,
)

if TYPE_CHECKING:
    from runtime.sequence import Sequence

SERVICE = "headgate-runtime"
WANTED_MAX = 256  # traces whose spans are to be sent once they have ended
_READ = {one.encode() for one in (TIMING_HEADER, "x-request-id")}
ASKED = ("/v1/chat/completions", "/v1/completions")  # what asks for an answer of the model
VISIT = "headgate.visit"  # of a request that has come to its endpoint, in its scope
now = time.monotonic


@dataclass(slots=True)
class Track:
    """One sequence, as the engine's thread notes it."""

    sequence: Sequence | None = None
    chunks: list[tuple[float, int]] = field(default_factory=list)  # when computed, tokens
    guesses: list[tuple[float, int, int]] = field(default_factory=list)  # when, guessed, accepted

    def chunk(self, at: float, tokens: int) -> None:
        """Tokens of the prompt are computed."""
        if len(self.chunks) < EVENTS_MAX:
            self.chunks.append((at, tokens))

    def guess(self, at: float, guessed: int, accepted: int) -> None:
        """A step has verified guesses."""
        if len(self.guesses) < EVENTS_MAX:
            self.guesses.append((at, guessed, accepted))


@dataclass(frozen=True, slots=True)
class Told:
    """What stays of a track: when, how much. None for what has not happened."""

    arrived: float
    admitted: float | None
    first: float | None
    last: float | None
    prompt: int
    cached: int
    answer: int
    preemptions: int
    chunks: Many[tuple[float, int]]
    guesses: Many[tuple[float, int, int]]


class Visit:
    """One request, from its arrival on."""

    __slots__ = (
        "at", "began", "context", "ended", "error", "fingerprint", "model", "request_id", "sent",
        "span_id", "status", "tells", "told", "tracestate", "tracks",
    )  # fmt: skip

    def __init__(self, context: Context, given: dict[bytes, bytes], tracestate: str) -> None:
        self.began = now()
        self.at = time.time()
        self.context = context
        self.span_id = new_span_id()
        self.tells = TIMING_HEADER.encode() in given
        self.request_id = given.get(b"x-request-id", b"").decode("latin-1")
        self.tracestate = tracestate
        self.model = self.fingerprint = ""
        self.tracks: list[Track] = []
        self.told: list[Told] = []
        self.status = 200
        self.error = ""
        self.ended = 0.0
        self.sent = False  # its spans are on their way to the collector

    def tracked(self, orders: Many[Order]) -> list[Order]:
        """The same orders, on which the engine notes what becomes of them."""
        self.tracks = [Track() for _ in orders]
        return [replace(one, track=track) for one, track in zip(orders, self.tracks, strict=True)]

    def failed(self, problem: Problem) -> None:
        """The client is told so."""
        self.status, self.error = problem.status, problem.code or str(problem.status)

    def left(self) -> None:
        """The client has gone."""
        self.error = LEAVES

    def phases(self) -> Phases:
        """Of the first sequence, as far as it has come; until now where it has not come on."""
        sequence = self.tracks[0].sequence if self.tracks else None
        admitted = sequence.times.admitted if sequence else None
        if sequence is None or admitted is None:
            return Phases(now() - self.began)
        first = sequence.times.first_token
        if first is None:
            return Phases(admitted - self.began, now() - admitted)
        last = sequence.times.last_token or first
        return Phases(admitted - self.began, first - admitted, last - first)

    def comment(self) -> bytes:
        """For a gateway that asks how long it took so far; nothing for others."""
        return self.phases().comment() if self.tells else b""

    def last(self) -> None:
        """The last bytes go now. Noted before they do: whoever waits for them may be given the core
        at once."""
        self.ended = now()

    def close(self) -> None:
        """It is over; what the engine works with is let go."""
        self.ended = self.ended or now()
        self.told = [_told(track) for track in self.tracks if track.sequence is not None]
        self.tracks = []


def _told(track: Track) -> Told:
    sequence = track.sequence
    assert sequence is not None, "it was submitted"
    times = sequence.times
    return Told(
        times.arrived, times.admitted, times.first_token, times.last_token,
        sequence.prompt_tokens, sequence.cached, sequence.answer_tokens, sequence.preemptions,
        track.chunks, track.guesses,
    )  # fmt: skip


def server_timing(scope: Mapping[str, Any]) -> dict[str, str]:
    """The header, of a refusal to what asks the model, wherever it was refused."""
    if scope["path"] not in ASKED:
        return {}
    visit: Visit | None = scope.get(VISIT)
    return {"server-timing": (visit.phases() if visit else Phases()).header()}


class Tracer:
    """The requests of one worker: joins them to their callers' traces, keeps and sends them."""

    def __init__(self, settings: Tracing, exporter: Exporter | None = None) -> None:
        self.settings = settings
        self.exporter = exporter
        self._kept: deque[Visit] = deque(maxlen=settings.keep)
        self._wanted: deque[str] = deque(maxlen=WANTED_MAX)

    def begin(self, headers: Many[tuple[bytes, bytes]]) -> Visit:
        """A request has come."""
        given = {name: value for name, value in headers if name in _READ}
        context, state = carried(headers)
        return Visit(context or begun(self.settings.share), given, state)

    def end(self, visit: Visit) -> None:
        """Its last byte is out, or there will be none."""
        visit.close()
        self._kept.append(visit)
        context = visit.context
        if context.flags & SAMPLED or context.trace_id in self._wanted:
            self._send(visit)

    def spans(self, trace_id: str) -> list[dict[str, Any]]:
        """What is still known of a trace; `root` is the caller's span."""
        return [
            {**span.payload(), "root": visit.context.span_id}
            for visit in self._kept
            if visit.context.trace_id == trace_id
            for span in spans_of(visit)
        ]

    def want(self, trace_id: str) -> int:
        """Sends a trace that was not sampled, also what of it is still under way; how many requests
        of it have ended."""
        if self.exporter is None:
            return 0
        if trace_id not in self._wanted:
            self._wanted.append(trace_id)
        ended = [one for one in self._kept if one.context.trace_id == trace_id]
        for visit in ended:
            self._send(visit)
        return len(ended)

    def close(self) -> None:
        """Sends what is left."""
        if self.exporter is not None:
            self.exporter.close()

    def _send(self, visit: Visit) -> None:
        if self.exporter is not None and not visit.sent:  # others of its trace may be wanted, too
            visit.sent = True
            self.exporter.put(lambda: spans_of(visit))


# ---- spans --------------------------------------------------------------------------------------


def spans_of(visit: Visit) -> list[Span]:
    """The root first; the same visit gives the same spans."""
    root = _span(visit, "llm_request", "SERVER", visit.began, visit.ended, _facts(visit))
    root.span_id, root.parent_id = visit.span_id, visit.context.span_id
    if visit.error and visit.error != LEAVES and not 400 <= visit.status < 500:
        root.status = "ERROR"
    inside = [
        span for number, told in enumerate(visit.told) for span in _inside(visit, number, told)
    ]
    for number, span in enumerate(inside, start=1):
        span.span_id = f"{(int(visit.span_id, 16) + number) % 2**64:016x}"
    return [root, *inside]


def _facts(visit: Visit) -> dict[str, Any]:
    found: dict[str, Any] = {
        **asked_of(visit.model, visit.request_id),
        "headgate.config.fingerprint": visit.fingerprint,
        "http.response.status_code": visit.status,
        "error.type": visit.error,
    }
    told = visit.told
    if told:
        found |= counted(
            sum(one.prompt for one in told), sum(one.answer for one in told),
            sum(one.cached for one in told),
        )  # fmt: skip
        found["headgate.preemptions"] = sum(one.preemptions for one in told)
        first = told[0]
        if first.admitted is not None and first.first is not None:
            last = first.last or first.first
            found |= latencies(
                whole_s=visit.ended - visit.began,
                first_token_s=first.first - visit.began,
                queue_s=first.admitted - first.arrived,
                prefill_s=first.first - first.admitted,
                decode_s=last - first.first,
            )
    return {name: value for name, value in found.items() if value != ""}


def _inside(visit: Visit, number: int, told: Told) -> Iterator[Span]:
    """Of one choice. What was under way when it ended, ended with it."""
    choice = {"headgate.choice": number}
    if not number:
        yield _span(visit, "engine.tokenize", "INTERNAL", visit.began, told.arrived, {})
    admitted = visit.ended if told.admitted is None else told.admitted
    yield _span(visit, "engine.queue", "INTERNAL", told.arrived, admitted, choice)
    if told.admitted is None:
        return
    first = visit.ended if told.first is None else told.first
    computed = {"headgate.prompt_tokens": told.prompt, "headgate.cached_tokens": told.cached}
    prefill = _span(visit, "engine.prefill", "INTERNAL", admitted, first, choice | computed)
    prefill.events = [
        Event("prefill_chunk", _at(visit, at), {"headgate.tokens": tokens})
        for at, tokens in told.chunks
    ]
    yield prefill
    if told.first is None:
        return
    guessed = sum(one[1] for one in told.guesses)
    said: dict[str, Any] = {"headgate.answer_tokens": told.answer}
    if told.guesses:
        said["headgate.guessed_tokens"] = guessed
        said["headgate.accepted_tokens"] = sum(one[2] for one in told.guesses)
    last = told.last or told.first
    decode = _span(visit, "engine.decode", "INTERNAL", first, last, choice | said)
    decode.events = [
        Event("verify", _at(visit, at), {"headgate.guessed": many, "headgate.accepted": right})
        for at, many, right in told.guesses
    ]
    yield decode


def _at(visit: Visit, moment: float) -> float:
    """In seconds since 1970."""
    return visit.at + (moment - visit.began)


def _span(
    visit: Visit, name: str, kind: Kind, began: float, ended: float, told: dict[str, Any]
) -> Span:
    return Span(
        visit.context.trace_id,
        "",
        visit.span_id,
        name,
        SERVICE,
        kind,
        _at(visit, began),
        _at(visit, max(began, ended)),
        attributes=told,
        flags=visit.context.flags,
        tracestate=visit.tracestate,
    )
