"""What the models of a policy file share: their base, and types that check a value by itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from policies.loopback import is_loopback

VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"  # of the environment
LAST_PORT = 65535
# What a path of a local socket may have, less what the number of a worker adds.
_IPC_BYTES_MAX = 96


class PolicyModel(BaseModel):
    """Frozen, strict about types, and without a place for unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def refuse(misfits: Iterable[tuple[tuple[str | int, ...], str, object]]) -> None:
    """For what several fields say together: raises each complaint at the place that it names."""
    errors = [
        InitErrorDetails(
            type=PydanticCustomError("value_error", "{error}", {"error": why}),
            loc=where,
            input=value,
        )
        for where, why, value in misfits
    ]
    if errors:
        raise ValidationError.from_exception_data("policy", errors)


def loopback_address(host: str) -> str:
    """Raises ValueError for anything that strangers could reach."""
    if host != "localhost" and not is_loopback(host):
        raise ValueError(
            f"{host!r} is not a loopback address; only 127.0.0.1, ::1 and localhost are served"
        )
    return host


def url_parts(url: str) -> SplitResult | None:
    """None for what no URL of a server can be."""
    try:
        parts = urlsplit(url)
        readable = parts.hostname and parts.port != 0
    except ValueError:  # half an IPv6 address, a port beyond 65535
        return None
    return parts if readable and url.isascii() and url.isprintable() and " " not in url else None


def base_url(url: str) -> str:
    parts = url_parts(url)
    if parts is None or parts.scheme not in ("http", "https"):
        raise ValueError(f"{url!r} is not a base URL such as http://127.0.0.1:8000")
    if parts.query or parts.fragment:
        raise ValueError(f"{url!r} has a query or a fragment, which a base URL cannot have")
    if "@" in parts.netloc:  # not repeated: it may be a password
        raise ValueError(
            "has a user or a password in it, and addresses are told in metrics, logs and receipts; "
            "name the variable of a key by api_key_env instead"
        )
    return url.rstrip("/").removesuffix("/v1")


def event_endpoint(endpoint: str) -> str:
    """Where block events leave. They name tokens of prompts, so only this machine may listen."""
    if (host := _endpoint_host(endpoint)) is not None:
        loopback_address(host)
    return endpoint


def publisher_endpoint(endpoint: str) -> str:
    """Where somebody else's block events are had."""
    if _endpoint_host(endpoint) is not None and tcp_ports(endpoint) == [0]:
        raise ValueError(f"{endpoint!r} has port 0, which nobody publishes at")
    return endpoint


def tcp_ports(*endpoints: str | None) -> list[int]:
    """The ports of those ZMQ endpoints that have one."""
    return [
        int(one.rpartition(":")[2])
        for one in endpoints
        if one is not None and one.startswith("tcp:")
    ]


def _endpoint_host(endpoint: str) -> str | None:
    """The host of a ZMQ endpoint, checked; None for a local socket."""
    wrong = ValueError(
        f"{endpoint!r} is not an endpoint such as tcp://127.0.0.1:5557 or ipc:///run/headgate"
    )
    if endpoint.startswith("ipc://"):
        if not endpoint.isprintable() or not 0 < len(endpoint[6:].encode()) <= _IPC_BYTES_MAX:
            raise wrong
        return None
    match = re.fullmatch(r"tcp://(\[[^\]]+\]|[^\[\]:]+):([0-9]{1,5})", endpoint)
    if match is None or int(match[2]) > LAST_PORT:
        raise wrong
    return match[1].strip("[]")


def integer_one(value: object) -> object:
    """A Literal compares by equality, so that `true` and `1.0` would pass for 1."""
    if type(value) is not int:
        raise ValueError(f"expected the integer 1, got {value!r}")
    return value


_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(?:([kMGT])B|([KMGT])iB)")


def _size(value: object) -> object:
    """`2 GiB` and `500 MB` are bytes; anything but a size is left to the field's own type."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(
            f"expected a number of bytes, or a size such as 500 MB or 2 GiB, got {value[:40]!r}"
        )
    number, decimal, binary = match.groups()
    unit = 1000 ** " kMGT".index(decimal) if decimal else 1024 ** " KMGT".index(binary)
    return int(float(number) * unit)


Size = Annotated[int, BeforeValidator(_size)]
