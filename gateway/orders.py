"""What a rollout's controller wants of all gateways, as one record that they share by the store.

Knows how the record is written and that a lease runs out by itself; knows no edge and no request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import orjson

from cache.store import Store, key

RECORD = key("rollout")
OBSERVED = key("observed")
KEPT_S = 900.0  # beyond its lease: time to come back for a controller that has died
OBSERVED_S = 900.0
TRIES = 8  # of a change that another gateway has crossed


@dataclass(frozen=True, slots=True)
class Orders:
    """One rollout. Shares are of sessions; `until` is the lease's end in seconds since 1970."""

    id: str
    name: str  # of the hypothesis
    patch: Mapping[str, Any] = field(default_factory=dict)  # `gateway.…` -> value
    replicas: tuple[Mapping[str, Any], ...] = ()  # the candidate's; none: the baseline's own
    fingerprints: tuple[str, ...] = ()  # that its answers may bear; none: any
    roots: Mapping[str, str] = field(default_factory=dict)  # baseline, candidate, spec
    share: float = 0.0
    shadow: float = 0.0
    until: float = 0.0
    since: float = 0.0  # when it was put up first, in seconds since 1970
    paused: str = ""  # why it stays at its stage; "": it goes on
    stage: Mapping[str, Any] = field(default_factory=dict)  # as its controller told it last
    ended: str = ""  # why it was rolled back, which is for good
    ended_at: float | None = None
    blamed: bool = True  # the candidate, for its end

    def live(self, now: float) -> bool:
        """Whether anything may go to the candidate."""
        return not self.ended and now < self.until

    def rolled_back(self, why: str, now: float, *, blamed: bool = True) -> Orders:
        if self.ended:
            return self
        return replace(self, share=0.0, shadow=0.0, ended=why, ended_at=now, blamed=blamed)

    def dumped(self) -> bytes:
        return orjson.dumps(asdict(self))

    @classmethod
    def read(cls, data: bytes) -> Orders:
        """Raises TypeError or ValueError for a record of another version."""
        given = orjson.loads(data)
        for name in ("replicas", "fingerprints"):
            given[name] = tuple(given[name])
        return cls(**given)


async def current(store: Store) -> Orders | None:
    data = await store.get(RECORD)
    return None if data is None else Orders.read(data)


async def change(
    store: Store, make: Callable[[Orders | None], Orders | None], now: float
) -> Orders | None:
    """Replaces the record by what `make` makes of it, whoever else changes it at once; None takes
    it away. Raises what `make` raises."""
    for _ in range(TRIES):
        data = await store.get(RECORD)
        made = make(None if data is None else Orders.read(data))
        new = None if made is None else made.dumped()
        if new == data:
            return made
        ttl_s = 1.0 if made is None else max(made.until - now, 0.0) + KEPT_S
        if await store.swap(RECORD, data, new, ttl_s):
            return made
    raise TimeoutError("the rollout's record is being changed by others all the time")
