"""The first thing a request meets: a stranger is refused before anything is read of its body.

Where the policy has tenants, a stranger is who has no key of theirs; else, what did not come from
this machine, by the rule of `policies.loopback`.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import problems
from gateway.call import RawHeaders, request_id
from gateway.edge import Edge, Live
from gateway.reply import Reply
from policies.loopback import foreign_header
from runtime.wire import Problem

OPEN_PATH = "/health"  # for what watches over the gateway; without a key it tells less


class Doorway:
    """An application behind the check; it wraps no `send`, so that a stream pays nothing for it."""

    def __init__(self, app: ASGIApp, live: Live) -> None:
        self._app = app
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            problem = stranger(scope, self._live.edge)
            if problem is not None:
                await Reply(send, request_id(scope["headers"])).fail(problem)
                return
        await self._app(scope, receive, send)


def stranger(scope: Scope, edge: Edge) -> Problem | None:
    """Why this request may not come in; None where it may.

    With keys any Host and Origin will do: no page knows a key, nor does a browser send one by
    itself, so that neither a foreign page nor a rebound name gets further than anybody without.
    """
    if not edge.keys.required:
        return refusal(scope["headers"], edge.settings.host.lower())
    if scope["path"] == OPEN_PATH:
        return None
    try:
        edge.keys.tenant(scope["headers"])
    except Problem as problem:
        return problem
    return None


def refusal(headers: RawHeaders, host: str) -> Problem | None:
    """403 for a Host or an Origin that is not this machine."""
    match foreign_header(headers, host):
        case "host", value:
            return problems.host_not_allowed(value)
        case "origin", value:
            return problems.origin_not_allowed(value)
    return None
