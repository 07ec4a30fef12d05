"""The first thing a request meets: a stranger is refused before anything is read of its body.

Where the policy has tenants, a stranger is who has no key of theirs; else, what did not come from
this machine, by the rule of `policies.loopback`.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import problems
from gateway.call import RawHeaders, request_id
from gateway.edge import Edge, Live
from gateway.keys import ANYONE, TENANT, Known, refuse_stranger
from gateway.listener import COMING
from gateway.phases import SERVER_TIMING, whole_time
from gateway.reply import Reply
from policies.loopback import foreign_header
from runtime.wire import Problem

OPEN_PATH = "/health"  # for what watches over the gateway; without a key it tells less

METRICS_PATH = "/metrics"  # of all tenants together: the operator's, and our own fleet's

STEERED = ("/admin/", "/gate/")  # have a check of their own (gateway/admin.py)
PAGE = "/console"  # has nothing of the gateway in it: what it shows, it asks of /admin/ with a key


class Doorway:
    """An application behind the check; it wraps no `send`, so that a stream pays nothing for it."""

    def __init__(self, app: ASGIApp, live: Live, paths: Mapping[str, ASGIApp]) -> None:
        """What `paths` have goes there at once, past the application and its routes."""
        self._app = app
        self._paths = paths
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                tenant = visitor(scope, self._live.edge)
            except Problem as problem:
                await refuse(scope, send, problem)
                return
            # Who reads it awaits nothing before, and so goes by the same edge.
            scope["extensions"][TENANT] = tenant
            await self._paths.get(scope["path"], self._app)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


async def refuse(scope: Scope, send: Send, problem: Problem) -> None:
    """The answer to a request that comes to no endpoint, and so leaves no trace."""
    reply = Reply(send, request_id(scope["headers"]))
    reply.more.append((SERVER_TIMING, whole_time(scope["extensions"][COMING].began)))
    await reply.fail(problem)


def visitor(scope: Scope, edge: Edge) -> Known | None:
    """Whose request this is; None for a stranger at a path that is open, or has a check of
    its own. Raises Problem 401, 403.

    With keys any Host and Origin will do: no page knows a key, nor does a browser send one by
    itself, so that neither a foreign page nor a rebound name gets further than anybody without.
    """
    if not edge.keys.required:
        refuse_foreign(scope["headers"], edge.settings.host.lower())
        return ANYONE
    if scope["path"] == METRICS_PATH and (admin := edge.settings.admin.key_env) is not None:
        if not edge.keys.is_fleet(scope["headers"]):
            refuse_stranger(scope["headers"], admin, keys=True)
        return None
    try:
        return edge.keys.tenant(scope["headers"])
    except Problem:
        path = scope["path"]
        if path in (OPEN_PATH, PAGE) or path.startswith((*STEERED, f"{PAGE}/")):
            return None
        if scope["path"] == METRICS_PATH and edge.keys.is_fleet(scope["headers"]):
            return None
        raise


def refuse_foreign(headers: RawHeaders, host: str) -> None:
    """Raises Problem 403 for a Host or an Origin that is not this machine."""
    match foreign_header(headers, host):
        case "host", value:
            raise problems.host_not_allowed(value)
        case "origin", value:
            raise problems.origin_not_allowed(value)
