"""The paths at which traces are read: `/admin/traces` and `/admin/traces/{id}`.

Who may read them, admin.py says. One trace is told with what our own workers remember of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.types import Scope

from gateway import problems
from gateway.edge import Live
from gateway.query import number, query
from gateway.trace_ring import told
from gateway.trail import Trail

TRACES_PATH = "/admin/traces"
USUAL, MOST = 50, 1000

Answer = tuple[int, Mapping[str, Any]]
Act = Callable[[Scope, bytes], Awaitable[Answer]]


def traces(live: Live) -> Act:
    """The latest ones first; with `slow=1` those that took longest."""

    async def act(scope: Scope, _body: bytes) -> Answer:
        asked = query(scope)
        limit = number(asked, "limit", USUAL, MOST)
        slow = asked.get("slow", "") in ("1", "true")
        return 200, {"traces": live.edge.tracer.ring.recent(limit, slow=slow)}

    return act


def trace(live: Live) -> Act:
    """One, by the id of trace, request, receipt or answer."""

    async def act(scope: Scope, _body: bytes) -> Answer:
        name = scope["path_params"]["id"]
        tracer = live.edge.tracer
        found = tracer.ring.trail(name)
        if found is None:
            raise problems.trace_not_found(name, tracer.settings.keep)
        whole = told(found)
        whole["spans"] += await _of_workers(live, found)
        return 200, whole

    return act


async def _of_workers(live: Live, trail: Trail) -> list[Any]:
    """The spans that workers of ours keep of it; nothing of those that are gone."""
    replicas = {hop.replica.url: hop.replica for hop in trail.hops if hop.replica.own}
    path = f"/traces/{trail.trace_id}"
    pool = live.edge.pool
    answers = await asyncio.gather(*(pool.ask(one, path) for one in replicas.values()))
    own = {hop.span_id for hop in trail.hops}  # a trace may hold other requests, too
    spans = [span for answer in answers if answer for span in answer.get("spans", ())]
    return [span for span in spans if span.get("root") in own]
