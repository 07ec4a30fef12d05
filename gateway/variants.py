"""The rollout that gateways share, as one of them goes by it: a second edge for the share that a
controller leases.

Knows the record and when it is followed; what becomes of a request variant.py knows, how shares are
chosen the controller (evals/rollout.py). Without a rollout nothing of this is on a request's way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson

from gateway import problems
from gateway.candidate import candidate
from gateway.edge import Edge, Live
from gateway.orders import OBSERVED, OBSERVED_S, Orders, change, current
from gateway.variant import Variant
from runtime.wire import Problem
from telemetry import Observation

log = logging.getLogger("headgate.gateway")

LOOK_S = 0.2  # between looks at the record: so late does another gateway's rollback come here
LOST_S = 60.0  # at least, between two lines of the log about a record that cannot be followed


class Variants:
    """What this process makes of the record that all gateways share."""

    def __init__(self, live: Live, clock: Callable[[], float] = time.time) -> None:
        self.live = live
        self._clock = clock
        self._state = live.edge.state
        self._ended: dict[str, str] = {}  # rollouts -> why: for good, whatever a record says
        self._variant: Variant | None = None
        self.last: Mapping[str, Any] | None = None  # the rollout before, as it was told at its end
        self._left = ""  # what its controller said as it took it away
        self._ordered = ""  # the rollout of the record, whether it can be followed or not
        self._lost = ""  # why it cannot be, as the log was told
        self._lost_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Follows the record meanwhile."""
        task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            for one in (task, *self._tasks):
                one.cancel()
            await asyncio.gather(task, *self._tasks, return_exceptions=True)
            if self._variant is not None:
                await self._variant.shadows.end()

    async def _follow(self) -> None:
        while True:
            try:
                await self.look()
            except Exception as error:  # noqa: BLE001  # whatever a record says, the next is read
                self._lose(error)
                await self._take_down()
            else:
                self._find()
            await asyncio.sleep(LOOK_S)

    def _lose(self, error: Exception) -> None:
        """One line for as long as the reason is the same. A Problem says it all; of anything else,
        which would be a fault of ours, the log gets the place, too."""
        why = str(error) or type(error).__name__
        now = self._clock()
        if why == self._lost or (self._lost and now < self._lost_at + LOST_S):
            return
        self._lost, self._lost_at = why, now
        log.warning(
            "rollout %s cannot be followed by this gateway, where the baseline serves: %s; start "
            "it again with what is missing, or end the rollout",
            self._ordered or "(unknown)",
            why,
            exc_info=None if isinstance(error, Problem) else error,
        )

    def _find(self) -> None:
        if self._lost:
            self._lost = ""
            log.warning("this gateway can follow rollouts again")

    async def look(self) -> Variant | None:
        """Goes by what the record says now."""
        async with self._one_at_a_time:
            away = self._state.far is not None and not self._state.far.up
            if self._variant is not None:
                self._variant.suspended = away
            if not away:
                self._ordered = ""
                orders = await current(self._state.store)
                self._ordered = orders.id if orders is not None else ""
                await self._go_by(orders)
            return self._variant

    async def _go_by(self, orders: Orders | None) -> None:
        variant = self._variant
        if variant is not None and (orders is None or not _same(orders, variant.orders)):
            await self._take_down()
            variant = None
        if orders is None:
            return
        if why := self._ended.get(orders.id):
            if not orders.ended:
                self._spread(why)
            orders = orders.rolled_back(why, self._clock())
        if variant is None:
            if not orders.ended:
                await self._put_up(orders)
        else:
            if orders.ended and not variant.orders.ended:
                self._ended[orders.id] = orders.ended
                log.warning("rollout %s was rolled back elsewhere: %s", orders.id, orders.ended)
            variant.orders = orders

    async def _put_up(self, orders: Orders) -> None:
        edge = candidate(self.live.edge, orders)
        await self.live.begin(edge)
        self._variant = Variant(orders, edge, self._tell, self._spread, self._clock)
        self.live.beside = self._variant

    async def _take_down(self) -> None:
        told = self.told()
        variant, self._variant = self._variant, None
        if variant is not None and told is not None:
            self.last = {**told, "left": self._left or "away", "left_at": self._clock()}
            self._left = ""
            self.live.beside = None
            self.live.retire(variant.edge)
            await variant.shadows.end()

    # ---- told to the others ---------------------------------------------------------------------

    def _spread(self, why: str) -> None:
        """A rollback that was decided here."""
        variant = self._variant
        if variant is not None:
            self._ended[variant.orders.id] = why

            def ended(orders: Orders | None) -> Orders | None:
                same = orders is not None and orders.id == variant.orders.id
                return variant.orders if same else orders

            self._later(self._change(ended))

    async def _change(self, make: Callable[[Orders | None], Orders | None]) -> None:
        await change(self._state.store, make, self._clock())

    def _tell(self, seen: Observation) -> None:
        keep = self.live.edge.settings.admin.observations
        entry = orjson.dumps(seen.payload())
        self._later(self._state.store.append(OBSERVED, [entry], keep, OBSERVED_S))

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- steered (gateway/admin.py) -------------------------------------------------------------

    async def steer(self, make: Callable[[Orders | None], Orders | None]) -> Variant | None:
        """Changes the record, and goes by it here at once. Raises what `make` raises, and Problem
        where gateways could not hear of it."""
        far = self._state.far
        if far is None and self.live.edge.settings.processes > 1:
            raise problems.rollout_needs_store()
        if far is not None and not far.up:
            raise problems.store_away()
        try:
            await self._change(make)
        except TimeoutError:
            raise problems.store_away() from None
        return await self.look()

    async def remove(self, make: Callable[[Orders | None], None], result: str) -> None:
        """Takes the candidate away; `result`: how the rollout came out, as its controller says."""
        self._left = result
        try:
            await self.steer(make)
        finally:
            self._left = ""

    def roll_back(self, why: str, *, blamed: bool) -> None:
        """Here at once; the others hear of it."""
        if self._variant is not None:
            self._variant.roll_back(why, blamed=blamed)

    async def observed(self, after: str, limit: int) -> tuple[list[Any], str]:
        """Observations of all gateways since a cursor, and the next cursor."""
        found = await self._state.store.read(OBSERVED, after, limit)
        return [orjson.loads(one) for one in found.entries], found.cursor

    @property
    def edge(self) -> Edge | None:
        """The candidate's, while there is one."""
        return self._variant.edge if self._variant is not None else None

    @property
    def lost(self) -> str | None:
        """The rollout that this gateway cannot follow, and why not."""
        return f"{self._ordered or '(unknown)'}: {self._lost}" if self._lost else None

    def told(self) -> Mapping[str, Any] | None:
        """For who steers: the record as this process goes by it; None without a rollout."""
        variant = self._variant
        if variant is None:
            return None
        orders = variant.orders
        return {
            "id": orders.id,
            "name": orders.name,
            "share": orders.share,
            "shadow": orders.shadow,
            "lease_s": max(0.0, round(orders.until - self._clock(), 3)),
            "since": orders.since,
            "paused": orders.paused or None,
            "stage": dict(orders.stage) or None,
            "ended": orders.ended or None,
            "ended_at": orders.ended_at,
            "blamed": orders.blamed,
            "suspended": variant.suspended,
            "ready": variant.ready(),
            "roots": dict(orders.roots),
            "in_flight": variant.edge.pool.in_flight,
            "shadowed": variant.shadows.done,
            "replicas": [
                {"url": one.url, "state": one.state(), "fingerprint": one.fingerprint}
                for one in variant.edge.pool.replicas
            ],
        }


def _same(one: Orders, other: Orders) -> bool:
    """Whether the same edge goes by both: a restarted controller may have other workers."""
    made_of = (other.id, other.patch, other.replicas, other.fingerprints)
    return (one.id, one.patch, one.replicas, one.fingerprints) == made_of
