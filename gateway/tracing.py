"""Which requests leave a trace, and where it goes: begins a trail, ends it, keeps it, sends it.

Knows the policy's `tracing`; how spans are made and sent is spans.py's and telemetry/otlp.py's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

from gateway.account import told_at_end
from gateway.call import ClientGone, RawHeaders
from gateway.fate import late
from gateway.phases import spent
from gateway.replica import Replica
from gateway.reply import Reply
from gateway.spans import shadow_spans, spans_of
from gateway.tallies import Tallies
from gateway.trace_ring import Ring
from gateway.trail import Hop, Trail, now
from policies.tracing import Always, Tracing
from runtime.wire import Problem
from telemetry.genai import LEAVES
from telemetry.otlp import Exporter
from telemetry.trace import SAMPLED, Span, begun, carried, new_span_id

log = logging.getLogger("headgate.gateway")

CODE_CHARS = 64  # of an error that a replica names
ASKING_MAX = 32  # traces at once that workers are asked to send after all

Ask = Callable[[Replica, str, str], Awaitable[object]]


class Tracer:
    """Of one gateway process."""

    def __init__(self, settings: Tracing, exporter: Exporter | None = None) -> None:
        self.settings = settings
        self.ring = Ring(settings.keep)
        self.exporter = exporter
        self.on = settings.keep > 0 or exporter is not None  # whether anybody will want spans
        self._asking: set[asyncio.Task[None]] = set()

    def exemplar(self, trail: Trail) -> str:
        """The trace's id, where it will be found by it."""
        sent = self.exporter is None or trail.flags & SAMPLED
        return trail.trace_id if sent else ""

    def told(self) -> dict[str, int]:
        """What became of the spans that were to be sent."""
        return self.exporter.told() if self.exporter is not None else {}

    def close(self) -> None:
        """Sends what is left."""
        if self.exporter is not None:
            self.exporter.close()

    def begin(
        self, request_id: str, path: str, headers: RawHeaders, began: float, read: float
    ) -> Trail:
        """A request has come: its first byte, and that byte was read; monotonic seconds."""
        trail = Trail(request_id, path, began, read)
        if self.on:
            self._join(trail, headers)
        return trail

    def _join(self, trail: Trail, headers: RawHeaders) -> None:
        """The client's trace goes on, or a new one begins."""
        parent, trail.tracestate = carried(headers)
        if parent is None:
            parent = begun(self.settings.share)
        trail.trace_id, trail.parent_id = parent.trace_id, parent.span_id
        trail.flags = parent.flags
        trail.span_id = new_span_id()

    def end(
        self, trail: Trail, reply: Reply, error: BaseException | None, tallies: Tallies, ask: Ask
    ) -> None:
        """It is over, and this ended it if anything did. `ask`: a path of a replica.

        Raises nothing: whoever asked has the answer."""
        try:
            self._end(trail, reply, error, tallies, ask)
        except Exception:
            log.exception("request %s: its trace is lost", trail.request_id)

    def _end(
        self, trail: Trail, reply: Reply, error: BaseException | None, tallies: Tallies, ask: Ask
    ) -> None:
        trail.ended = now() if trail.last is None else trail.last
        trail.status = reply.status
        trail.spoke, trail.seen_tokens = reply.pulse.first_at, reply.pulse.pieces
        trail.error = error_of(error, reply.status) or _failure(trail) or _told(trail, reply)
        if trail.service is not None:
            tally = tallies.of(trail.service.tier)
            tally.spend(spent(trail))
            if (ttft_s := trail.ttft_s) is not None:
                tally.latest.append((trail.at + trail.e2e_s, ttft_s, trail.tpot_s))
        tallies.tenants.ended(trail)
        tallies.attempted(trail.hops)
        if not self.on:
            return
        trail.close()
        trail.keep = self._worth(trail)
        self.ring.keep(trail)
        if self._is_sent(trail):
            self._send(trail, spans_of, trail.asked_of, ask)
            if trail.shadow is not None and trail.shadow.ended:
                self._send(trail, shadow_spans, (), ask)

    def end_shadow(self, trail: Trail, ask: Ask) -> None:
        """What went beside this request has ended, before it or after it."""
        shadow = trail.shadow
        assert shadow is not None, "it went beside a request"
        shadow.close()
        shadow.ended = now()
        if trail.ended and self._is_sent(trail):
            self._send(trail, shadow_spans, shadow.hops, ask)

    def _is_sent(self, trail: Trail) -> bool:
        return self.exporter is not None and bool(trail.keep or trail.flags & SAMPLED)

    def _send(
        self, trail: Trail, make: Callable[[Trail], list[Span]], hops: Sequence[Hop], ask: Ask
    ) -> None:
        """These spans of it, and of what workers know where they would send nothing themselves."""
        assert self.exporter is not None, "it is sent"
        if hops and not trail.flags & SAMPLED and len(self._asking) < ASKING_MAX:
            task = asyncio.create_task(_want(trail.trace_id, hops, ask))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        self.exporter.put(lambda: make(trail))

    def _worth(self, trail: Trail) -> Always | Literal[""]:
        """Why its trace is wanted whether it was sampled or not."""
        settings = self.settings
        always = settings.always
        if trail.arm and trail.arm != "baseline" and "canary" in always:
            return "canary"
        if trail.failed and "error" in always:
            return "error"
        if "late" in always and late(trail):
            return "late"
        return "slow" if trail.ended - trail.due > settings.slow_s and "slow" in always else ""


async def _want(trace_id: str, hops: Sequence[Hop], ask: Ask) -> None:
    """Workers of ours send their spans of a trace that turned out to be worth it."""
    for replica in {hop.replica.url: hop.replica for hop in hops}.values():
        if replica.kind == "headgate":
            await ask(replica, f"/traces/{trace_id}", "POST")


def _failure(trail: Trail) -> str:
    """Of an answer that told one inside its stream."""
    outcome = trail.hops[-1].outcome if trail.hops else "200"
    return "" if outcome.isdigit() or outcome == "left" else outcome


def _told(trail: Trail, reply: Reply) -> str:
    """Of a stream that came to its end, and in it says that this is none."""
    found = told_at_end(reply.recent) if reply.streaming else None
    if found is None:
        return ""
    status, error = found
    if trail.hops:
        trail.hops[-1].broke = True
    return str(error.get("code") or error.get("type") or status)[:CODE_CHARS]


def error_of(error: BaseException | None, status: int) -> str:
    """What `error.type` says; empty for an answer that came to its end."""
    if error is None:
        return "" if status < 400 else str(status)
    if isinstance(error, Problem):
        return error.code or str(error.status)
    if isinstance(error, ClientGone):
        return LEAVES
    return "stopped" if isinstance(error, asyncio.CancelledError) else type(error).__name__
