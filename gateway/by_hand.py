"""What may be asked of replicas by hand: `/admin/replicas...`. Who may ask, admin.py knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.types import Scope

from gateway import problems
from gateway.bodies import Draining
from gateway.drains import Drains
from runtime.wire import parse_object

Answer = tuple[int, Mapping[str, Any]]


class ByHand:
    """Replicas, and which of them take nothing new."""

    def __init__(self, drains: Drains) -> None:
        self._drains = drains

    async def told(self, _scope: Scope, _body: bytes) -> Answer:
        """Each, whether it takes requests, and what all gateways have under way there."""
        found = await self._drains.under_way()
        replicas = {one.url: one for one in self._drains.replicas()}
        return 200, {
            "replicas": [
                {
                    "url": url,
                    "healthy": one.healthy,
                    "draining": one.spared,
                    "drained": self._drains.payload(url),
                    "in_flight": found.by_url.get(url, 0),
                }
                for url, one in replicas.items()
            ],
            "processes": {"asked": found.asked, "of": found.of},
        }

    async def drain(self, scope: Scope, body: bytes) -> Answer:
        """It takes nothing new, at any gateway, until it is resumed; what runs there ends."""
        wanted = Draining.model_validate(parse_object(body))
        known = [one.url for one in self._drains.replicas()]
        if wanted.url not in known:
            raise problems.no_such_replica(wanted.url, known)
        await self._drains.change(wanted.url, out=True, why=wanted.why)
        return await self.told(scope, body)

    async def resume(self, scope: Scope, body: bytes) -> Answer:
        """It takes requests again, unless its policy or its source has it drained, too."""
        wanted = Draining.model_validate(parse_object(body))
        known = [one.url for one in self._drains.replicas()]
        if wanted.url not in known and self._drains.note(wanted.url) is None:
            raise problems.no_such_replica(wanted.url, known)
        await self._drains.change(wanted.url, out=False, why=wanted.why)
        return await self.told(scope, body)
