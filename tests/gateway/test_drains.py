"""Replicas that are taken out by hand: what runs ends, nothing new comes, every gateway knows."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cache.memory_store import MemoryStore
from gateway.drains import KEPT_S, RECORD, REVIEW_S, Drains
from gateway.edge import Live, build
from gateway.replica import Replica
from gateway.state import State
from policies.schema import Deployment, Discovery, Gateway, Runtime, Tenant
from policies.slo import key_hash
from tests.gateway.test_siblings import one_of, two
from tests.gateway.test_variants_store import eventually, sharing
from tests.gateway.world import (
    DONE,
    HELLO,
    STREAMED,
    Fake,
    Front,
    gateway,
    held,
    on_loop,
    until,
    upstream,
)
from tests.redis_server import needs_redis, redis_server

ROOT = Path(__file__).parents[2]
CHUNK = b'data: {"choices":[]}\n\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of this user alone, and short enough a path for sockets."""
    private = tmp_path / "s"
    private.mkdir(mode=0o700)
    return private


async def post(front: Front, act: str, fake: Fake, status: int = 200, **more: Any) -> Any:
    answer = await front.client.post(f"/admin/replicas/{act}", json={"url": fake.url, **more})
    assert answer.status_code == status, answer.text
    return answer.json()


async def told(front: Front, fake: Fake) -> Any:
    replicas = (await front.client.get("/admin/replicas")).json()["replicas"]
    (found,) = [one for one in replicas if one["url"] == fake.url]
    return found


async def is_out(front: Front, fake: Fake) -> bool:
    return bool((await told(front, fake))["draining"])


@on_loop
async def test_a_drained_replica_ends_what_it_has_and_gets_nothing_new() -> None:
    """Every page says so, and why; resumed, it takes requests again."""
    release = asyncio.Event()
    async with (
        upstream(held(release, CHUNK)) as one,
        upstream() as other,
        gateway(one, other, routing={"policy": "round_robin"}) as edge,
    ):
        streams = [asyncio.create_task(edge.post(STREAMED)) for _ in range(4)]
        await until(lambda: one.running > 0 and len(one.requests) + len(other.requests) == 4)
        before = len(one.requests)
        await post(edge, "drain", one, why="new driver")
        for _ in range(6):
            assert (await edge.post(HELLO)).is_success
        assert len(one.requests) == before
        found = await told(edge, one)
        assert (found["draining"], found["drained"]["why"]) == (True, "new driver")
        assert found["in_flight"] == before
        health = (await edge.client.get("/health")).json()["replicas"]
        page = (await edge.client.get("/metrics")).text
        overview = (await edge.client.get("/admin/overview")).json()
        assert [one["draining"] for one in health] == [True, False]
        assert "new driver" not in str(health)  # tenants read it
        assert f'headgate_gateway_replica_draining{{replica="{one.url}"}} 1.0' in page
        assert f'headgate_gateway_replica_draining{{replica="{other.url}"}} 0.0' in page
        assert [(one["state"], one["held"]) for one in overview["replicas"]] == [
            ("draining", "new driver"), ("ready", ""),
        ]  # fmt: skip
        release.set()
        for stream in streams:
            assert (await stream).content.endswith(DONE)
        assert (await told(edge, one))["in_flight"] == 0
        await post(edge, "resume", one)
        for _ in range(4):
            assert (await edge.post(HELLO)).is_success
        assert len(one.requests) > before
        assert (await told(edge, one))["drained"] is None


@on_loop
async def test_with_none_left_the_client_is_told_why() -> None:
    async with upstream() as fake, gateway(fake) as edge:
        await post(edge, "drain", fake, why="a secret of ours")
        refused = await edge.post(HELLO)
        assert refused.status_code == 503
        assert "secret" not in refused.text
        assert "takes nothing new (an operator drained it)" in refused.json()["error"]["message"]
        assert (await edge.client.get("/health")).status_code == 503
        await post(edge, "resume", fake)
        assert (await edge.post(HELLO)).is_success


@on_loop
async def test_only_a_replica_that_is_there_can_be_drained() -> None:
    """And only by who may; a `/v1` behind its URL is no other replica."""
    tenants = {"t": Tenant(keys=(key_hash("right"),))}
    async with upstream() as fake, gateway(fake) as edge, gateway(fake, tenants=tenants) as locked:
        body = {"url": "http://127.0.0.1:1"}
        for act in ("drain", "resume"):
            wrong = await edge.client.post(f"/admin/replicas/{act}", json=body)
            assert wrong.status_code == 404
            assert fake.url in wrong.json()["error"]["message"]
        named = {"url": f"{fake.url}/v1/"}
        assert (await edge.client.post("/admin/replicas/drain", json=named)).is_success
        assert await is_out(edge, fake)
        refused = await locked.client.post(
            "/admin/replicas/drain", json=named, headers={"authorization": "Bearer right"}
        )
        assert refused.status_code == 403
        assert (await locked.client.get("/health")).status_code == 200


@on_loop
async def test_every_process_of_a_gateway_hears_it_and_so_does_one_that_begins(
    folder: Path,
) -> None:
    """Without any store; what each has under way is added up."""
    release = asyncio.Event()
    async with (
        upstream(held(release, CHUNK)) as fake,
        upstream() as spare,
        two(folder, fake) as (one, other),
    ):
        streams = [asyncio.create_task(front.post(STREAMED)) for front in (one, other, other)]
        await until(lambda: fake.running == 3)
        answer = await post(one, "drain", fake, why="disk")
        assert answer["processes"] == {"asked": 2, "of": 2}
        assert answer["replicas"][0]["in_flight"] == 3
        assert other.pool.replicas[0].held == "disk"
        async with one_of(2, folder, "3", fake) as late:
            assert late.pool.replicas[0].held == "disk"
            await post(late, "resume", fake)
            assert [front.pool.replicas[0].held for front in (one, other)] == ["", ""]
        release.set()
        await asyncio.gather(*streams)
        assert spare.requests == []


@needs_redis
@on_loop
async def test_gateways_that_share_a_store_hear_it_and_tell_a_store_that_has_forgotten() -> None:
    with redis_server() as server:
        async with upstream() as fake, sharing(server.url, fake) as one:
            async with sharing(server.url, fake) as two:
                await post(one, "drain", fake, why="disk")
                await eventually(lambda: is_out(two, fake))
            store = one.live.edge.state.store
            server.flush()

            async def remembered() -> bool:
                return await store.get(RECORD) is not None

            await eventually(remembered)
            async with sharing(server.url, fake) as late:
                assert await is_out(late, fake)
                await post(late, "resume", fake)
                await eventually(lambda: is_back(one, fake))


async def is_back(front: Front, fake: Fake) -> bool:
    return not await is_out(front, fake)


def test_of_two_words_the_later_counts_whatever_the_clocks_say() -> None:
    """A resume by a gateway whose clock is behind is later all the same; ends are forgotten."""

    def world(store: MemoryStore, clock: list[float]) -> tuple[Drains, Replica]:
        replica = Replica("http://a")
        policy = Deployment(version=1, gateway=Gateway(), runtime=Runtime())
        live = Live(build(policy, [replica], state=State(store)))
        edges = Drains(live, lambda: live.edge, clock=lambda: clock[0])
        return edges, replica

    async def run() -> None:
        store, early, late = MemoryStore(lambda: 0.0), [100.0], [200.0]
        one, mine = world(store, early)
        other, theirs = world(store, late)
        await other.change("http://a", out=True, why="disk")
        assert (mine.held, theirs.held) == ("", "disk")
        await one._look()
        assert mine.held == "disk"
        await one.change("http://a", out=False)
        await other._look()
        assert (mine.held, theirs.held) == ("", "")
        assert other._notes
        late[0] += KEPT_S + 1
        await other._look()
        assert not other._notes

    asyncio.run(run())


AWAY = "http://10.0.0.9:8000"


class Beside:
    """One of several gateways that share a store; its clock is off, its time is the test's."""

    def __init__(self, store: MemoryStore, time_s: list[float], off_s: float, *urls: str) -> None:
        nowhere = Discovery(file="replicas.yaml")
        policy = Deployment(version=1, gateway=Gateway(), runtime=Runtime(), discovery=(nowhere,))
        self.live = Live(build(policy, [], state=State(store)))
        self.drains = Drains(
            self.live, lambda: self.live.edge, lambda: 1e9 + off_s + time_s[0], lambda: time_s[0]
        )
        self.has(*urls)

    def has(self, *urls: str) -> Replica | None:
        """From now on."""
        self.live.edge.pool.replicas = [Replica(url) for url in urls]
        return next(iter(self.live.edge.pool.replicas), None)

    async def look(self) -> None:
        await self.drains._look()
        await self.drains.review()


async def minutes(count: int, time_s: list[float], *gateways: Beside) -> None:
    for _ in range(2 * count):
        time_s[0] += REVIEW_S
        for one in gateways:
            await one.look()


@on_loop
async def test_a_drain_is_forgotten_once_no_gateway_has_the_replica_any_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It waited for whatever pod would get that address, which then served nothing. As long as one
    gateway has it, drained it stays, at all of them, whatever their clocks say; so does one that is
    away as long as a machine takes to start anew."""
    time_s, store = [0.0], MemoryStore(lambda: 0.0)
    one, other = Beside(store, time_s, 0.0, AWAY), Beside(store, time_s, -7200.0)
    await one.drains.change(AWAY, out=True, why="new driver")
    await minutes(60, time_s, one, other)
    assert other.drains.note(AWAY) is not None
    one.has()
    await minutes(10, time_s, one, other)
    back = one.has(AWAY)
    await minutes(10, time_s, one, other)
    assert back is not None
    assert back.held == "new driver"
    one.has()
    late = Beside(store, time_s, 7200.0)  # one that begins does not know since when it is away
    await minutes(10, time_s, one, other, late)
    assert one.drains.note(AWAY) is not None
    await minutes(10, time_s, one, other, late)
    said = {record.getMessage() for record in caplog.records if "forgotten" in record.getMessage()}
    assert said == {
        f"{AWAY} was drained ('new driver'), and no gateway has had it for 15 minutes: that is "
        "forgotten, a replica at that address takes requests"
    }
    for each in (one, other, late):
        assert each.drains.note(AWAY) is None
        anew = each.has(AWAY)
        await each.look()
        assert anew is not None
        assert anew.held == ""


@on_loop
async def test_nobody_is_taken_for_gone_while_nobody_can_be_seen() -> None:
    """A resolver or a store that is away says nothing of replicas."""
    time_s, store = [0.0], MemoryStore(lambda: 0.0)
    one = Beside(store, time_s, 0.0, AWAY)
    await one.drains.change(AWAY, out=True)
    one.has()
    (source,) = one.live.edge.pool._fleet.sources
    source.error = "the resolver is down"
    await minutes(60, time_s, one)
    assert one.drains.note(AWAY) is not None
    source.error = None
    await minutes(14, time_s, one)
    assert one.drains.note(AWAY) is not None
    await minutes(2, time_s, one)
    assert one.drains.note(AWAY) is None


@on_loop
async def test_the_command_drains_waits_and_resumes() -> None:
    """In words and exit codes, for scripts."""
    release = asyncio.Event()

    async def run(edge: Front, *words: str) -> tuple[int, str]:
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "headgate", "replicas", *words, "--url", edge.url],
            cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    async with upstream(held(release, CHUNK)) as fake, gateway(fake) as edge:
        stream = asyncio.create_task(edge.post(STREAMED))
        await until(lambda: fake.running == 1)
        code, said = await run(edge, "drain", fake.url, "--why", "new driver", "--wait", "0")
        assert code == 1
        assert f"{fake.url}  drained  1 under way  new driver" in said
        assert "no replica is left that takes requests" in said
        assert "still under way there: 1" in said
        release.set()
        assert (await stream).content == CHUNK + DONE
        code, said = await run(edge, "drain", fake.url, "--wait", "9")
        assert (code, "nothing is under way there any more" in said) == (0, True)
        assert await run(edge, "resume", fake.url) == (0, f"  {fake.url}  ready  0 under way\n")
        code, said = await run(edge, "drain", "http://127.0.0.1:1")
        assert (code, "there is no replica" in said) == (2, True)
