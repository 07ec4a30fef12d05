"""Where the fleet's replicas have their room: in the emptiest domain that has some.

Knows domains and who is in them; what runs there the controller knows.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

from fleet.cluster import Cluster, NoRoom
from fleet.placing import preferences
from fleet.unit import Unit

log = logging.getLogger("headgate.fleet")

PLACE_S = 5.0  # for room in one domain, before the next one is tried
SHUNNED_S = 30.0  # a domain that has lost a replica comes last for so long


class Places:
    """Takes room on the cluster. `strict`: never two in one domain."""

    def __init__(self, cluster: Cluster, now: Callable[[], float], *, strict: bool) -> None:
        self._cluster = cluster
        self._now = now
        self._strict = strict
        self._shunned: dict[str, float] = {}  # domain -> until when

    def shun(self, domain: str) -> None:
        """A replica was lost there."""
        self._shunned[domain] = self._now() + SHUNNED_S

    async def take(self, unit: Unit, units: Sequence[Unit]) -> None:
        """Room for one of the units: in the emptiest domain that has it, else wherever and whenever
        there is some, so that a cluster that can grow sees what is missing."""
        untried = list(await self._cluster.domains())
        while order := self._order(unit, units, untried):
            unit.domain = order[0]  # others see at once that it is taken
            untried.remove(order[0])
            with contextlib.suppress(NoRoom):
                unit.domain = await self._cluster.place(unit.name, unit.domain, (), PLACE_S)
                return
        unit.domain = None
        log.info("%s waits for room on the cluster", unit.name)
        while unit.domain is None:
            avoid = _taken(unit, units) if self._strict else ()
            domain = await self._cluster.place(unit.name, None, avoid, None)
            if self._strict and domain in _taken(unit, units):  # one that waited, too, is there
                await self._cluster.release(unit.name)
                continue
            unit.domain = domain

    def _order(self, unit: Unit, units: Sequence[Unit], domains: Sequence[str]) -> list[str]:
        """Of the domains, by where all others are at this moment."""
        shunned = {domain for domain, until in self._shunned.items() if self._now() < until}
        return preferences(domains, _taken(unit, units), shunned, strict=self._strict)


def _taken(unit: Unit, units: Sequence[Unit]) -> list[str]:
    return [one.domain for one in units if one is not unit and one.domain is not None]
