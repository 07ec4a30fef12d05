"""Traces by the W3C's `traceparent` (level 2) and OpenTelemetry's span: ids, flags, shapes.

Knows neither services nor how spans travel; `otlp.py` sends them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, Literal

SAMPLED, RANDOM = 0x01, 0x02  # bits of the flags; others may be set as well
EVENTS_MAX = 128  # of one span, as OpenTelemetry's SDKs have it
STATE_MAX_BYTES = 4096  # of `tracestate`; longer ones do not go on
TRACEPARENT, TRACESTATE, BAGGAGE = "traceparent", "tracestate", "baggage"

Kind = Literal["INTERNAL", "SERVER", "CLIENT"]
Status = Literal["UNSET", "OK", "ERROR"]

# 00-trace-parent-flags; a later version may say more behind them.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16
_rng = random.Random()  # noqa: S311  # ids have to differ, not to be secret


@dataclass(slots=True)
class Context:
    """A place in a trace, as a request carries it. `span_id` "" is the trace's beginning."""

    trace_id: str
    span_id: str = ""
    flags: int = RANDOM

    @property
    def sampled(self) -> bool:
        return bool(self.flags & SAMPLED)


def joined(traceparent: str | None) -> Context | None:
    """What a request says that it belongs to; None where it says nothing, or nothing valid."""
    if traceparent is None:
        return None
    found = _TRACEPARENT.fullmatch(traceparent.strip())
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (more and version == "00") or trace_id == _NO_TRACE:
        return None
    return None if span_id == _NO_SPAN else Context(trace_id, span_id, int(flags, 16))


def carried(headers: Iterable[tuple[bytes, bytes]]) -> tuple[Context | None, str]:
    """What a request's headers say that it belongs to, and its `tracestate`, of which several are
    one list. Two `traceparent` are none; without one the state is of nothing, and dropped."""
    parents, states = [], []
    for name, value in headers:
        if name == b"traceparent":
            parents.append(value)
        elif name == b"tracestate":
            states.append(value)
    if len(parents) != 1:
        return None, ""
    context = joined(parents[0].decode("latin-1"))
    state = b",".join(states) if context is not None else b""
    return context, state.decode("ascii") if _is_plain(state) else ""


def _is_plain(value: bytes) -> bool:
    return len(value) <= STATE_MAX_BYTES and value.isascii() and value.decode("ascii").isprintable()


def begun(share: float = 0.0) -> Context:
    """A new trace, of which so many are sampled."""
    bits = _rng.getrandbits(128) or 1
    sampled = SAMPLED if share >= 1 or _rng.random() < share else 0
    return Context(f"{bits:032x}", "", RANDOM | sampled)


def named(*parts: object) -> Context:
    """The same place in the same trace for the same parts; sampled."""
    digest = blake2b(repr(parts).encode("utf-8", "replace"), digest_size=24).hexdigest()
    return Context(digest[:32], digest[32:], SAMPLED)


def new_span_id() -> str:
    return f"{_rng.getrandbits(64) or 1:016x}"


def traceparent(trace_id: str, span_id: str, flags: int) -> str:
    """For the request that the span stands for. Bits that we do not know are not passed on."""
    return f"00-{trace_id}-{span_id}-{flags & (SAMPLED | RANDOM):02x}"


@dataclass(slots=True)
class Event:
    """A moment inside a span."""

    name: str
    at_s: float
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Span:
    """One piece of work. Seconds since 1970."""

    trace_id: str
    span_id: str
    parent_id: str  # "": the trace begins here
    name: str
    service: str
    kind: Kind
    start_s: float
    end_s: float
    status: Status = "UNSET"
    attributes: Mapping[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    flags: int = 0
    tracestate: str = ""
    message: str = ""  # why it failed
    links: list[Context] = field(default_factory=list)  # spans that it has to do with besides

    def payload(self) -> dict[str, Any]:
        """As JSON, without what all spans of a trace share."""
        told = asdict(self)
        for name in ("trace_id", "flags", "tracestate", "message"):
            del told[name]
        if not self.links:
            del told["links"]
        if self.message:
            told["message"] = self.message
        return told
