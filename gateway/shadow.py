"""Requests that the candidate answers too, for nobody: its answer is observed and thrown away.

They go beside the baseline's answer, at the same time and with the same bytes, so that each makes a
pair; they take no tenant's limits, and no more at once than is allowed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

from gateway.edge import Asked, Edge
from gateway.keys import ANYONE
from gateway.observe import Watch, failed, observation
from gateway.relay import Silence, relay
from gateway.reply import Reply
from gateway.tiers import Service
from gateway.usage import usage_of
from runtime.wire import Problem
from telemetry import Observation

log = logging.getLogger("headgate.gateway")


@dataclass(slots=True, eq=False)
class Mirror:
    """One request's second way. `same` comes when the baseline has answered."""

    same: asyncio.Future[bytes] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def answered(self, digest: bytes) -> None:
        """The baseline's answer is complete, with this text."""
        if not self.same.done():
            self.same.set_result(digest)


class Shadows:
    """The mirrored requests of one candidate."""

    def __init__(self, edge: Edge, most: int, saw: Callable[[Observation], None]) -> None:
        self._edge = edge
        self._most = most
        self._saw = saw
        self._tasks: set[asyncio.Task[None]] = set()
        self.done = 0

    def mirror(self, asked: Asked, cluster: str) -> Mirror | None:
        """Begins to ask the candidate; None where enough is mirrored already."""
        if len(self._tasks) >= self._most:
            return None
        mirror = Mirror()
        task = asyncio.create_task(self._ask(asked, cluster, mirror, time.monotonic()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return mirror

    async def end(self) -> None:
        """Leaves what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(self, asked: Asked, cluster: str, mirror: Mirror, at: float) -> None:
        """What passes from `at` on, while the baseline is at work, is no time of the candidate's;
        what both had waited before is."""
        away = Nowhere()
        reply = Reply(away, asked.reply.request_id, away)
        watch = reply.through(Watch)
        came = asked.came + time.monotonic() - at
        unseen = replace(asked, came=came, reply=reply, outgoing=away)
        of = asked.reply.trail
        if of is not None and of.trace_id:
            reply.trail = of.beside()
        problem: Problem | None = None
        self._edge.state.begin()
        try:
            self._edge.pool.enter()
        except Problem:
            return  # it is full, or ends
        try:
            await self._serve(unseen, reply)
        except Problem as error:
            problem = error
        except Exception:
            log.exception("a mirrored request failed inside the gateway")
            problem = Problem(500, "a mirrored request failed inside the gateway", code="internal")
        finally:
            self._edge.pool.leave()
            if of is not None and reply.trail is not None:
                self._edge.tracer.end_shadow(of, self._edge.pool.ask)
        seen = observation(self._edge, unseen, watch, "candidate", cluster, time.time())
        seen = (
            replace(seen, source="shadow")
            if problem is None
            else replace(failed(seen, problem), source="shadow")
        )
        if problem is None and seen.ok:
            seen = await self._compared(seen, watch, mirror)
        self.done += 1
        self._saw(seen)

    async def _compared(self, seen: Observation, watch: Watch, mirror: Mirror) -> Observation:
        """With whether both arms said the same, where the baseline has answered at all."""
        try:
            async with asyncio.timeout(self._edge.settings.admin.patience_s):
                same = await mirror.same == watch.speech.digest
        except TimeoutError:
            return seen
        return replace(seen, scores={**seen.scores, "same": float(same)})

    async def _serve(self, asked: Asked, reply: Reply) -> None:
        """As gateway/chat.py answers, with nobody's limits and no answer that was given before."""
        edge, call, tenant = self._edge, asked.call, asked.tenant
        service: Service = edge.tiers.tier(call, tenant)
        reply.more.append((b"x-headgate-tier", service.tier.encode()))
        call = edge.tiers.told(call, tenant, service)
        call, _ = await edge.shortener.trim(call, tenant.name, service.tier)
        prompt = await edge.prompts.read(call)
        trip = edge.routing.trip(call, prompt, service.tier, tenant.name)
        trip.trail = reply.trail
        reply.more.append((b"x-headgate-receipt", trip.receipt.id.encode()))
        silence = Silence(edge.settings, reply, stream=False)
        place = edge.admission.place(call, ANYONE, service, prompt.tokens)
        async with place, edge.pool.open(call, trip) as answer:
            if answer.status == 200:
                place.began()
            silence.answering(answer.interrupt)
            silence.watch()
            try:
                await relay(answer, reply, silence, stream=call.stream)
                if trip.trail is not None:
                    trip.trail.usage = usage_of(reply.recent)
            finally:
                silence.end()


class Nowhere:
    """Ways out that lead to nobody."""

    asked = True
    lags = False

    async def sent(self) -> None:
        """It is at once."""

    def cut(self) -> None:
        """Nothing lies there."""

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """Takes what would go to a client."""

    def stream(self, chunk: bytes) -> bool:
        return bool(chunk) or True

    def when_writable(self, go_on: Callable[[], None]) -> None:
        go_on()

    def when_gone(self, leave: Callable[[], None] | None) -> bool:
        return leave is None or True
