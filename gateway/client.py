"""Requests to replicas over kept-alive connections. Knows URLs and TLS; knows no policy.

A client of our own, because a general one costs more per request than the whole gateway may.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from functools import cache
from urllib.parse import quote, urlsplit

from gateway.connection import Connection
from gateway.response import Broken, Response

KEEP_ALIVE_S = 30.0  # an idle connection is kept this long


class Unreachable(Broken):
    """No connection to a replica could be made: nothing of the request was sent."""


class Origin:
    """Where a base URL leads, and the connections that lie idle there."""

    __slots__ = ("host", "host_header", "idle", "port", "prefix", "tls", "url")

    def __init__(self, url: str, tls: ssl.SSLContext | None) -> None:
        parts = urlsplit(url)
        host = parts.hostname or ""
        self.url = url
        self.host = host if host.isascii() else host.encode("idna").decode()
        self.tls = (tls or default_tls()) if parts.scheme == "https" else None
        self.port = parts.port or (80 if self.tls is None else 443)
        named = f"[{self.host}]" if ":" in self.host else self.host
        self.host_header = named if parts.port is None else f"{named}:{self.port}"
        self.prefix = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=")
        self.idle: list[Connection] = []


@cache
def default_tls() -> ssl.SSLContext:
    """Certificates are checked against the system's authorities, or those of SSL_CERT_FILE."""
    return ssl.create_default_context()


class Client:
    """The connections of one pool of replicas. Without a limit: the gateway limits its requests."""

    def __init__(
        self,
        connect_timeout_s: float,
        keep_alive_s: float = KEEP_ALIVE_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._keep_alive_s = keep_alive_s
        self._tls = tls
        self._origins: dict[str, Origin] = {}
        self._connections: set[Connection] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False

    async def send(
        self,
        method: str,
        url: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes = b"",
        *,
        fresh: bool = False,
    ) -> Response:
        """The answer from its headers on, of `path` below the base `url`.

        Raises Unreachable, Stale (never over a `fresh` connection) and Failed. Cancelled, it closes
        the connection.
        """
        origin = self._origins.get(url)
        if origin is None:
            origin = self._origins[url] = Origin(url, self._tls)
        head = head_of(method, origin, path, headers, len(body))
        connection = None if fresh else self._idle(origin)
        if connection is None:
            connection = await self._connect(origin)
        return await connection.ask(head, body)

    async def close(self) -> None:
        """Closes all connections, those in use too."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in list(self._connections):
            connection.abort()
        await asyncio.sleep(0)  # the transports' own goodbye

    # ---- connections ----------------------------------------------------------------------------

    def _idle(self, origin: Origin) -> Connection | None:
        """The connection that was used last: the others may then grow old."""
        oldest = asyncio.get_running_loop().time() - self._keep_alive_s
        while origin.idle:
            connection = origin.idle.pop()
            if connection.idle_since >= oldest and connection.is_quiet():
                return connection
            connection.abort()
        return None

    async def _connect(self, origin: Origin) -> Connection:
        loop = asyncio.get_running_loop()
        connection = Connection(
            lambda connection: self._keep(connection, origin),
            lambda connection: self._drop(connection, origin),
        )
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await loop.create_connection(
                    lambda: connection, origin.host, origin.port, ssl=origin.tls
                )
        except TimeoutError:
            connection.abort()
            message = f"cannot connect: nothing within {self._connect_timeout_s:g} s"
            raise Unreachable(message) from None
        except OSError as error:  # ssl.SSLError is one, and what DNS says
            raise Unreachable(f"cannot connect: {error}") from None
        except asyncio.CancelledError:
            connection.abort()
            raise
        if connection.transport is not None and not connection.transport.is_closing():
            self._connections.add(connection)
        return connection

    def _drop(self, connection: Connection, origin: Origin) -> None:
        self._connections.discard(connection)
        if connection in origin.idle:
            origin.idle.remove(connection)

    def _keep(self, connection: Connection, origin: Origin) -> None:
        """Takes a connection back that is free again."""
        if self._closed:
            connection.abort()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        origin.idle.append(connection)
        self._origins.setdefault(origin.url, origin)
        if self._sweep is None:
            self._sweep = loop.call_later(self._keep_alive_s, self._close_old)

    def _close_old(self) -> None:
        """Closes what has lain idle too long; forgets origins that are not used."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - self._keep_alive_s
        for origin in list(self._origins.values()):
            for connection in [one for one in origin.idle if one.idle_since <= oldest]:
                connection.abort()
                origin.idle.remove(connection)
            if not origin.idle:
                del self._origins[origin.url]
        rest = bool(self._origins)
        self._sweep = loop.call_later(self._keep_alive_s, self._close_old) if rest else None


def head_of(
    method: str, origin: Origin, path: str, headers: Mapping[str, str], body_bytes: int
) -> bytes:
    """Request line and headers. Raises ValueError for a line end inside a header's value."""
    lines = [f"{method} {origin.prefix}{path} HTTP/1.1", f"host: {origin.host_header}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if method != "GET":
        lines.append(f"content-length: {body_bytes}")
    text = "\r\n".join(lines)
    if text.count("\n") != len(lines) - 1 or text.count("\r") != len(lines) - 1:
        raise ValueError("a header's value has a line end: look at the keys of the upstreams")
    return f"{text}\r\n\r\n".encode()
