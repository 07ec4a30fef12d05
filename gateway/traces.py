"""The paths at which traces are read: `/admin/traces` and `/admin/traces/{id}`.

Who may read them, admin.py says; where they are found, kept.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.types import Scope

from gateway import problems
from gateway.edge import Live
from gateway.kept import Kept
from gateway.query import number, query

TRACES_PATH = "/admin/traces"
USUAL, MOST = 50, 1000

Answer = tuple[int, Mapping[str, Any]]
Act = Callable[[Scope, bytes], Awaitable[Answer]]


def traces(kept: Kept) -> Act:
    """The latest ones first; with `slow=1` those that took longest. And of how many gateway
    processes they are."""

    async def act(scope: Scope, _body: bytes) -> Answer:
        asked = query(scope)
        limit = number(asked, "limit", USUAL, MOST)
        found, by = await kept.traces(limit, slow=asked.get("slow", "") in ("1", "true"))
        return 200, {"traces": found, "processes": by.payload()}

    return act


def trace(live: Live, kept: Kept) -> Act:
    """One, by the id of trace, request, receipt or answer."""

    async def act(scope: Scope, _body: bytes) -> Answer:
        name = scope["path_params"]["id"]
        found, by = await kept.trace(name)
        if found is None:
            raise problems.trace_not_found(name, live.edge.tracer.settings.keep, by.where())
        return 200, found

    return act
