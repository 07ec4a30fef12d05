"""`gateway.store`: where gateways, and the processes of one, keep what they share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from policies.fields import VARIABLE, PolicyModel, url_parts


def redis_url(url: str) -> str:
    """Without a password, which does not belong into a file, and without redis-py's options."""
    parts = url_parts(url)
    database = parts.path.removeprefix("/") if parts is not None else ""
    number = database == "" or (database.isdecimal() and len(database) < 6)
    if parts is None or parts.scheme not in ("redis", "rediss") or not number:
        raise ValueError("not a URL such as redis://127.0.0.1:6379/0 or rediss://cache:6380")
    if parts.password is not None:
        raise ValueError("has a password in it; name the variable that holds it by `password_env`")
    if parts.query or parts.fragment:
        raise ValueError("has a query or a fragment, which it cannot have")
    return url


class StateStore(PolicyModel):
    """A Redis (7 or later) that several gateways share."""

    redis: Annotated[str, AfterValidator(redis_url)] = Field(
        description="Its URL without the password; `rediss://` for TLS."
    )
    password_env: str | None = Field(
        None,
        pattern=VARIABLE,
        description="Environment variable that holds its password.",
    )
    ca_file: str | None = Field(
        None,
        description="Certificates that its TLS is checked against (relative to the policy file); "
        "default: the system's.",
    )
    namespace: str = Field(
        "headgate",
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
        description="Gateways with the same one share; every key in Redis begins with it.",
    )
    timeout_ms: int = Field(
        20,
        ge=1,
        le=1000,
        description="Longest that one request waits for it, in all; then it goes on with what its "
        "own gateway knows.",
    )
    when_down: Literal["open", "local", "closed"] = Field(
        "local",
        description="Limits while it is away: `local`, each gateway gives its share of what was "
        "left; `open`, none; `closed`, requests of tenants with limits are refused with 503.",
    )
