"""What several gateways lose against one that sees everything, apart and sharing a store.

Simulated time: the gateways' own choice and their own exchange, before replicas that are queues.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, median
from typing import Any

from benchmarks.lab.report import About, Goal, Measured, Settings, run
from benchmarks.lab.samples import percentile
from cache.failover import FailoverStore
from cache.memory_store import MemoryStore
from cache.prefix_index import PrefixIndex
from gateway.others import BUSY_S, Others
from gateway.replica import Replica
from gateway.route import Ask, Option, decide

ABOUT = About(
    name="gateways",
    measures=(
        "Requests come at random to gateways at random, which choose among replicas that work on "
        "one request at a time, at 80 % of what they can: 1 s (`long`), 250 ms (`middle`, `burst`) "
        "or 25 ms (`short`) each on average, exponential; in `burst` they come eight at once. "
        "`one` is a single gateway; `apart` are four that know only of themselves; `sharing` are "
        "four that tell each other what they have under way every 20 ms through a store, "
        "`sharing_slowly` every 100 ms. Time is simulated; choice and exchange are the gateway's "
        "own code. `mean_s` and `p95_s` are times from arrival to the end, medians over seeds; "
        "`p95_of_one` is the median of the ratios to `one` before the same arrivals."
    ),
    goals=(
        Goal(
            "sharing_p95",
            1.1,
            "at most",
            "four that share have at most 1.1 x the p95 of one (worst of the cases)",
        ),
    ),
)
_LOAD = 0.8
_MODEL = "m"


Arrivals = list[tuple[float, float, float]]  # moment, seconds of work, where of 0 to 1; in order


@dataclass(frozen=True, slots=True)
class Case:
    """How many gateways there are, and how often they exchange; None: never."""

    gateways: int
    every_s: float | None = None


CASES = {
    "one": Case(1),
    "apart": Case(4),
    "sharing": Case(4, BUSY_S),
    "sharing_slowly": Case(4, 5 * BUSY_S),
}


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests of a kind, and the replicas before which they come."""

    replicas: int
    work_s: float  # on average
    requests: int
    together: int = 1


TRAFFIC = {
    "long, 4 replicas": Traffic(4, 1.0, 250),
    "middle, 4 replicas": Traffic(4, 0.25, 800),
    "middle, 8 replicas": Traffic(8, 0.25, 1200),
    "short, 4 replicas": Traffic(4, 0.025, 4000),
    "burst, 4 replicas": Traffic(4, 0.25, 800, together=8),
}


def _choose(view: Sequence[Replica], rng: random.Random) -> int:
    """By load alone: what is compared is what several gateways know of it."""
    options = [
        Option(one.url, one.in_flight + one.elsewhere.running, 0.0, 0, 0.0, 0.0, 0.0, one.weight)
        for one in view
    ]
    return decide(options, Ask(0, 0, 0.0, 0.0, "least_loaded", rng.random())).at


@dataclass(slots=True)
class Server:
    """A replica as it is: it works on one request at a time, in their order."""

    queue: deque[tuple[float, float, int]] = field(default_factory=deque)  # arrival, work, gateway


class Fleet:
    """Servers, and gateways each with its own view of them."""

    def __init__(self, case: Case, servers: int) -> None:
        self.now = 0.0
        self.servers = [Server() for _ in range(servers)]
        store = MemoryStore(lambda: self.now)
        self.views = [
            [Replica(f"http://{n}", models={_MODEL: {}}, healthy=True) for n in range(servers)]
            for _ in range(case.gateways)
        ]
        self.others = [
            Others(FailoverStore(store, when_down="local", patience_s=60), f"{n}", lambda: self.now)
            for n in range(case.gateways)
        ]
        self.took_s: list[float] = []
        self._index = PrefixIndex()
        self._events: list[tuple[float, int, str, int]] = []
        self._count = 0

    async def run(self, arrivals: Arrivals, case: Case, rng: random.Random) -> None:
        for number, (at, _, _) in enumerate(arrivals):
            self._plan(at, "arrive", number)
        if case.every_s is not None:
            for gateway in range(case.gateways):
                self._plan(rng.random() * case.every_s, "exchange", gateway)
        left = len(arrivals)
        while left:
            self.now, _, what, which = heapq.heappop(self._events)
            if what == "arrive":
                self._arrive(arrivals[which][1], arrivals[which][2], rng)
            elif what == "finish":
                self._finish(which)
                left -= 1
            else:
                await self.others[which].exchange(self.views[which], self._index)
                self._plan(self.now + (case.every_s or 0.0), "exchange", which)

    def _plan(self, at: float, what: str, which: int) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, self._count, what, which))

    def _arrive(self, work_s: float, where: float, rng: random.Random) -> None:
        gateway = int(where * len(self.views))
        view = self.views[gateway]
        replica = view[_choose(view, rng)]
        replica.in_flight += 1
        chosen = view.index(replica)
        queue = self.servers[chosen].queue
        queue.append((self.now, work_s, gateway))
        if len(queue) == 1:
            self._plan(self.now + work_s, "finish", chosen)

    def _finish(self, server: int) -> None:
        queue = self.servers[server].queue
        came_at, _, gateway = queue.popleft()
        self.views[gateway][server].in_flight -= 1
        self.took_s.append(self.now - came_at)
        if queue:
            self._plan(self.now + queue[0][1], "finish", server)


def main(argv: list[str] | None = None) -> int:
    return run(ABOUT, measure, argv)


def measure(settings: Settings) -> Measured:
    """All cases before the same arrivals."""
    seeds = 2 if settings.quick else 5
    results: dict[str, Any] = {}
    ratios = []
    for name, traffic in TRAFFIC.items():
        if settings.quick:
            traffic = replace(traffic, requests=200)
        told: dict[str, dict[str, float]] = {}
        of_one: list[float] = []
        for label, case in CASES.items():
            runs = [simulate(case, traffic, seed) for seed in range(seeds)]
            p95_s = [percentile(took_s, 95) for took_s in runs]
            of_one = of_one or p95_s
            ratio = median(here / one for here, one in zip(p95_s, of_one, strict=True))
            told[label] = {
                "mean_s": round(median(map(mean, runs)), 3),
                "p95_s": round(median(p95_s), 3),
                "p95_of_one": round(ratio, 3),
            }
            settings.progress(f"{name}: {label} {told[label]}")
        results[name] = told
        ratios.append(told["sharing"]["p95_of_one"])
    return Measured(results, {"sharing_p95": max(ratios)}, {"seeds": seeds})


def simulate(case: Case, traffic: Traffic, seed: int) -> list[float]:
    """Seconds from arrival to end of each request."""
    rng = random.Random(seed)
    at = 0.0
    arrivals: Arrivals = []
    pause_s = traffic.together * traffic.work_s / traffic.replicas / _LOAD
    while len(arrivals) < traffic.requests:
        at += rng.expovariate(1 / pause_s)
        arrivals += [
            (at, rng.expovariate(1 / traffic.work_s), rng.random()) for _ in range(traffic.together)
        ]
    fleet = Fleet(case, traffic.replicas)
    asyncio.run(fleet.run(arrivals, case, rng))
    return fleet.took_s


if __name__ == "__main__":
    sys.exit(main())
