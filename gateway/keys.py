"""Who asks: the tenant of a request's key. Knows hashes of keys, never a key itself."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gateway import problems
from gateway.call import RawHeaders
from policies.load import FLEET_KEY_ENV
from policies.schema import Gateway, Tenant
from policies.slo import key_hash
from runtime.wire import RUN_TOKEN_ENV

TENANT = "headgate.tenant"  # an extension of the scope: Known, None for a stranger at an open path
SCHEME = b"bearer "
_NOBODY = ("", "0" * 64)  # compared with where no tenant has the key, so that both take as long


@dataclass(frozen=True, slots=True)
class Known:
    """A tenant by its name. Without tenants in the policy everybody is `ANYONE`."""

    name: str
    rights: Tenant | None = None


ANYONE = Known("")


@dataclass(frozen=True, slots=True)
class Keys:
    """The tenants of a policy by the hashes of their keys."""

    owners: Mapping[str, tuple[str, str]] = field(repr=False)  # hash -> name and the hash again
    tenants: Mapping[str, Known]
    compare: Callable[[str, str], bool] = field(default=hmac.compare_digest, repr=False)
    fleet: str | None = field(
        default=None, repr=False
    )  # hash of the key that our own programs know

    @classmethod
    def of(cls, policy: Gateway, environ: Mapping[str, str] = os.environ) -> Keys:
        """Variables that the policy names are set: `policies.load` has seen to it."""
        owners = {
            digest: (name, digest)
            for name, tenant in policy.tenants.items()
            for digest in (*tenant.keys, *_given(tenant, environ))
        }
        tenants = {name: Known(name, rights) for name, rights in policy.tenants.items()}
        key = environ.get(FLEET_KEY_ENV)
        return cls(owners, tenants, fleet=key_hash(key) if key else None)

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return bool(self.tenants)

    def is_fleet(self, headers: RawHeaders) -> bool:
        """Whether it is our own fleet that asks (fleet/demand.py)."""
        given = [value for name, value in headers if name == b"authorization"]
        if self.fleet is None or len(given) != 1 or given[0][: len(SCHEME)].lower() != SCHEME:
            return False
        return self.compare(hashlib.sha256(given[0][len(SCHEME) :].strip()).hexdigest(), self.fleet)

    def tenant(self, headers: RawHeaders) -> Known:
        """Whose key the request bears. Raises Problem 401 for none, several, or a wrong one.

        The table is searched by the key's hash, of which a guesser controls no bit, and the hash
        that was found is compared in constant time: time tells nothing of any key.
        """
        if not self.tenants:
            return ANYONE
        given = [value for name, value in headers if name == b"authorization"]
        if not given:
            raise problems.key_missing()
        scheme, key = given[0][: len(SCHEME)], given[0][len(SCHEME) :].strip()
        digest = hashlib.sha256(key).hexdigest()
        name, known = self.owners.get(digest, _NOBODY)
        right = self.compare(digest, known)
        if not right or len(given) > 1 or scheme.lower() != SCHEME:
            raise problems.key_wrong()
        return self.tenants[name]


def refuse_stranger(headers: RawHeaders, key_env: str | None, *, keys: bool) -> None:
    """Raises Problem 401 or 403. Where there are no keys at all, the doorway has seen to it that
    this machine asks; of pages, the gateway's own does: those of other ports steer nothing."""
    if key_env is None:
        if keys:
            raise problems.admin_off()
        by_name = dict(headers)
        origin, host = by_name.get(b"origin"), by_name.get(b"host", b"")
        if origin is not None and origin.partition(b"://")[2].lower() != host.lower():
            raise problems.page_not_ours(origin.decode("latin-1"))
        return
    given = [value for name, value in headers if name == b"authorization"]
    if not given:
        raise problems.key_missing()
    key = os.environ.get(key_env, "").strip().encode("utf-8", "surrogateescape")
    scheme, sent = given[0][: len(SCHEME)], given[0][len(SCHEME) :].strip()
    right = hmac.compare_digest(sent, key)
    if not (right and key) or len(given) > 1 or scheme.lower() != SCHEME:
        raise problems.key_not_operators()


def _given(tenant: Tenant, environ: Mapping[str, str]) -> list[str]:
    """The hash of the key that the environment has for a tenant."""
    key = environ.get(tenant.key_env, "").strip() if tenant.key_env else ""
    return [key_hash(key)] if key else []


def salt_secret(policy: Gateway, environ: Mapping[str, str]) -> bytes:
    """What salts are made of: the policy's variable, else one for all that `headgate serve` has
    started together. The variable is set and not empty: `policies.load` has seen to it."""
    named = environ.get(policy.secret_env, "") if policy.secret_env else ""
    shared = named or environ.get(RUN_TOKEN_ENV, "") or secrets.token_hex(32)
    return hashlib.sha256(
        b"salts of headgate\0" + shared.encode("utf-8", "surrogateescape")
    ).digest()
