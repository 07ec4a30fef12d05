"""The life of the fleet: as many replicas as are wanted, each from its place to its end.

Knows no Ray and no policy file; the gateway is told in a discovery file who takes requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from command.processes import Health, ask_health
from command.supervisor import Backoff
from fleet.cluster import Cluster, Hosted, Job, Lost, Unheard
from fleet.places import Places
from fleet.placing import leaver
from fleet.scaling import Demand, Scale
from fleet.unit import PREFIX, Unit
from policies.fleet import Fleet

log = logging.getLogger("headgate.fleet")

TICK_S = 0.5  # between looks at replicas and demand
SILENT_S = 5.0  # neither worker nor cluster have said anything of a replica: it is lost
HUNG_S = 60.0  # a worker whose process runs has not answered: it is of no use
TOLD_S = 1.5  # until gateways have read the discovery file again


class Refused(Exception):
    """No replica could be had, and trying again would not help."""


class Controller:
    """Keeps the fleet, inside `run`."""

    def __init__(
        self,
        cluster: Cluster,
        settings: Fleet,
        job: Job,
        book: Path,
        demand: Callable[[], Awaitable[Demand | None]],
        *,
        ask: Callable[[str, int, str | None], Awaitable[tuple[int, Health]]] = ask_health,
        now: Callable[[], float] = time.monotonic,
        tick_s: float = TICK_S,
        told_s: float = TOLD_S,
    ) -> None:
        """`job` is every replica's, but for its name and number; `book` is the gateways' discovery
        file."""
        self._cluster = cluster
        self._settings = settings
        self._job = job
        self._book = book
        self._demand = demand
        self._ask = ask
        self._now = now
        self._tick_s = tick_s
        self._told_s = told_s
        self.units: list[Unit] = []
        self.target = settings.replicas_min
        self.served = False  # some replica has been ready
        self._numbers = 0
        self._scale = Scale(settings)
        self._places = Places(cluster, now, strict=settings.spread == "strict")
        self._backoff = Backoff()
        self._pause_until = now()
        self._failed: BaseException | None = None
        self._ending = asyncio.Event()

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of the fleet's GET /health."""
        ready = sum(unit.ready for unit in self.units)
        rows = [unit.row() for unit in self.units]
        body = {"status": "ready" if ready else "starting", "target": self.target, "fleet": rows}
        return (200 if ready else 503), body

    def end(self) -> None:
        """Lets `run` drain all replicas and return."""
        self._ending.set()

    async def run(self) -> None:
        """Until `end`. Raises Refused, and whatever went wrong in here."""
        try:
            await self._adopt()
            while not self._ending.is_set() and self._failed is None:
                demand = await self._demand() if self.served else None
                self.target = self._scale.decide(self._now(), self.target, demand)
                self._size()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._tick_s):
                        await self._ending.wait()
        finally:
            await self._end_all()
        if self._failed is not None:
            raise self._failed

    # ---- how many -------------------------------------------------------------------------------

    def _size(self) -> None:
        """Begins what is missing, and ends what is too much."""
        staying = [unit for unit in self.units if not unit.leaving.is_set()]
        for _ in range(len(staying), self.target):
            if self._now() < self._pause_until:
                return
            self._begin(self._unit())
        for _ in range(self.target, len(staying)):
            unit = leaver(staying)
            staying.remove(unit)
            log.info("%s is not wanted any more: it drains", unit.name)
            self._leave(unit)

    def _unit(self) -> Unit:
        self._numbers += 1
        return Unit(self._numbers, self._now())

    def _begin(self, unit: Unit, hosted: Hosted | None = None) -> None:
        self.units.append(unit)
        unit.task = asyncio.create_task(self._live(unit, hosted))
        unit.task.add_done_callback(self._notice)

    def _notice(self, task: asyncio.Task[None]) -> None:
        """A bug in one replica's life ends them all, and is raised by `run`."""
        if not task.cancelled() and task.exception() is not None:
            self._failed = task.exception()

    def _leave(self, unit: Unit) -> None:
        unit.leaving.set()
        if not unit.ready and unit.task is not None:
            unit.task.cancel()

    async def _adopt(self) -> None:
        """What an earlier life of this program has left goes on."""
        for name, (domain, hosted) in (await self._cluster.adopt()).items():
            unit = Unit(int(name.removeprefix(PREFIX)), self._now(), "starting", domain)
            self._numbers = max(self._numbers, unit.number)
            self._begin(unit, hosted)
        self.target = max(self.target, min(len(self.units), self._settings.replicas_max))

    async def _end_all(self) -> None:
        tasks = [unit.task for unit in self.units if unit.task is not None]
        for unit in self.units:
            self._leave(unit)
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- one replica ----------------------------------------------------------------------------

    async def _live(self, unit: Unit, hosted: Hosted | None) -> None:
        """From its place to its end."""
        try:
            if hosted is None:
                await self._places.take(unit, self.units)
                unit.state = "starting"
                hosted = await self._cluster.host(
                    replace(self._job, name=unit.name, rank=unit.number)
                )
            await self._start(unit, hosted)
            await self._watch(unit, hosted)
            await self._drain(unit, hosted)
        except Lost as lost:
            self._note(unit, lost)
        finally:
            self.units.remove(unit)
            self._publish()
            if hosted is not None and unit.leaving.is_set():
                await hosted.stop()
            await self._cluster.release(unit.name)

    async def _start(self, unit: Unit, hosted: Hosted) -> None:
        looking = asyncio.create_task(self._renew(hosted))
        try:
            async with asyncio.timeout(self._settings.start_timeout_s):
                unit.url = await hosted.start()
        except Unheard as unheard:
            raise Lost(str(unheard)) from None
        except TimeoutError:
            raise Lost(f"not ready after {self._settings.start_timeout_s:g} s") from None
        finally:
            looking.cancel()
        unit.state = "ready"
        self.served = True
        took_s = self._now() - unit.began_at
        log.info("%s is ready at %s after %.1f s", unit.name, unit.url, took_s)
        self._publish()

    async def _renew(self, hosted: Hosted) -> None:
        """A model may load for longer than a lease lasts."""
        while True:
            with contextlib.suppress(Lost, Unheard):  # `start` says so itself
                await hosted.look()
            await asyncio.sleep(self._tick_s)

    async def _watch(self, unit: Unit, hosted: Hosted) -> None:
        """Until it is to leave. Raises Lost."""
        heard_at = self._now()
        while not unit.leaving.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._tick_s):
                    await unit.leaving.wait()
            heard, patience_s = await self._hear(unit, hosted)
            if heard:
                heard_at = self._now()
            elif self._now() - heard_at >= patience_s:
                raise Lost(f"its worker has not answered for {patience_s:g} s")

    async def _hear(self, unit: Unit, hosted: Hosted) -> tuple[bool, float]:
        """Whether the worker answers, and how long it may stay silent. Raises Lost when it is gone.

        A worker that answers is there, whatever the cluster says of its actor: a control plane that
        is away must not empty the fleet.
        """
        answers, seen = await asyncio.gather(
            self._answers(unit), hosted.look(), return_exceptions=True
        )
        if isinstance(answers, BaseException):
            raise answers
        if answers:
            return True, HUNG_S
        match seen:
            case Unheard():
                return False, SILENT_S
            case BaseException():
                raise seen
            case _ if not seen.running:
                raise Lost("\n  ".join(["its worker has ended", *seen.last_words]))
        return False, HUNG_S

    async def _answers(self, unit: Unit) -> bool:
        parts = urlsplit(unit.url or "")
        status, health = await self._ask(parts.hostname or "", parts.port or 0, self._job.key)
        if status != 200:
            return False
        unit.busy = int(health.get("running", 0)) + int(health.get("waiting", 0))
        return True

    async def _drain(self, unit: Unit, hosted: Hosted) -> None:
        """Gateways send nothing new; what runs may end, within the drain's time."""
        unit.state = "draining"
        self._publish()
        until = self._now() + self._job.drain_s
        await asyncio.sleep(self._told_s)
        while self._now() < until and await self._is_busy(unit, hosted):  # noqa: ASYNC110  # asked
            await asyncio.sleep(self._tick_s)

    async def _is_busy(self, unit: Unit, hosted: Hosted) -> bool:
        """Raises Lost."""
        heard, _ = await self._hear(unit, hosted)
        return heard and unit.busy > 0

    def _note(self, unit: Unit, lost: Lost) -> None:
        """A replica is lost: what is missing is begun again, after a pause that grows."""
        if lost.refused and not self.served:
            self._failed = Refused(f"{unit.name}: {lost}")
            return
        if unit.domain is not None:
            self._places.shun(unit.domain)
        pause_s = self._backoff.after(self._now() - unit.began_at)
        self._pause_until = self._now() + pause_s
        log.warning("%s is lost: %s; another one begins in %g s", unit.name, lost, pause_s)

    def _publish(self) -> None:
        """Writes who takes requests, and who goes, as a deployment tool does: in one step."""
        rows = [
            {"url": unit.url, "drain": unit.state == "draining"}
            for unit in self.units
            if unit.state in ("ready", "draining")
        ]
        fresh = self._book.with_suffix(".new")
        fresh.write_text(json.dumps({"replicas": rows}, indent=1) + "\n", encoding="utf-8")
        fresh.replace(self._book)
