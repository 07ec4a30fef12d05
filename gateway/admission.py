"""A place for each request: within its tenant's limits, in its turn, or an honest refusal.

What waits, waits here, where queues.py orders it; replicas get what they can take at once
(capacity.py). Knows moments and futures; knows neither bodies nor connections.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from gateway import problems
from gateway.call import Call
from gateway.capacity import Capacity
from gateway.keys import Known
from gateway.limits import Allowance, Limits
from gateway.queues import ACTIVE_S, PATIENT_S, Queue, Room, Ticket
from gateway.tallies import Tallies
from gateway.tiers import DEADLINE_HEADER, TTFT_HEADER, Service
from gateway.trail import Interval
from gateway.usage import Usage
from policies.schema import Deployment
from runtime.wire import Problem

FOREIGN_PLACES = 256  # sequences at once at a server that does not say how many it holds
ROOM_S = 0.05  # how long what is known of the replicas' state counts
TOLD_AGAIN_S = 0.001  # a wait that is worth telling the replica
LATE = 2.0  # times its target for the first token, after which one that still waits is sent away
LATE_MIN_S = 5.0
ANSWER_TOKENS = 128  # expected before anything is known
SERVED_MAX = 1024  # sets of replicas that are remembered


class Able(Protocol):
    """A replica, as far as it matters here."""

    @property
    def identity(self) -> Hashable: ...
    @property
    def own(self) -> bool: ...
    @property
    def healthy(self) -> bool: ...
    @property
    def models(self) -> Iterable[str]: ...


@dataclass(slots=True, eq=False)
class Front:
    """One set of replicas, what waits before it, and what was learned of it."""

    queue: Queue
    capacity: Capacity = field(default_factory=Capacity)
    room: Room = Room(0)
    seen_at: float = -1e9
    first_token_s: float = 0.0  # from a replica's getting a request to its first token, on average


class Admission:
    """The places of one gateway process."""

    def __init__(
        self,
        policy: Deployment,
        replicas: Callable[[], Sequence[Able]],
        limits: Limits,
        clock: Callable[[], float],
        rng: random.Random,
        before: Admission | None = None,
    ) -> None:
        settings = policy.gateway
        self.tiers = settings.tiers
        self.limits = limits
        self.clock = clock
        self._replicas = replicas
        self._rng = rng
        self._processes = settings.processes
        self._foreign = settings.running_per_replica or FOREIGN_PLACES
        sequences = policy.runtime.max_sequences if policy.runtime else FOREIGN_PLACES
        self._own = settings.running_per_replica or sequences
        same = before is not None and before.tiers == self.tiers
        self.fronts: dict[Hashable, Front] = before.fronts if before is not None and same else {}
        self._known: dict[str, Front] = {}  # by model, for as long as nothing has changed
        self.tallies: Tallies = before.tallies if before is not None else Tallies()
        self.answer_tokens = dict.fromkeys(self.tiers, float(ANSWER_TOKENS))

    def place(
        self,
        call: Call,
        tenant: Known,
        service: Service,
        tokens: int,
        uncached: Callable[[], int] | None = None,
    ) -> Admitted:
        """`async with` this a request has its place. Entering raises Problem 400, 429, 503, 504.

        `uncached`: tokens of the prompt that no replica has now; asked of those that have to wait.
        """
        return Admitted(self, call, tenant, service, tokens, uncached)

    async def counted(self, tenant: Known, tier: str) -> list[tuple[bytes, bytes]]:
        """Takes one request, and no tokens, for an answer that needs no replica; what the client is
        told of its limits. Raises Problem 429, 503."""
        allowance = await self.allow(tenant, tier, None)
        return allowance.headers() if allowance is not None else []

    async def allow(self, tenant: Known, tier: str, tokens: int | None) -> Allowance | None:
        """As `Limits.take`; who gets nothing is counted."""
        try:
            return await self.limits.take(tenant, tokens)
        except Problem:
            self.tallies.of(tier).limited += 1
            raise

    def health(self) -> list[dict[str, Any]]:
        """For /health: what waits and runs before each set of replicas, and what it can take."""
        return [
            {
                "places": front.room.places,
                "prompt_tokens_per_s": front.capacity.rate,
                "tiers": {
                    name: {"waiting": line.waiting, "running": line.running}
                    for name, line in front.queue.lines.items()
                },
            }
            for front in self.fronts.values()
        ]

    # ---- the replicas ---------------------------------------------------------------------------

    def front(self, model: str, now: float) -> Front | None:
        """The queue before the replicas that serve a model; None where none is well."""
        known = self._known.get(model)
        if known is not None and now - known.seen_at <= ROOM_S:
            return known
        able = [r for r in self._replicas() if model in r.models]
        well = [r for r in able if r.healthy]
        if not well:
            return None
        key = frozenset(r.identity for r in able)
        front = self.fronts.get(key)
        if front is None:
            if len(self.fronts) >= SERVED_MAX:
                self._forget()
            front = self.fronts[key] = Front(Queue(self.tiers))
        if known is not front:
            self._known = {**self._known, model: front} if len(self._known) < SERVED_MAX else {}
        front.seen_at = now
        places = [self._own if r.own else self._foreign for r in well]
        front.room = front.capacity.room(
            [max(1, count // self._processes) for count in places],
            self._tightest_s(front.queue, now),
            ordered=all(r.own for r in able),
        )
        return front

    def _forget(self) -> None:
        """Sets of replicas where nothing waits or runs."""
        idle = [
            key for key, one in self.fronts.items() if not one.queue.waiting + one.queue.running
        ]
        for key in idle:
            del self.fronts[key]

    def _tightest_s(self, queue: Queue, now: float) -> float | None:
        """The least target for a first token among the tiers that are asked for."""
        targets = [
            line.rules.ttft_ms / 1000
            for line in queue.lines.values()
            if line.rules.ttft_ms is not None and line.asked_at > now - ACTIVE_S
        ]
        return min(targets, default=None)

    def shed(self, front: Front, ticket: Ticket, patience_s: float | None) -> bool:
        chance = front.queue.shed_chance(ticket.tier, patience_s)
        return chance > 0 and self._rng.random() < chance

    def advance(self, front: Front, now: float) -> None:
        """Lets go whom there is room for."""
        queue = front.queue
        while queue.waiting and (ticket := queue.take(front.room, now)) is not None:
            if ticket.reading:
                front.capacity.reading(now)
            grant = ticket.grant
            if grant is not None and not grant.done():
                grant.set_result(None)


class Admitted:
    """One request's way in, its place, and its way out; nothing of it stays behind."""

    __slots__ = (
        "_admission", "_allowance", "_began", "_call", "_front", "_sent", "_service", "_tenant",
        "_ticket", "_uncached", "_usage", "admit", "arrived", "charged", "queue", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        admission: Admission,
        call: Call,
        tenant: Known,
        service: Service,
        tokens: int,
        uncached: Callable[[], int] | None = None,
    ) -> None:
        self._admission = admission
        self._call = call
        self._tenant = tenant
        self._service = service
        self._allowance: Allowance | None = None
        self._front: Front | None = None
        self._ticket: Ticket | None = None
        self._sent = 0.0
        self._began: float | None = None
        self._usage: Usage | None = None
        self._uncached = uncached
        self.tokens = tokens
        self.arrived: float | None = None  # at the gateway, before it came here; monotonic seconds
        self.charged: int | None = None  # to the tenant's limits, at the end
        self.admit, self.queue = Interval(), Interval()

    # ---- in -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Admitted:
        admission, service = self._admission, self._service
        limit = service.rules.prompt_tokens
        if limit is not None and self.tokens > limit:
            raise problems.prompt_beyond_tier(self.tokens, service.tier, limit)
        expected = self._expected()
        with self.admit:
            if self._tenant.rights is not None:
                tokens = self.tokens + expected
                self._allowance = await admission.allow(self._tenant, service.tier, tokens)
        now = admission.clock()
        tally = admission.tallies.of(service.tier)
        front = self._front = admission.front(self._call.model, now)
        if front is None:  # the pool says why, and knows whether another moment would help
            self._sent = now
            return self
        ticket = self._ticket = self._make_ticket(front, now, expected)
        if front.queue.offer(ticket, front.room, now):
            if ticket.reading:
                front.capacity.reading(now)
            tally.admitted += 1
            self._sent = now
            return self
        try:
            with self.queue:
                await self._wait(front, ticket, now)
        except BaseException:
            if self._allowance is not None:
                await admission.limits.settle(self._allowance, 0)
            raise
        tally.admitted += 1
        tally.waited_s += self._sent - now
        return self

    @property
    def pace_per_s(self) -> float | None:
        """Chunks that the client gets a second at most, where it is a stream and its tier says."""
        return self._service.rules.pace_chunks_per_s if self._call.stream else None

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the client is told of its limits."""
        return self._allowance.headers() if self._allowance is not None else []

    def _expected(self) -> int:
        """Tokens of the answer: what was asked for at most, else what answers of the tier had."""
        data = self._call.data
        usual = self._admission.answer_tokens[self._service.tier]
        most = data.get("max_completion_tokens") or data.get("max_tokens")
        copies = data.get("n")
        one = min(most, usual) if isinstance(most, int) and most > 0 else usual
        return round(one * (copies if isinstance(copies, int) and 0 < copies <= 128 else 1))

    def _make_ticket(self, front: Front, now: float, answer_tokens: int) -> Ticket:
        service, rights = self._service, self._tenant.rights
        ticket = Ticket(
            service.tier,
            self._tenant.name,
            rights.weight if rights is not None else 1.0,
            self.tokens,
            answer_tokens,
            now,
            streams=self._call.stream,
        )
        if service.asked and service.ttft_ms is not None:
            ahead_s = front.first_token_s if self._call.stream else 0.0
            ticket.due = now + max(service.ttft_ms / 1000 - ahead_s, 0.001)
        return ticket

    async def _wait(self, front: Front, ticket: Ticket, now: float) -> None:
        """Returns once the ticket runs. Raises Problem 503 or 504 where it will not, or not in
        time."""
        admission, service = self._admission, self._service
        tally = admission.tallies.of(service.tier)
        promised_s = None
        patience_s = PATIENT_S
        if service.asked and service.ttft_ms is not None:
            promised_s = max(ticket.due - now, 0.001)
            patience_s = max(LATE * service.ttft_ms / 1000, LATE_MIN_S)
        deadline_s = None
        if service.deadline_ms is not None:
            deadline_s = service.deadline_ms / 1000 - front.first_token_s
        if admission.shed(front, ticket, promised_s):
            tally.shed += 1
            wait_s = front.queue.wait_s(service.tier, promised=promised_s is not None)
            raise problems.saturated(service.tier, wait_s - (promised_s or 0) / 2)
        loop = asyncio.get_running_loop()
        ticket.grant = loop.create_future()
        ticket.uncached = ticket.tokens if self._uncached is None else self._uncached()
        front.queue.wait(ticket, now)
        admission.advance(front, now)
        try:
            async with asyncio.timeout(min(patience_s, deadline_s or patience_s)):
                await ticket.grant
        except BaseException as error:
            self._unqueue(front, ticket)
            if not isinstance(error, TimeoutError):
                raise
            tally.shed += 1
            waited_s = admission.clock() - now
            if deadline_s is not None and deadline_s <= patience_s:
                raise problems.too_late(service.tier, waited_s) from None
            raise problems.saturated(service.tier, waited_s) from None
        self._sent = admission.clock()
        self._tell_again(self._sent - now)

    def _unqueue(self, front: Front, ticket: Ticket) -> None:
        """For one that leaves while it waits, or just as its turn had come."""
        if ticket.waiting:
            front.queue.drop(ticket)
        elif ticket.running:
            now = self._admission.clock()
            front.queue.leave(ticket, now, 0)
            self._went(front, now)

    def _tell_again(self, waited_s: float) -> None:
        """What is left of the targets, for a replica that counts from when it gets the request."""
        if waited_s < TOLD_AGAIN_S or not self._service.asked:
            return
        headers, waited_ms = self._call.headers, 1000 * waited_s
        for name, target_ms in (
            (TTFT_HEADER, self._service.ttft_ms),
            (DEADLINE_HEADER, self._service.deadline_ms),
        ):
            if target_ms is not None and name in headers:
                headers[name] = f"{max(1.0, target_ms - waited_ms):.10g}"

    # ---- out ------------------------------------------------------------------------------------

    def began(self) -> None:
        """An answer has begun, with its first token where it is a stream."""
        front, ticket = self._front, self._ticket
        now = self._began = self._admission.clock()
        if front is None or ticket is None or not ticket.reading:
            return
        queue = front.queue
        queue.begin(ticket)
        front.first_token_s += 0.1 * (now - self._sent - front.first_token_s)
        front.capacity.read(ticket.tokens, now, waiting=queue.waiting > 0, idle=not queue.reading)
        if self._service.ttft_ms is not None:
            tally = self._admission.tallies.of(self._service.tier)
            in_time = now - (self.arrived or ticket.came) <= self._service.ttft_ms / 1000
            tally.in_time += in_time
            tally.late += not in_time
        self._admission.advance(front, now)

    def used(self, usage: Usage | None) -> None:
        """What the answer said that it took, where it said so."""
        self._usage = usage

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        admission, usage = self._admission, self._usage
        front, ticket = self._front, self._ticket
        now = admission.clock()
        if front is not None and ticket is not None and ticket.running:
            full = front.queue.waiting > 0
            front.queue.leave(ticket, now, usage.answer_tokens if usage is not None else None)
            self._learn(front, usage, now, full=full)
            self._went(front, now)
        if self._allowance is not None:
            used = usage.prompt_tokens + usage.answer_tokens if usage is not None else None
            if used is None and self._began is None:
                used = 0  # nothing was answered
            if used is not None:
                self.charged = used
                await admission.limits.settle(self._allowance, used)

    def _went(self, front: Front, now: float) -> None:
        front.capacity.left(now, idle=not front.queue.reading)
        self._admission.advance(front, now)

    def _learn(self, front: Front, usage: Usage | None, now: float, *, full: bool) -> None:
        if usage is None or self._began is None:
            return
        usual = self._admission.answer_tokens
        tier = self._service.tier
        usual[tier] += 0.05 * (usage.answer_tokens - usual[tier])
        target_ms = self._service.rules.tpot_ms
        if self._call.stream and usage.answer_tokens > 1 and target_ms is not None:
            tpot_s = (now - self._began) / (usage.answer_tokens - 1)
            tally = self._admission.tallies.of(tier)
            in_pace = tpot_s <= target_ms / 1000
            tally.in_pace += in_pace
            tally.slow += not in_pace
            front.capacity.answered(tpot_s, target_ms / 1000, now, full=full)
