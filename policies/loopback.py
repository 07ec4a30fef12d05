"""Who may ask at all: while there are no keys, only what runs on this machine by its own will.

Loopback alone keeps no browser out: any page can post here across sites, and by DNS rebinding (a
name of its own that resolves to 127.0.0.1) read the answers. Both show in Host and Origin, which no
page can forge. The rule of gateway and workers; how they refuse is theirs.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable
from typing import Literal
from urllib.parse import urlsplit

LOCAL_MAX_BYTES = 300  # a name of 253, a scheme and a port; longer ones are neither read nor kept


def foreign_header(
    headers: Iterable[tuple[bytes, bytes]], host: str
) -> tuple[Literal["host", "origin"], str] | None:
    """The first Host or Origin that is not this machine, and its value. HTTP/1.0 may lack a Host.

    `host` is one more name of this machine, in lower case. Names of headers are in lower case, too.
    """
    for name, value in headers:
        if name == b"host":
            if not is_local(value, host):
                return "host", value.decode("latin-1")
        elif name == b"origin" and not is_local(value, host, origin=True):
            return "origin", value.decode("latin-1")
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
    return name in ("localhost", host) or is_loopback(name)


def is_loopback(address: str) -> bool:
    """Whether text is an IP address of this machine's own loop."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
