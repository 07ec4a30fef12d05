"""Who may ask for what, and how fast it is due: tiers and tenants of a policy file."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidatorFunctionWrapHandler, WrapValidator

from policies.fields import VARIABLE, PolicyModel
from policies.loopback import is_loopback

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
KeyHash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

DEFAULT_TIER = "standard"
TIERS_MAX = 16
KEY_BYTES = 32  # of randomness in a new key
_MS_MAX = 86_400_000


class Tier(PolicyModel):
    """What requests of one kind are promised, and what they may take."""

    ttft_ms: float | None = Field(
        None,
        gt=0,
        le=_MS_MAX,
        description="Target for the first token, queue included, in milliseconds. null: none.",
    )
    tpot_ms: float | None = Field(
        None,
        gt=0,
        le=_MS_MAX,
        description="Target for each further token, in milliseconds. null: none.",
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        le=86400,
        description="After this a request is given up with 504, wherever it is. null: never.",
    )
    priority: int = Field(
        1,
        ge=0,
        le=100,
        description="Lower numbers go first.",
    )
    reserved_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the replicas' capacity that other tiers leave free for this one, "
        "unless it has been idle for a minute.",
    )
    prompt_tokens: int | None = Field(
        None, ge=1, le=2**24, description="Longest prompt; null: as long as the model takes."
    )
    queue_max: int = Field(
        1024, ge=0, le=10**6, description="Requests that may wait; more are refused with 503."
    )
    pace_chunks_per_s: float | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Chunks of a stream a second at most: what comes in bursts goes on at a "
        "reader's pace, the first token at once. null: as they come.",
    )
    service_tier: Literal["priority", "default", "flex"] | None = Field(
        None, description="Value of OpenAI's field `service_tier` that asks for this tier."
    )


SHIPPED: Mapping[str, Mapping[str, Any]] = {
    "interactive": {
        "ttft_ms": 500.0,
        "tpot_ms": 30.0,
        "priority": 0,
        "reserved_share": 0.1,
        "queue_max": 256,
        "service_tier": "priority",
    },
    "standard": {"ttft_ms": 2000.0, "tpot_ms": 100.0, "priority": 1, "service_tier": "default"},
    "relaxed": {"ttft_ms": 5000.0, "tpot_ms": 150.0, "priority": 2, "service_tier": "flex"},
    "batch": {"priority": 3, "reserved_share": 0.05, "queue_max": 4096},
}


def _beside_shipped(given: object, read: ValidatorFunctionWrapHandler) -> dict[str, Tier]:
    """The file's tiers over those that ship: what it does not say of one stays."""
    if not isinstance(given, dict):
        return read(given)  # type: ignore[no-any-return]  # it raises
    whole = {**SHIPPED, **given}
    for name, tier in given.items():
        if isinstance(tier, dict):
            whole[name] = {**SHIPPED.get(name, {}), **tier}
    tiers: dict[str, Tier] = read(whole)
    said = {name: set(tier) for name, tier in given.items() if isinstance(tier, dict)}
    return {
        name: Tier.model_construct(_fields_set=said.get(name, set()), **dict(tier))
        for name, tier in tiers.items()
    }


TierTable = Annotated[dict[Name, Tier], Field(max_length=TIERS_MAX), WrapValidator(_beside_shipped)]


class Tenant(PolicyModel):
    """One user of the gateway, by its keys."""

    keys: tuple[KeyHash, ...] = Field(
        (),
        max_length=64,
        strict=False,
        description="SHA-256 hashes of its keys, from `headgate policy key`; never a key itself.",
    )
    key_env: str | None = Field(
        None,
        pattern=VARIABLE,
        description="Environment variable with one more key of it, as containers are given one.",
    )
    tiers: tuple[Name, ...] = Field(
        (),
        strict=False,
        max_length=TIERS_MAX,
        description="Tiers that it may use; the first is taken where a request names none. "
        "Empty: all, `standard` first.",
    )
    weight: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="Its share against other tenants that wait in the same tier.",
    )
    requests_per_minute: int | None = Field(
        None, ge=1, le=10**9, description="More are refused with 429. null: no limit."
    )
    tokens_per_minute: int | None = Field(
        None,
        ge=1,
        le=10**12,
        description="Tokens of prompts and answers; more are refused with 429. null: no limit.",
    )
    tokens_per_day: int | None = Field(
        None,
        ge=1,
        le=10**15,
        description="Budget of tokens until midnight UTC; 429 when it is spent. null: none.",
    )
    isolate: bool = Field(
        False,
        description="Adds a `cache_salt` of its own to its requests: no other tenant can tell by "
        "the time what it has sent. Own workers and vLLM know the field.",
    )


def key_hash(key: str) -> str:
    """What stands in a policy for a key. Keys are random, so that no salt or stretching is due."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def new_key() -> str:
    """A key that nobody can guess; its beginning tells a finder what it opens."""
    return "hg-" + secrets.token_urlsafe(KEY_BYTES)


ADMIN_IS_CLIENT = "its clients could steer rollouts and read everybody's receipts and traces"
Misfit = tuple[tuple[str | int, ...], str, object]


def misfits(
    host: str, tiers: Mapping[str, Tier], tenants: Mapping[str, Tenant], admin_env: str | None
) -> Iterator[Misfit]:
    """What of a gateway's fields does not go together: where, why, and the value there."""
    if host != "localhost" and not is_loopback(host) and not tenants:
        why = (
            f"{host!r} is not a loopback address; without `gateway.tenants` and their keys only "
            "127.0.0.1, ::1 and localhost are served"
        )
        yield ("host",), why, host
    reserved = sum(tier.reserved_share for tier in tiers.values())
    if reserved > 1:
        why = f"the reserved shares of all tiers are {reserved:g} together, at most 1 is there"
        yield ("tiers",), why, reserved
    owners: dict[str, str] = {}
    for name, tenant in tenants.items():
        if not tenant.keys and tenant.key_env is None:
            why = "a tenant needs a key: `headgate policy key` makes one, and prints its hash"
            yield ("tenants", name, "keys"), why, ()
        yield from unknown_tiers(tiers, tenant.tiers, "tenants", name, "tiers")
        for index, digest in enumerate(tenant.keys):
            if digest in owners:
                why = f"this key belongs to the tenant {owners[digest]!r} already"
                yield ("tenants", name, "keys", index), why, digest
            owners[digest] = name
        if admin_env is not None and tenant.key_env == admin_env:
            why = f"the tenant {name!r} has its key from {admin_env}, too: {ADMIN_IS_CLIENT}"
            yield ("admin", "key_env"), f"{why}; name another variable in one place", admin_env


def tenants_with(key: str, tenants: Mapping[str, Tenant], environ: Mapping[str, str]) -> list[str]:
    """The names of those whom this key lets in."""
    digest = key_hash(key)
    return [
        name
        for name, tenant in tenants.items()
        if digest in tenant.keys
        or (tenant.key_env and environ.get(tenant.key_env, "").strip() == key)
    ]


def unknown_tiers(
    tiers: Mapping[str, Tier], named: Sequence[str] | Mapping[str, object], *where: str
) -> Iterator[Misfit]:
    """Those that a list or a mapping of the policy names and that are not there."""
    places: Iterable[str | int] = named if isinstance(named, Mapping) else range(len(named))
    for place, tier in zip(places, named, strict=True):
        if tier not in tiers:
            why = f"there is no tier {tier!r}; expected one of {', '.join(tiers)}"
            yield (*where, place), why, tier


def unknown_tenants(
    tenants: Mapping[str, Tenant], named: Sequence[str], *where: str
) -> Iterator[Misfit]:
    """Those that a list of the policy names and that are not there."""
    for place, tenant in enumerate(named):
        if tenant not in tenants:
            why = f"there is no tenant {tenant!r}; expected one of {', '.join(tenants) or 'none'}"
            yield (*where, place), why, tenant
