"""`GET /console`: the page that shows what this gateway does. Files as they lie in `console/`.

Knows files and headers only. The page holds no data: what it shows, it asks of `/admin/`, with the
key that its reader types. Nothing in it comes from elsewhere, and its policy forbids that it could.
"""

from __future__ import annotations

from pathlib import Path

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway import problems
from gateway.call import request_id
from gateway.reply import Reply

FILES = Path(__file__).with_name("console")
PAGE = "index.html"
KINDS = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
GUARDS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        b"require-trusted-types-for 'script'; trusted-types 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),  # after an upgrade no part of an older page goes on
)


def routes() -> list[Route]:
    """The page and its parts, read once when the program starts."""
    parts = {one.name: Part(one) for one in sorted(FILES.iterdir()) if one.suffix in KINDS}
    return [
        Route("/console", parts[PAGE]),
        Route("/console/", Aside()),
        *(Route(f"/console/{name}", part) for name, part in parts.items() if name != PAGE),
    ]


class Aside:
    """To the page, whose links are as seen from where it lies."""

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        reply = Reply(send, request_id(scope["headers"]))
        await reply.whole(308, [(b"location", b"../console")], b"")


class Part:
    """One file."""

    def __init__(self, file: Path) -> None:
        self._body = file.read_bytes()
        self._kind = KINDS[file.suffix]

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        reply = Reply(send, request_id(scope["headers"]))
        if scope["method"] not in ("GET", "HEAD"):
            await reply.fail(problems.wrong_method(scope["method"], scope["path"], "GET, HEAD"))
            return
        await reply.whole(200, [(b"content-type", self._kind), *GUARDS], self._body)
