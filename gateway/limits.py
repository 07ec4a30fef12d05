"""What a tenant may use in a minute and in a day: taken by estimate, settled by what was used.

Over `cache.store.Store`, so that gateways which share one share the limits. Knows no queue.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import NamedTuple

from cache.store import Bucket, Quota, Rule, Store, StoreDown, Taken, Want, key
from gateway import problems
from gateway.keys import Known
from policies.schema import Tenant

MINUTE_S = 60.0
DAY_S = 86400.0
# Of a limit by the minute: the limit, what is left of it, and when it is whole again.
HEADERS = {
    name: tuple(f"x-ratelimit-{part}-{name}".encode() for part in ("limit", "remaining", "reset"))
    for name in ("requests", "tokens")
}


class Allowance(NamedTuple):
    """What one request has taken of its tenant's limits. `wants` are those limits, in the order
    requests, tokens, budget, as far as the tenant has them."""

    wants: tuple[Want, ...]
    taken: Taken
    names: tuple[str, ...]

    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's `x-ratelimit-*`; of this process's share, where it gives one."""
        found: list[tuple[bytes, bytes]] = []
        for name, want, left in zip(self.names, self.wants, self.taken.left, strict=True):
            rule = self.ruled(want)
            if isinstance(rule, Bucket):
                limit, remaining, reset = HEADERS[name]
                found += (
                    (limit, b"%d" % rule.capacity),
                    (remaining, b"%d" % max(left, 0)),
                    (reset, span((rule.capacity - left) / rule.per_s).encode()),
                )
        return found

    def ruled(self, want: Want) -> Rule:
        """What it was taken of."""
        return want.rule if self.taken.among == 1 else want.rule.share(self.taken.among)


class Limits:
    """The limits of all tenants."""

    def __init__(self, store: Store, wall: Callable[[], float]) -> None:
        self._store = store
        self._wall = wall  # seconds since the epoch: minutes and days are those of all gateways
        self._rules: dict[str, Rules] = {}  # by tenant

    async def take(self, tenant: Known, tokens: int | None) -> Allowance | None:
        """Takes one request and `tokens` (None: for an answer that takes none, whatever is left of
        them); None for a tenant without limits. Raises Problem 429, and 503 where the policy wants
        the store and it is away."""
        wants, names = self._rules_of(tenant).wants(tokens)
        if not wants:
            return None
        try:
            taken = await self._store.take(wants)
        except StoreDown:
            raise problems.limits_unknown() from None
        allowance = Allowance(wants, taken, names)
        if not taken.allowed:
            what = names[taken.short[0]]
            rule = allowance.ruled(wants[taken.short[0]])
            headers = dict(allowance.headers())
            told = {name.decode(): value.decode() for name, value in headers.items()}
            raise problems.limit_reached(
                what, rule.capacity, taken.retry_after_s, told, taken.among
            )
        return allowance

    async def settle(self, allowance: Allowance, tokens: int) -> None:
        """Gives back what was taken too much, and takes what was too little."""
        changes = [
            Want(want.key, want.rule, want.amount - tokens)
            for name, want in zip(allowance.names, allowance.wants, strict=True)
            if name != "requests" and want.amount != tokens
        ]
        if changes:
            await self._store.settle(changes)

    def _rules_of(self, tenant: Known) -> Rules:
        now = self._wall()
        rules = self._rules.get(tenant.name)
        if rules is None or rules.ends_at != _day_ends_at(now) or rules.rights is not tenant.rights:
            rules = self._rules[tenant.name] = rules_of(tenant, now)
        return rules


class Rules(NamedTuple):
    """The limits of one tenant on one day, in the order requests, tokens, budget."""

    rights: Tenant | None
    ends_at: float
    names: tuple[str, ...]
    itself: tuple[Want, ...]  # what every request takes: one of the requests, where they have one
    rules: tuple[tuple[str, Rule], ...]  # of tokens, with their keys in the store

    def wants(self, tokens: int | None) -> tuple[tuple[Want, ...], tuple[str, ...]]:
        """What a request takes of each limit, and the limits' names."""
        if tokens is None:  # of an answer that takes none
            return self.itself, self.names[: len(self.itself)]
        amount = float(tokens)
        return (*self.itself, *[Want(*rule, amount) for rule in self.rules]), self.names


def rules_of(tenant: Known, now: float) -> Rules:
    """Of the day that it is."""
    rights, ends_at = tenant.rights, _day_ends_at(now)
    found: dict[str, tuple[str, Rule]] = {}
    if rights is not None:
        by_minute = {"requests": rights.requests_per_minute, "tokens": rights.tokens_per_minute}
        for name, limit in by_minute.items():
            if limit is not None:
                found[name] = key(name, tenant.name), Bucket(float(limit), limit / MINUTE_S)
        if rights.tokens_per_day is not None:
            day = datetime.datetime.fromtimestamp(now, datetime.UTC).date().isoformat()
            quota = Quota(float(rights.tokens_per_day), ends_at)
            found["budget"] = key("budget", tenant.name, day), quota
    names, itself = tuple(found), found.pop("requests", None)
    wants = (Want(*itself),) if itself is not None else ()
    return Rules(rights, ends_at, names, wants, tuple(found.values()))


def _day_ends_at(now: float) -> float:
    return (now // DAY_S + 1) * DAY_S


def span(seconds: float) -> str:
    """A time as OpenAI's headers have it: `120ms`, `4.2s`, `1m0s`."""
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f}ms"
    if seconds < MINUTE_S:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s"
