"""A worker's own door: it refuses what the gateway refuses, since a browser reaches both.

Without a key the rule is `policies.loopback`'s: the worker listens on 127.0.0.1 and has no other
name. With one, whoever has it may ask from anywhere, and nobody else.
"""

from __future__ import annotations

import hmac

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from policies.loopback import foreign_header
from runtime.tracing import server_timing
from runtime.wire import Problem

OPEN_PATH = "/health"  # for what watches over the worker; without the key it tells less
STRANGER = "headgate.stranger"  # an extension of the scope: it came without the key

_QUOTED_CHARS = 100
_SCHEME = b"bearer "


class Doorway:
    """An application behind the check; it wraps no `send`, so that a stream pays nothing for it."""

    def __init__(self, app: ASGIApp, key: str | None = None) -> None:
        self._app = app
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._refusal(scope) if scope["type"] == "http" else None
        if problem is None:
            await self._app(scope, receive, send)
            return
        headers = {**problem.headers, **server_timing(scope)}
        answer = Response(problem.body(), problem.status, headers, media_type="application/json")
        await answer(scope, receive, send)

    def _refusal(self, scope: Scope) -> Problem | None:
        if self._key is None:
            foreign = foreign_header(scope["headers"], "localhost")
            return None if foreign is None else _foreign(*foreign)
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) == 1 and _bears(given[0], self._key):
            return None
        if scope["path"] == OPEN_PATH:
            scope.setdefault("extensions", {})[STRANGER] = True
            return None
        message = "a worker of Headgate asks for the key that runtime.key_env of its policy names"
        headers = {"www-authenticate": "Bearer"}
        return Problem(401, message, code="invalid_api_key", headers=headers)


def _bears(value: bytes, key: bytes) -> bool:
    scheme, given = value[: len(_SCHEME)].lower(), value[len(_SCHEME) :].strip()
    return hmac.compare_digest(given, key) and scheme == _SCHEME


def _foreign(name: str, value: str) -> Problem:
    shown = repr(value[:_QUOTED_CHARS])
    message = (
        f"the {name.title()} {shown} is not this machine; a worker answers to localhost, 127.0.0.1 "
        "and [::1], and to pages from there"
    )
    return Problem(403, message, code=f"{name}_not_allowed")
