"""What a tenant may use in a minute and in a day: taken by estimate, settled by what was used.

Over `cache.store.Store`, so that gateways which share one share the limits. Knows no queue.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, replace

from cache.store import Bucket, Quota, Store, StoreDown, Taken, Want, key
from gateway import problems
from gateway.keys import Known

MINUTE_S = 60.0
DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one request has taken of its tenant's limits. `wants` are those limits, in the order
    requests, tokens, budget, as far as the tenant has them."""

    wants: tuple[Want, ...]
    taken: Taken
    names: tuple[str, ...]

    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's `x-ratelimit-*`: the limit, what is left of it, and when it is whole again."""
        found = []
        for name, want, left in zip(self.names, self.wants, self.taken.left, strict=True):
            if isinstance(want.rule, Bucket):
                missing = want.rule.capacity - left
                for part, value in (
                    ("limit", f"{want.rule.capacity:.0f}"),
                    ("remaining", f"{max(left, 0):.0f}"),
                    ("reset", span(missing / want.rule.per_s)),
                ):
                    found.append((f"x-ratelimit-{part}-{name}".encode(), value.encode()))
        return found


class Limits:
    """The limits of all tenants."""

    def __init__(self, store: Store, wall: Callable[[], float]) -> None:
        self._store = store
        self._wall = wall  # seconds since the epoch: minutes and days are those of all gateways

    async def take(self, tenant: Known, tokens: int | None) -> Allowance | None:
        """Takes one request and `tokens` (None: for an answer that takes none, whatever is left of
        them); None for a tenant without limits. Raises Problem 429, and 503 where the policy wants
        the store and it is away."""
        wants, names = wants_of(tenant, tokens, self._wall())
        if not wants:
            return None
        try:
            taken = await self._store.take(wants)
        except StoreDown:
            raise problems.limits_unknown() from None
        allowance = Allowance(wants, taken, names)
        if not taken.allowed:
            what = names[taken.short[0]]
            rule = wants[taken.short[0]].rule
            limit = rule.limit if isinstance(rule, Quota) else rule.capacity
            headers = dict(allowance.headers())
            told = {name.decode(): value.decode() for name, value in headers.items()}
            raise problems.limit_reached(what, limit, taken.retry_after_s, told)
        return allowance

    async def settle(self, allowance: Allowance, tokens: int) -> None:
        """Gives back what was taken too much, and takes what was too little."""
        changes = [
            replace(want, amount=want.amount - tokens)
            for name, want in zip(allowance.names, allowance.wants, strict=True)
            if name != "requests" and want.amount != tokens
        ]
        if changes:
            await self._store.settle(changes)


def wants_of(
    tenant: Known, tokens: int | None, now: float
) -> tuple[tuple[Want, ...], tuple[str, ...]]:
    """What a request takes of each limit that its tenant has, and the limits' names."""
    rights = tenant.rights
    if rights is None:
        return (), ()
    found: list[tuple[str, Want]] = []
    if rights.requests_per_minute is not None:
        found.append(("requests", _minutely(tenant, "requests", rights.requests_per_minute, 1)))
    if rights.tokens_per_minute is not None and tokens is not None:
        found.append(("tokens", _minutely(tenant, "tokens", rights.tokens_per_minute, tokens)))
    if rights.tokens_per_day is not None and tokens is not None:
        day = datetime.datetime.fromtimestamp(now, datetime.UTC).date().isoformat()
        ends_at = (now // DAY_S + 1) * DAY_S
        quota = Quota(float(rights.tokens_per_day), ends_at)
        found.append(("budget", Want(key("budget", tenant.name, day), quota, float(tokens))))
    return tuple(want for _, want in found), tuple(name for name, _ in found)


def _minutely(tenant: Known, what: str, limit: int, amount: int) -> Want:
    bucket = Bucket(float(limit), limit / MINUTE_S)
    return Want(key(what, tenant.name), bucket, float(amount))


def span(seconds: float) -> str:
    """A time as OpenAI's headers have it: `120ms`, `4.2s`, `1m0s`."""
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f}ms"
    if seconds < MINUTE_S:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s"
