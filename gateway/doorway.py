"""The first thing a request meets: what did not come from this machine is refused.

The rule is `policies.loopback`'s.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import problems
from gateway.call import RawHeaders, request_id
from gateway.reply import Reply
from policies.loopback import foreign_header
from runtime.wire import Problem


class Doorway:
    """An application behind the check; it wraps no `send`, so that a stream pays nothing for it."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._host = host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            problem = refusal(scope["headers"], self._host)
            if problem is not None:
                await Reply(send, request_id(scope["headers"])).fail(problem)
                return
        await self._app(scope, receive, send)


def refusal(headers: RawHeaders, host: str) -> Problem | None:
    """403 for a Host or an Origin that is not this machine."""
    match foreign_header(headers, host):
        case "host", value:
            return problems.host_not_allowed(value)
        case "origin", value:
            return problems.origin_not_allowed(value)
    return None
