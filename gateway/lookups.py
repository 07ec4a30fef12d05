"""`GET /admin/requests`, `/admin/tenants` and `/admin/receipts`: what the console and commands ask
for while one looks there.

Of all processes that can be asked. Nothing here is on a request's way; no key of a tenant and no
text of a prompt or an answer is told.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.routing import Route
from starlette.types import Scope

from cache.store import Bucket, StoreDown
from gateway import problems
from gateway.admin import Answer, Guarded
from gateway.edge import Live
from gateway.kept import Kept
from gateway.limits import rules_of
from gateway.query import number, one_of, query, refuse_unknown
from gateway.sieve import Sieve, merged
from gateway.tenants import ORDERS, together

REQUESTS_PATH = "/admin/requests"
ASKED = ("by", "top")  # of tenants
TENANTS_PATH = "/admin/tenants"
RECEIPTS_PATH = "/admin/receipts"
TOP_USUAL, TOP_MOST = 20, 100  # tenants in one answer


def routes(live: Live, kept: Kept) -> list[Route]:
    """Behind the check of all that steers."""
    lookups = Lookups(live, kept)
    return [
        Route(REQUESTS_PATH, Guarded(live, {"GET": lookups.requests})),
        Route(TENANTS_PATH, Guarded(live, {"GET": lookups.tenants})),
        Route(RECEIPTS_PATH, Guarded(live, {"GET": lookups.receipts})),
        Route(f"{RECEIPTS_PATH}/{{id:path}}", Guarded(live, {"GET": lookups.receipt})),
    ]


class Lookups:
    """Of whoever may steer."""

    def __init__(self, live: Live, kept: Kept) -> None:
        self._live = live
        self._kept = kept

    async def requests(self, scope: Scope, _body: bytes) -> Answer:
        """Those that fit, and how all of them are spread over time."""
        asked = query(scope)
        sieve = Sieve.of(asked)  # what is wrong is told before anybody else is asked
        found, by = await self._kept.sifted(asked)
        return 200, {**merged(found, sieve), "processes": by.payload()}

    async def receipt(self, scope: Scope, _body: bytes) -> Answer:
        """All of one decision, of whatever tenant."""
        name = scope["path_params"]["id"]
        found, by = await self._kept.receipt(name, None)
        if found is None:
            most = self._live.edge.settings.routing.receipts
            raise problems.receipt_not_found(name, most, by.where())
        return 200, found

    async def receipts(self, _scope: Scope, _body: bytes) -> Answer:
        """Of all tenants, the earliest first."""
        found, by = await self._kept.receipts(None)
        return 200, {"object": "list", "data": found, "processes": by.payload()}

    async def tenants(self, scope: Scope, _body: bytes) -> Answer:
        """The first of them by what they use, with what is left of their limits."""
        asked = query(scope)
        refuse_unknown(asked, ASKED)
        by = one_of(asked, "by", ORDERS)
        edge = self._live.edge
        found, processes = await self._kept.tenants()
        told = together(found, edge.keys.tenants, by, number(asked, "top", TOP_USUAL, TOP_MOST))
        left, among = await self._left(one["name"] for one in told["tenants"])
        for one in told["tenants"]:
            known = edge.keys.tenants.get(one["name"])
            rights = known.rights if known is not None else None
            one["known"] = known is not None
            one["tiers"] = list(rights.tiers) if rights is not None else []
            one["weight"] = rights.weight if rights is not None else None
            one["limits"] = None if left is None else left.get(one["name"], [])
        return 200, {
            **told,
            "at": time.time(),
            "keys": edge.keys.required,
            "share_of": among,  # processes, of which each gives its share of every limit
            "processes": processes.payload(),
        }

    async def _left(
        self, names: Iterable[str]
    ) -> tuple[Mapping[str, list[dict[str, Any]]] | None, int]:
        """Of each of these: its limits, and what is left of them, by one question to the store;
        None where that does not answer. And of how many processes' limits they are a share."""
        edge = self._live.edge
        found: list[tuple[str, str]] = []
        wants = []
        for name in names:
            if (known := edge.keys.tenants.get(name)) is not None:
                some, whats = rules_of(known, time.time()).wants(0)
                # Nothing is taken: what is left is told all the same. Of requests, they are 1.
                wants += [type(one)(one.key, one.rule, 0.0) for one in some]
                found += [(name, what) for what in whats]
        if not wants:
            return {}, 1
        try:
            taken = await edge.state.store.take(wants)
        except StoreDown:
            return None, 1
        told: dict[str, list[dict[str, Any]]] = {}
        for (name, what), want, left in zip(found, wants, taken.left, strict=True):
            rule = want.rule
            span = "minute" if isinstance(rule, Bucket) else "day"
            told.setdefault(name, []).append(
                {"what": what, "limit": rule.capacity / taken.among, "left": left, "per": span}
            )
        return told, taken.among
