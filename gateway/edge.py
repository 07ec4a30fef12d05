"""What a gateway process works with, as one value that is replaced as a whole.

A request takes the edge that is current when it begins and keeps it to its end, so that a new
policy never changes what is under way.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from cache.prefix_index import PrefixIndex
from gateway.account import Account, Arm
from gateway.admission import Admission
from gateway.call import Call, RawHeaders
from gateway.discovery import sources_of
from gateway.keys import Keys, Known, salt_secret
from gateway.kv_events import KvEvents
from gateway.ladder import Ladder
from gateway.limits import Limits
from gateway.meters import Meters
from gateway.prompt import Prompts
from gateway.record import Recorder
from gateway.replica import Replica
from gateway.reply import Client, Reply
from gateway.response_cache import Answers, Recall
from gateway.route import eligible
from gateway.routing import Routing
from gateway.shorten import Shortener
from gateway.state import State, in_memory
from gateway.tiers import Tiers
from gateway.tracing import Tracer
from gateway.upstream import Pool
from policies.enabling import Gated
from policies.schema import Deployment, Gateway, Tracing
from policies.trimming import ResponseCache
from telemetry.otlp import exporter


@dataclass(frozen=True, slots=True, eq=False)
class Edge:
    """The parts that serve by one policy."""

    policy: Deployment
    pool: Pool
    keys: Keys
    tiers: Tiers
    prompts: Prompts
    routing: Routing
    state: State  # of the process: the same for every edge
    admission: Admission
    shortener: Shortener
    events: KvEvents
    ladder: Ladder
    tracer: Tracer
    meters: Meters
    arm: Arm = "baseline"
    answers: Answers | None = None
    recorder: Recorder | None = None

    @property
    def index(self) -> PrefixIndex:
        return self.events.index

    @property
    def settings(self) -> Gateway:
        return self.policy.gateway

    def account(self, asked: Asked) -> Account:
        """`with` it, the answer by this edge is counted."""
        call, pool = asked.call, self.pool

        def served() -> bool:
            return any(call.model in replica.models for replica in pool.replicas)

        return Account(self.meters, self.arm, call, asked.reply, asked.came, asked.read, served)

    def recall(self, call: Call, tenant: str, tier: str) -> Recall | None:
        """Where this request may get an answer that was given before, or leave one."""
        if self.answers is None:
            return None
        could = eligible(self.pool.replicas, call.model)
        return self.answers.recall(
            call, tenant, tier, {one.fingerprint for one in could}, time.time()
        )

    def recording(self, asked: Asked, headers: RawHeaders) -> AbstractContextManager[object]:
        """Around the answer to a request, which is recorded if the policy wants it to be."""
        if self.recorder is None:
            return UNRECORDED
        recording = self.recorder.request(asked.call, headers, asked.tenant.name, asked.reply)
        return recording or UNRECORDED

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The parts that live over time: begun in this order, ended in reverse."""
        async with AsyncExitStack() as parts:
            for part in (self.prompts, self.pool, self.events.following(self.pool)):
                await parts.enter_async_context(part)
            if self.recorder is not None:
                await parts.enter_async_context(self.recorder)
            yield


UNRECORDED = nullcontext()


def build(
    policy: Deployment,
    replicas: Sequence[Replica],
    before: Edge | None = None,
    state: State | None = None,
    arm: str = "",
) -> Edge:
    """The parts by a policy. What `before` has learned and still holds goes on in the new edge,
    which serves beside it where it is another `arm`."""
    settings = policy.gateway
    if before is not None and before.settings.secret_env == settings.secret_env:
        secret = before.tiers.salt_secret
    else:
        secret = salt_secret(settings, os.environ)
    known = before.pool.replicas if before is not None else ()
    pool = Pool(settings, replicas, sources_of(policy.discovery), known)
    if state is None:
        state = before.state if before is not None else in_memory(settings)
    prompts = Prompts(lambda: pool.replicas, before.prompts if before else None)
    admission = Admission(
        policy,
        lambda: pool.replicas,
        Limits(state.store, time.time),
        time.monotonic,
        random.Random(),  # noqa: S311  # who is sent away, no secret
        before.admission if before is not None else None,
    )
    events = before.events if before else KvEvents(PrefixIndex())
    ladder = before.ladder if before else Ladder()
    meters = before.meters if before else Meters()
    routing = Routing(
        settings.routing,
        events.index,
        ladder,
        state.sent,
        before.routing if before else None,
        events.delivered,
    )

    def tokens_of(receipt: str) -> int | None:
        kept = routing.receipts.get(receipt)
        return kept.prompt_tokens if kept else None

    return Edge(
        policy=policy,
        pool=pool,
        keys=Keys.of(settings),
        tiers=Tiers.of(settings, secret),
        prompts=prompts,
        state=state,
        routing=routing,
        admission=admission,
        events=events,
        ladder=ladder,
        meters=meters,
        arm="candidate" if arm else "baseline",
        tracer=before.tracer if before is not None else _tracer(policy.tracing),
        shortener=Shortener(settings.trim, prompts.count, state.store, arm),
        answers=_answers(settings.response_cache, before.answers if before else None),
        recorder=Recorder(settings.record, tokens_of) if settings.record and not arm else None,
    )


def _tracer(settings: Tracing) -> Tracer:
    return Tracer(settings, exporter(settings.endpoint))


def _answers(settings: ResponseCache | None, before: Answers | None) -> Answers | None:
    """What is kept goes on being kept, unless how much and for whom has changed."""
    if settings is None:
        return None
    return before if before and before.settings == settings else Answers(settings)


@dataclass(slots=True)
class Asked:
    """A request that was read, and the ways back to its client."""

    call: Call
    tenant: Known
    reply: Reply
    outgoing: Client
    came: float  # since when an answer is due (arrival.Coming), monotonic seconds
    read: float  # when it was read


# Answers by one edge. With `strict`, an error that a replica answers is raised instead of relayed.
Serve = Callable[[Edge, Asked, bool], Awaitable[None]]


class Beside(Protocol):
    """A second edge that takes some of the requests (gateway/variants.py)."""

    async def serve(self, baseline: Edge, asked: Asked, serve: Serve) -> None: ...
    def roll_back(self, why: str, *, blamed: bool = True) -> None: ...


class Live:
    """Holds the current edge, and those before it until their last request has left."""

    beside: Beside | None = None  # while a rollout runs

    def __init__(self, edge: Edge) -> None:
        self.edge = edge
        self.reloads = 0
        self.refused: str | None = None  # why the last policy was not taken
        self.gated: Gated | None = None  # which optimizations of the policy may be served
        self._runs: dict[Edge, _Run] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serves by the edge, and ends all of them on the way out."""
        state, index = self.edge.state, self.edge.index  # the same for all edges
        async with state.running(lambda: self.edge.pool.replicas, index):
            await self.begin(self.edge)
            try:
                yield
            finally:
                await asyncio.gather(*map(self._end, list(self._runs)))
                await asyncio.to_thread(self.edge.tracer.close)

    async def replace(self, edge: Edge, is_ready: Callable[[Edge], Awaitable[None]]) -> None:
        """New requests go by `edge` once its parts have begun and it is ready; what is under way is
        left alone.

        Raises what kept a part from beginning, or what `is_ready` raises; then nothing is changed.
        """
        await self.begin(edge)
        try:
            await is_ready(edge)
        except BaseException:
            await self._end(edge)
            raise
        if self.beside is not None:
            self.beside.roll_back("the baseline's policy was reloaded", blamed=False)
        old, self.edge = self.edge, edge
        self.retire(old)

    @property
    def edges(self) -> Sequence[Edge]:
        """That have not ended."""
        return tuple(self._runs)

    @property
    def count(self) -> int:
        """Edges that have not ended: 1, and more while requests go on by an earlier policy."""
        return len(self._runs)

    async def _end(self, edge: Edge) -> None:
        run = self._runs.get(edge)
        if run is None:  # one before, whose last request has just left
            return
        run.replaced.set()
        run.stopped.set()
        assert run.task is not None, "an edge runs in a task of its own"
        await run.task

    def retire(self, edge: Edge) -> None:
        """It takes nothing new, and ends with the last request that it has."""
        self._runs[edge].replaced.set()

    async def begin(self, edge: Edge) -> None:
        """Raises what kept a part from beginning."""
        run = self._runs[edge] = _Run()
        run.task = asyncio.create_task(self._run(edge, run))
        await first_of(asyncio.shield(run.task), run.begun.wait())
        if run.task.done():
            run.task.result()

    async def _run(self, edge: Edge, run: _Run) -> None:
        """One edge from its begin to its end, in one task: some parts must end where they began."""
        try:
            async with edge.running():
                run.begun.set()
                await run.replaced.wait()
                await first_of(edge.pool.emptied(), run.stopped.wait())
        finally:
            del self._runs[edge]


async def first_of(*waits: Awaitable[object]) -> None:
    """Returns when one of them is done; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


@dataclass(slots=True)
class _Run:
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    replaced: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
