"""Places under load, over real sockets: turns, refusals, limits; and nobody's place is lost."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from cache.memory_store import MemoryStore
from gateway.call import CHAT_PATH
from gateway.keys import Known
from gateway.limits import Limits, rules_of, span
from gateway.replica import Replica
from policies.schema import Tenant, Tier
from policies.slo import key_hash
from runtime.wire import Problem
from tests.gateway.world import (
    DONE,
    HELLO,
    STREAMED,
    Front,
    Peer,
    events,
    gateway,
    on_loop,
    until,
    upstream,
)  # fmt: skip

USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":20,"completion_tokens":10}}\n\n'


class Gate:
    """An upstream that holds every answer until it is told to go on; in the order of arrival."""

    def __init__(self) -> None:
        self.held: list[asyncio.Event] = []
        self.tiers: list[str | None] = []

    async def __call__(self, peer: Peer) -> None:
        hold = asyncio.Event()
        self.held.append(hold)
        self.tiers.append(peer.request.headers.get("x-headgate-tier"))
        await hold.wait()
        if json.loads(peer.request.body).get("stream"):
            await peer.stream(b'data: {"choices":[]}\n\n', USAGE, DONE)
        else:
            usage = {"prompt_tokens": 20, "completion_tokens": 10}
            await peer.json({"choices": [], "usage": usage})

    async def open(self) -> None:
        await until(lambda: bool(self.held))
        self.held.pop(0).set()


def ask(edge: Front, tier: str | None = None, **more: Any) -> asyncio.Task[Any]:
    headers = {"x-headgate-tier": tier} if tier else {}
    return asyncio.create_task(edge.post(HELLO | more, headers=headers))


def waiting(edge: Front) -> Callable[[], int]:
    def count() -> int:
        return sum(front.queue.waiting for front in edge.live.edge.admission.fronts.values())

    return count


def tenant(name: str = "acme", **fields: Any) -> Known:
    return Known(name, Tenant(keys=(key_hash("k"),), **fields))


@on_loop
async def test_what_a_replica_cannot_take_waits_in_the_gateway_and_goes_in_its_turn() -> None:
    gate = Gate()
    async with upstream(gate) as fake, gateway(fake, running_per_replica=1) as edge:
        first = ask(edge, "standard")
        await until(lambda: fake.running == 1)
        rest = []
        for tier in ("batch", "standard", "interactive"):
            rest.append(ask(edge, tier))
            await until(lambda: waiting(edge)() == len(rest))
        for count in range(1, 5):
            await until(lambda: len(gate.held) == 1)  # never two at once
            await gate.open()
            await until(lambda count=count: sum(t.done() for t in (first, *rest)) == count)
        assert gate.tiers == ["standard", "interactive", "standard", "batch"]
        assert [task.result().status_code for task in (first, *rest)] == [200] * 4


@on_loop
async def test_a_stream_that_begins_while_it_waits_tells_how_long_it_has_waited() -> None:
    """The bug: kept alive, its head went before it left the queue, with minus the time of day."""
    gate = Gate()
    async with (
        upstream(gate) as fake,
        gateway(fake, running_per_replica=1, keep_alive_s=0.05) as edge,
    ):
        first = ask(edge, "standard")
        await until(lambda: fake.running == 1)

        async def head() -> str:
            async with edge.client.stream("POST", CHAT_PATH, json=STREAMED) as answer:
                return str(answer.headers["server-timing"])

        sent = time.monotonic()
        asking = asyncio.create_task(head())
        await until(lambda: waiting(edge)() == 1)
        before_ms = 1000 * (time.monotonic() - sent)  # it was in the queue, or sooner
        told = dict(one.split(";dur=") for one in (await asking).split(", "))
        assert all(float(ms) >= 0 for ms in told.values())
        assert float(told["total"]) >= 49
        assert float(told["queue"]) >= float(told["total"]) - before_ms - 1
        await gate.open()
        assert (await first).is_success


@on_loop
async def test_a_client_that_leaves_while_it_waits_leaves_nothing_behind() -> None:
    gate = Gate()
    async with upstream(gate) as fake, gateway(fake, running_per_replica=1) as edge:
        first = ask(edge)
        await until(lambda: fake.running == 1)
        _, writer = await edge.send(HELLO)
        await until(lambda: waiting(edge)() == 1)
        writer.transport.abort()
        await until(lambda: waiting(edge)() == 0)
        await gate.open()
        assert (await first).status_code == 200
        assert len(fake.requests) == 1


@on_loop
async def test_a_full_queue_answers_503_with_a_time_to_come_back() -> None:
    tiers = {"standard": Tier(queue_max=1)}
    gate = Gate()
    settings = {"running_per_replica": 1, "tiers": tiers}
    async with upstream(gate) as fake, gateway(fake, **settings) as edge:
        tasks = [ask(edge)]
        await until(lambda: fake.running == 1)
        tasks.append(ask(edge))
        await until(lambda: waiting(edge)() == 1)
        refused = await edge.post(HELLO)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        for _ in tasks:
            await until(lambda: len(gate.held) == 1)
            await gate.open()
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert [task.status_code for task in await asyncio.gather(*tasks)] == [200, 200]


@on_loop
async def test_a_deadline_counts_while_a_request_waits_and_the_replica_gets_what_is_left() -> None:
    gate = Gate()
    async with upstream(gate) as fake, gateway(fake, running_per_replica=1) as edge:
        first = ask(edge)
        await until(lambda: fake.running == 1)
        late = await edge.post(HELLO, headers={"x-slo-deadline-ms": "30"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        headers = {"x-slo-deadline-ms": "60000", "x-slo-ttft-ms": "50000"}
        second = asyncio.create_task(edge.post(HELLO, headers=headers))
        await until(lambda: waiting(edge)() == 1)
        began = time.monotonic()
        await until(lambda: time.monotonic() > began + 0.005)  # it waits for longer than a tick
        await gate.open()
        await until(lambda: len(fake.requests) == 2)
        await gate.open()
        await asyncio.gather(first, second)
        got = fake.requests[1].headers
        assert 59_000 < float(got["x-slo-deadline-ms"]) < 60_000
        assert 49_000 < float(got["x-slo-ttft-ms"]) < 50_000


@on_loop
async def test_a_server_that_knows_no_deadlines_is_left_when_one_is_over() -> None:
    gate = Gate()
    async with upstream(gate) as fake, gateway(Replica(fake.url)) as edge:
        late = await edge.post(HELLO, headers={"x-slo-deadline-ms": "500"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "request_timeout")
        await until(lambda: fake.was_left)


@on_loop
async def test_no_place_is_lost_by_errors_cuts_and_clients_that_leave() -> None:
    """After all of it a replica of two places takes two again; world.py looks at the counters."""
    turn = 0

    async def answer(peer: Peer) -> None:
        nonlocal turn
        turn += 1
        if turn % 4 == 0:
            await peer.json({"error": {"message": "no"}}, status=400)
        elif turn % 4 == 1:
            await peer.head()
            await peer.chunk(b'data: {"choices":[]}\n\n')
            peer.abort()
        elif turn % 4 == 2:
            await peer.stream(b'data: {"choices":[]}\n\n', USAGE, DONE)
        else:
            await asyncio.Event().wait()

    settings = {"running_per_replica": 2}
    async with upstream(answer) as fake, gateway(fake, **settings) as edge:
        for _ in range(12):
            _, writer = await edge.send(STREAMED)
            before = turn
            await until(lambda before=before: turn > before or waiting(edge)() > 0)
            if turn % 4 == 3:
                writer.transport.abort()
        for writer in edge.sockets:
            writer.transport.abort()
        fronts = edge.live.edge.admission.fronts.values()
        await until(lambda: not any(f.queue.running + f.queue.waiting for f in fronts))
        assert all(f.queue.reading == 0 for f in fronts)


@on_loop
async def test_a_tenants_limits_are_told_and_kept() -> None:
    """OpenAI's headers; the next minute's request is told when to come."""
    tenants = {
        "acme": Tenant(keys=(key_hash("a"),), requests_per_minute=2, tokens_per_minute=100_000),
        "rival": Tenant(keys=(key_hash("r"),)),
    }
    async with upstream(gate := Gate()) as fake, gateway(fake, tenants=tenants) as edge:

        async def post(key: str) -> Any:
            task = asyncio.create_task(
                edge.post(STREAMED, headers={"authorization": f"Bearer {key}"})
            )
            await until(lambda: bool(gate.held) or task.done())
            if gate.held:
                await gate.open()
            return await task

        first = await post("a")
        assert events(first.content)[-1] == "[DONE]"
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-limit-tokens"] == "100000"
        await post("a")
        refused = await post("a")
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["type"]) == (
            429, "rate_limit_exceeded", "requests",
        )  # fmt: skip
        assert 25 <= int(refused.headers["retry-after"]) <= 30
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert (await post("r")).status_code == 200
        left = await edge.live.edge.state.store.take(
            rules_of(Known("acme", tenants["acme"]), 0.0).wants(0)[0][1:]
        )
        assert left.left[0] == pytest.approx(100_000 - 60, abs=60)  # as used, not as estimated


def test_the_headers_of_one_of_several_gateways_tell_its_share() -> None:
    """Without a store each gives a fourth; the headers had the whole limit beside what is left of
    the fourth, and a reset for the difference, of a process that had just begun."""

    async def run() -> None:
        limits = Limits(MemoryStore(lambda: 0.0, among=4), lambda: 0.0)
        acme = tenant(requests_per_minute=10, tokens_per_day=1000)
        told = []
        for _ in range(2):
            allowance = await limits.take(acme, 10)
            assert allowance is not None
            told.append({name.decode()[12:]: value for name, value in allowance.headers()})
        assert told == [
            {"limit-requests": b"2", "remaining-requests": b"1", "reset-requests": b"24s"},
            {"limit-requests": b"2", "remaining-requests": b"0", "reset-requests": b"48s"},
        ]
        with pytest.raises(Problem) as caught:
            await limits.take(acme, 10)
        assert "limit of 2.5 requests per minute (the share of one of 4" in caught.value.message
        assert caught.value.headers["x-ratelimit-limit-requests"] == "2"

    asyncio.run(run())


def test_a_budget_is_spent_by_what_was_used_and_comes_back_at_midnight() -> None:
    async def run() -> None:
        now = 86400.0 * 20_000 + 86000  # 400 s before midnight
        clock = lambda: now  # noqa: E731
        limits = Limits(MemoryStore(clock), clock)
        acme = tenant(tokens_per_day=1000)
        allowance = await limits.take(acme, 900)
        assert allowance is not None
        with pytest.raises(Problem) as caught:
            await limits.take(acme, 200)
        problem = caught.value
        assert (problem.status, problem.code) == (429, "insufficient_quota")
        assert problem.headers["retry-after"] == "400"
        await limits.settle(allowance, 100)
        assert await limits.take(acme, 850) is not None
        now += 401
        assert await limits.take(acme, 1000) is not None
        with pytest.raises(Problem) as caught:
            await limits.take(acme, 1001)
        assert "alone is more" in caught.value.message

    asyncio.run(run())


def test_a_tenant_without_limits_costs_the_store_nothing() -> None:
    assert rules_of(tenant(), 0.0).wants(10) == ((), ())
    assert rules_of(Known(""), 0.0).wants(10) == ((), ())


def test_spans_are_written_as_openai_writes_them() -> None:
    spans = [span(seconds) for seconds in (0, 0.12, 4.21, 59.6, 60, 366)]
    assert spans == ["0ms", "120ms", "4.21s", "59.6s", "1m0s", "6m6s"]
