"""The pool of replicas: connections to them, places under way, and a request opened on one.

Own workers and foreign OpenAI-compatible servers take the same way; they differ in whether they may
see the client's key, and in how their health is read (gateway/health.py).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

from gateway import problems
from gateway.answer import Answer, Attempt
from gateway.attempts import Attempts
from gateway.call import Call
from gateway.client import Client
from gateway.discovery import Source
from gateway.fleet import Fleet
from gateway.health import ask
from gateway.replica import Replica
from gateway.response import Stale
from gateway.rest import Rest
from gateway.resume import Opened, Resumable
from gateway.retries import Budget
from gateway.routing import Trip
from gateway.splice import resumable
from policies.schema import Gateway
from runtime.wire import TOKEN_IDS_HEADER, Problem
from telemetry.phases import TIMING_HEADER

GOODBYE_S = 1.0  # for the last words of requests that outlived the drain


class Pool:
    """All replicas, the connections to them, and how many requests are under way."""

    def __init__(
        self,
        settings: Gateway,
        replicas: Sequence[Replica],
        sources: Sequence[Source] = (),
        known: Sequence[Replica] = (),
        rng: random.Random | None = None,
    ) -> None:
        """`known` are replicas of which an earlier pool has learned."""
        self.settings = settings
        self._fleet = Fleet(replicas, sources, known, settings.breaker)
        self.draining = False
        self.in_flight = 0
        # Who else may go on with a broken stream; nothing begins there.
        self.rescuers: Callable[[], Sequence[Replica]] = tuple
        retries, hedge = settings.retries, settings.hedge
        self._budget = Budget(retries.budget_share, retries.budget_min_per_s)
        self._duplicates = Budget(hedge.budget_share if hedge else 0.0, 0.0)
        self._rng = rng or random.Random()  # noqa: S311  # ties between replicas, no secret
        self._client: Client | None = None
        self._empty = asyncio.Event()

    @property
    def replicas(self) -> tuple[Replica, ...]:
        return self._fleet.replicas

    @replicas.setter
    def replicas(self, replicas: Sequence[Replica]) -> None:
        self._fleet.replicas = tuple(replicas)

    @property
    def looks_fail(self) -> bool:
        """Whether a source cannot be read now, so that nobody knows who is there."""
        return any(source.error is not None for source in self._fleet.sources)

    # ---- lifespan -------------------------------------------------------------------------------

    async def __aenter__(self) -> Pool:
        self._client = Client(self.settings.connect_timeout_s)
        await self._fleet.begin(self._client)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await self.emptied()
        await self._fleet.end()
        if self._client is not None:
            await self._client.close()

    # ---- one request ----------------------------------------------------------------------------

    def enter(self) -> None:
        """Takes a place. Raises Problem 503; whoever got one gives it back with `leave`."""
        if self.draining:
            raise problems.draining()
        if self.in_flight >= self.settings.max_in_flight:
            raise problems.overloaded(self.settings.max_in_flight)
        self.in_flight += 1

    def leave(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._empty.set()

    async def emptied(self) -> None:
        """Returns once nobody has a place."""
        while self.in_flight:
            self._empty.clear()
            await self._empty.wait()

    def open(self, call: Call, trip: Trip) -> Opening:
        """`async with` it, the answer to the call, from its first event or its headers on; closed
        on the way out.

        Replicas are tried by the rules of attempts.py. Entering raises Problem.
        """
        return Opening(self, call, trip)

    async def answer(self, call: Call, trip: Trip) -> Opened:
        """For whoever closes it."""
        now = asyncio.get_running_loop().time()
        self._budget.request(now)
        if self.settings.hedge is not None:
            self._duplicates.request(now, len(call.body))
        first = await self._attempts(trip, call, lambda: self.replicas).answer()
        if self._resumes(call) and first.status == 200 and first.is_stream:
            rest = Rest(self._all, partial(self._attempts, trip), self._budget, now)
            return Resumable(first, call, rest.open)
        return first

    def _all(self) -> Sequence[Replica]:
        return (*self.replicas, *self.rescuers())

    def _attempts(
        self, trip: Trip, call: Call, replicas: Callable[[], Iterable[Replica]]
    ) -> Attempts:
        return Attempts(
            call, self.settings, self._budget, self._duplicates, self._rng, self._send,
            trip, replicas, self._why_none, tried=trip.receipt.attempts,
        )  # fmt: skip

    def _resumes(self, call: Call) -> bool:
        return self.settings.resume == "auto" and resumable(call)

    async def ask_all(self, path: str) -> list[dict[str, Any] | None]:
        """What each replica answers to a GET, in their order; None where that is no JSON object."""
        assert self._client is not None, "the pool is used outside of its lifespan"
        client = self._client
        return await asyncio.gather(*(ask(client, replica, path) for replica in self.replicas))

    def _why_none(self, model: str) -> Problem:
        states = [replica.state() for replica in self.replicas]
        healthy = [replica for replica in self.replicas if replica.healthy]
        if any(model in replica.models for replica in self.replicas):
            now = asyncio.get_running_loop().time()
            waits = [r.circuit.wait_s(now) for r in healthy if model in r.models]
            return problems.no_replica(model, states, min(waits, default=1.0))
        if healthy:
            served = sorted({name for replica in healthy for name in replica.models})
            down = [replica.state() for replica in self.replicas if not replica.healthy]
            return problems.model_not_found(model, served, down)
        if any(not replica.tried for replica in self.replicas):
            return problems.loading(states)
        return problems.no_replica(model, states)

    def _headers(self, attempt: Attempt, call: Call) -> dict[str, str]:
        replica, headers = attempt.replica, dict(call.headers)
        headers["content-type"] = "application/json"
        headers["accept-encoding"] = "identity"
        if replica.api_key is not None:
            headers["authorization"] = f"Bearer {replica.api_key}"
        elif call.authorization is not None and not replica.own:
            headers["authorization"] = call.authorization
        if replica.kind == "headgate" and self._resumes(call):
            headers[TOKEN_IDS_HEADER] = "1"
        if attempt.hop is not None:
            attempt.hop.mark(headers)
            if replica.kind == "headgate":
                headers[TIMING_HEADER] = "1"
        return headers

    async def ask(self, replica: Replica, path: str, method: str = "GET") -> dict[str, Any] | None:
        """What one replica answers; None where that is no JSON object."""
        assert self._client is not None, "the pool is used outside of its lifespan"
        return await ask(self._client, replica, path, method)

    async def _send(self, attempt: Attempt, call: Call) -> Answer:
        """Sends the call's bytes, waits for the headers. Raises Unreachable, Stale, Failed."""
        assert self._client is not None, "the pool is used outside of its lifespan"
        replica = attempt.replica
        try:
            response = await self._client.send(
                "POST", replica.url, call.path, self._headers(attempt, call), call.body
            )
        except Stale:
            replica.doubt.set()
            raise
        return Answer(response, attempt)


class Opening:
    """A call's answer, closed on the way out."""

    __slots__ = ("_answer", "_call", "_pool", "_trip")

    def __init__(self, pool: Pool, call: Call, trip: Trip) -> None:
        self._pool, self._call, self._trip = pool, call, trip
        self._answer: Opened | None = None

    async def __aenter__(self) -> Opened:
        answer = self._answer = await self._pool.answer(self._call, self._trip)
        return answer

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        answer = self._answer
        assert answer is not None, "it was entered"
        well = answer.well if error is None else None  # who leaves says nothing of the replica
        if isinstance(error, Problem) and error.code in problems.REPLICA_FAILED:
            well = False
            answer.attempt.replica.doubt.set()
        answer.close(well=well)
