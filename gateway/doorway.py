"""Who may ask at all: while there are no keys, only what runs on this machine by its own will.

Loopback alone keeps no browser out: any page can post here across sites, and by DNS rebinding (a
name of its own that resolves to 127.0.0.1) read the answers. Both show in Host and Origin, which no
page can forge.
"""

from __future__ import annotations

import functools
import ipaddress
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import problems
from gateway.call import RawHeaders, request_id
from gateway.reply import Reply
from runtime.wire import Problem

LOCAL_MAX_BYTES = 300  # a name of 253, a scheme and a port; longer ones are neither read nor kept


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
    """403 for a Host or an Origin that is not this machine. HTTP/1.0 may lack a Host."""
    for name, value in headers:
        if name == b"host":
            if not is_local(value, host):
                return problems.host_not_allowed(value.decode("latin-1"))
        elif name == b"origin" and not is_local(value, host, origin=True):
            return problems.origin_not_allowed(value.decode("latin-1"))
    return None


def is_local(value: bytes, host: str, *, origin: bool = False) -> bool:
    """Whether `localhost:8080`, or as an origin `http://[::1]:3000`, names a loopback address."""
    return len(value) <= LOCAL_MAX_BYTES and _is_local(value, host, origin)


@functools.lru_cache(maxsize=256)
def _is_local(value: bytes, host: str, origin: bool) -> bool:
    text = value.decode("latin-1").strip()
    try:
        parts = urlsplit(text if origin else f"http://{text}")
        name, _ = parts.hostname, parts.port  # the port raises ValueError for what is none
    except ValueError:
        return False
    bare = parts.scheme in ("http", "https") and not (
        parts.path or parts.query or parts.fragment or "@" in parts.netloc
    )
    if name is None or not bare:
        return False
    if name in ("localhost", host):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
