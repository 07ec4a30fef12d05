"""Who belongs to the pool, and the tasks that keep knowing it: probes, and looks at the sources.

Knows nothing of requests: what is under way on a replica that leaves goes on to its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from gateway.client import Client
from gateway.discovery import Source
from gateway.health import Watch
from gateway.replica import Replica
from policies.retrying import Breaker


class Fleet:
    """The replicas that there are, those of the policy and those that its sources name.

    A replica among `known` goes on with what was learned of it.
    """

    def __init__(
        self,
        replicas: Iterable[Replica],
        sources: Sequence[Source],
        known: Iterable[Replica],
        breaker: Breaker,
    ) -> None:
        self._breaker = breaker
        self._known = {replica.identity: replica for replica in known}
        self.sources = tuple(sources)
        self.replicas = tuple(map(self._recall, replicas))
        self._client: Client | None = None
        self._probes: dict[Replica, asyncio.Task[None]] = {}
        self._looks: list[asyncio.Task[None]] = []

    async def begin(self, client: Client) -> None:
        """Starts to probe; returns when every source has been looked at once."""
        self._client = client
        for replica in self.replicas:
            self._probe(replica)
        await asyncio.gather(*(source.look(self.join) for source in self.sources))
        self._looks = [asyncio.create_task(self._watch(source)) for source in self.sources]

    async def end(self) -> None:
        tasks = [*self._looks, *self._probes.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def join(self, replica: Replica) -> Replica:
        """Takes a replica in; gives back the one that is known for it."""
        replica = self._recall(replica)
        if replica not in self.replicas:
            self.replicas = (*self.replicas, replica)
            self._probe(replica)
        return replica

    def _recall(self, replica: Replica) -> Replica:
        known = self._known.setdefault(replica.identity, replica)
        known.adopt(replica, self._breaker)
        return known

    def _probe(self, replica: Replica) -> None:
        assert self._client is not None, "the fleet is used outside of its pool's lifespan"
        self._probes[replica] = asyncio.create_task(Watch(self._client, replica).run())

    async def _watch(self, source: Source) -> None:
        while True:
            await asyncio.sleep(source.policy.every_s)
            await source.look(self.join)
            for replica in source.prune():
                self.replicas = tuple(one for one in self.replicas if one is not replica)
                del self._known[replica.identity]
                self._probes.pop(replica).cancel()
