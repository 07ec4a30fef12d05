"""What became of the requests of each tier, and of each tenant, counted."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import add

from gateway.fate import TRIED, tried_of
from gateway.tenants import Tenants
from gateway.trail import Hop

# Where the time of requests goes (gateway/phases.py), in the order in which they pass.
PHASES = (
    "upload", "recv_queue", "admit", "queue", "trim", "route",
    "network", "replica_queue", "prefill", "decode", "download", "gateway",
)  # fmt: skip
REPLICAS_MAX = 256  # that come and go where they are discovered
LATEST = 512  # requests of a tier whose times are kept, whatever other tiers get meanwhile

# When a stream ended, in seconds since 1970; its first token; each further one, if it has told.
Timed = tuple[float, float, float | None]


@dataclass(slots=True)
class Tally:
    """Of one tier, since the process began."""

    admitted: int = 0
    waited_s: float = 0.0  # together, in the queue
    shed: int = 0  # 503 or 504 of the queue
    limited: int = 0  # 429
    in_time: int = 0  # first tokens within their target
    late: int = 0
    in_pace: int = 0  # answers whose tokens came within their target
    slow: int = 0
    _spent_s: tuple[float, ...] = (0.0,) * len(PHASES)
    latest: deque[Timed] = field(default_factory=lambda: deque(maxlen=LATEST))

    def spend(self, seconds: Iterable[float]) -> None:
        """One request's, in the order of PHASES."""
        self._spent_s = tuple(map(add, self._spent_s, seconds))

    @property
    def phase_s(self) -> dict[str, float]:
        return dict(zip(PHASES, self._spent_s, strict=True))


@dataclass(slots=True)
class Tallies:
    """Of all tiers, of which there are as many as policies named, and of tenants."""

    tiers: dict[str, Tally] = field(default_factory=dict)
    tenants: Tenants = field(default_factory=Tenants)
    tried: dict[str, Counter[str]] = field(default_factory=dict)  # by replica: how attempts went

    def of(self, tier: str) -> Tally:
        found = self.tiers.get(tier)
        if found is None:
            found = self.tiers[tier] = Tally()
        return found

    def attempted(self, hops: Iterable[Hop]) -> None:
        """What one request asked of replicas, those counted in whose answer nobody got; the longest
        known replicas are forgotten."""
        for hop in hops:
            if (how := tried_of(hop)) is None:
                continue
            counts = self.tried.get(hop.replica.url)
            if counts is None:
                # All of them from the first on: a rate sees no first failure that begins a series.
                counts = self.tried[hop.replica.url] = Counter(dict.fromkeys(TRIED, 0))
                if len(self.tried) > REPLICAS_MAX:
                    self.tried.pop(next(iter(self.tried)))
            counts[how] += 1
