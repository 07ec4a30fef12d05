"""A worker's own door: it refuses what the gateway refuses, since a browser reaches both.

The rule is `policies.loopback`'s; a worker listens on 127.0.0.1 and has no other name.
"""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from policies.loopback import foreign_header
from runtime.wire import Problem

_QUOTED_CHARS = 100


class Doorway:
    """An application behind the check; it wraps no `send`, so that a stream pays nothing for it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        foreign = foreign_header(scope["headers"], "localhost") if scope["type"] == "http" else None
        if foreign is None:
            await self._app(scope, receive, send)
            return
        problem = _refusal(*foreign)
        answer = Response(problem.body(), problem.status, media_type="application/json")
        await answer(scope, receive, send)


def _refusal(name: str, value: str) -> Problem:
    shown = repr(value[:_QUOTED_CHARS])
    message = (
        f"the {name.title()} {shown} is not this machine; a worker answers to localhost, 127.0.0.1 "
        "and [::1], and to pages from there"
    )
    return Problem(403, message, code=f"{name}_not_allowed")
