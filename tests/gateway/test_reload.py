"""A policy that is replaced while requests run: whole or not at all, and nobody notices."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from gateway.edge import Live, build
from gateway.reload import Origin, Refused, Reload, begin, refuse_fixed
from policies.as_started import AS_STARTED
from policies.load import load
from tests.gateway.test_process import process
from tests.gateway.world import (
    DONE,
    HELLO,
    STREAMED,
    Fake,
    Front,
    Peer,
    held,
    listening,
    on_loop,
    refused_port,
    until,
    upstream,
)  # fmt: skip

CHUNK = b'data: {"choices":[]}\n\n'


@dataclass
class World:
    """A gateway by a policy file, and a way to change that."""

    file: Path
    live: Live
    reload: Reload
    front: Front

    def write(self, *upstreams: Fake | str, **settings: object) -> None:
        write(self.file, *upstreams, **settings)


def write(file: Path, *upstreams: Fake | str, **settings: object) -> None:
    urls = ", ".join(f"{{url: '{getattr(one, 'url', one)}'}}" for one in upstreams)
    fields = ", ".join(f"{name}: {value}" for name, value in settings.items())
    file.write_text(f"version: 1\ngateway: {{{fields}}}\nupstreams: [{urls}]\n")


@asynccontextmanager
async def world(folder: Path, *upstreams: Fake | str, **settings: object) -> AsyncIterator[World]:
    file = folder / "policy.yaml"
    write(file, *upstreams, **settings)
    origin = Origin(file, environ={})
    live = Live(build(*origin.read()))
    async with listening(live) as front:
        await until(lambda: any(replica.healthy for replica in live.edge.pool.replicas))
        yield World(file, live, Reload(origin, live), front)


@on_loop
async def test_what_is_under_way_ends_by_the_old_policy(tmp_path: Path) -> None:
    """The upstream of a running stream leaves the policy; the stream ends whole, then its edge."""
    release = asyncio.Event()
    async with (
        upstream(held(release, CHUNK)) as old,
        upstream() as new,
        world(tmp_path, old) as it,
    ):
        stream = asyncio.create_task(it.front.post(STREAMED))
        await until(lambda: old.running == 1)
        before = it.live.edge
        it.write(new, max_in_flight=7)
        assert await it.reload.reload()
        assert it.live.count == 2
        assert it.live.edge.settings.max_in_flight == 7
        assert (await it.front.post(HELLO)).is_success
        assert len(new.requests) == 1
        release.set()
        assert (await stream).content == CHUNK + DONE
        await until(lambda: it.live.count == 1)
        assert before.pool.in_flight == 0
        health = (await it.front.client.get("/health")).json()
        assert health["policy"] == {"reloads": 1, "edges": 1, "refused": None}


@pytest.mark.parametrize(
    ("text", "told", "limit"),
    [
        ("version: 1\ngateway: {max_in_flight: 9}\nupstreams: [{url: 'http://x'}]\n", None, 9),
        ("version: 1\ngateway: {max_in_flight: 9, port: 9}\nupstreams: [{url: 'http://x'}]\n",
         "gateway.port cannot change while it runs", 7),
        ("version: 1\ngateway: {max_in_flight: 9}\nruntime: {model: pocket, kv: int8}\n",
         "runtime cannot change while it runs", 7),
        ("version: [1\n", "not valid YAML", 7),
        (None, "no such file", 7),
    ],
    ids=["a limit", "the port", "the runtime", "a slip", "gone"],
)  # fmt: skip
def test_a_gateway_that_is_started_again_takes_what_it_would_have_taken(
    tmp_path: Path, text: str | None, told: str | None, limit: int
) -> None:
    """Of an edited file; it took a runtime that no worker had, and did not start by a slip."""
    file, copy = tmp_path / "policy.yaml", tmp_path / "copy.yaml"
    write(copy, "http://x", max_in_flight=7)
    if text is not None:
        file.write_text(text)
    first = begin(Origin(file, environ={}), copy)
    assert first.policy.gateway.max_in_flight == limit
    assert (first.refused is None) == (told is None)
    assert (told or "") in (first.refused or "")
    assert AS_STARTED not in os.environ


@on_loop
async def test_what_was_taken_while_it_ran_is_what_a_process_begins_by(tmp_path: Path) -> None:
    """The bug: a key that was withdrawn by a reload opened again, at a process that had died while
    the file had a slip."""
    copy = tmp_path / "copy.yaml"
    async with upstream() as fake, world(tmp_path, fake) as it:
        copy.write_bytes(it.file.read_bytes())
        reload = Reload(it.reload.origin, it.live, started=copy)
        it.write(fake, max_in_flight=7)
        assert await reload.reload()
        assert copy.read_bytes() == it.file.read_bytes()
        it.file.write_text("version: [1\n")
        assert not await reload.reload()
        first = begin(Origin(it.file, environ={}), copy)
    assert first.refused is not None
    assert first.policy.gateway.max_in_flight == 7


@on_loop
async def test_receipts_outlive_a_policy(tmp_path: Path) -> None:
    """Whoever was answered under the old one asks why under the new one."""
    async with upstream() as fake, world(tmp_path, fake) as it:
        name = (await it.front.post(HELLO)).headers["x-headgate-receipt"]
        it.write(fake, max_in_flight=7)
        assert await it.reload.reload()
        assert (await it.front.client.get(f"/v1/receipts/{name}")).is_success


@on_loop
async def test_replicas_that_stay_are_known_at_once(tmp_path: Path) -> None:
    """Requests right after a reload find it healthy, and none waits for a probe."""
    async with upstream() as fake, world(tmp_path, fake) as it:
        (known,) = it.live.edge.pool.replicas
        it.write(fake, refused_port())
        assert await it.reload.reload()
        assert known in it.live.edge.pool.replicas
        assert (await it.front.post(HELLO)).is_success


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("version: 1\ngateway: {prot: 1}\n", "did you mean 'port'?"),
        ("version: 1\nupstreams: [", "not valid YAML"),
        (None, "no such file"),
        ("version: 1\ngateway: {port: 9}\nupstreams: [{url: 'http://x'}]\n", "gateway.port"),
        ("version: 1\nruntime: {}\n", "runtime cannot change while it runs: restart"),
        (
            "version: 1\nupstreams: [{url: 'http://x', api_key_env: NO_SUCH}]\n",
            "NO_SUCH is not set",
        ),
    ],
)
def test_a_bad_file_changes_nothing_and_says_why(
    tmp_path: Path, text: str | None, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    @on_loop
    async def run() -> None:
        async with upstream() as fake, world(tmp_path, fake) as it:
            before = it.live.edge
            it.file.unlink()
            if text is not None:
                it.file.write_text(text)
            assert not await it.reload.reload()
            assert it.live.edge is before
            assert it.live.count == 1
            assert (await it.front.post(HELLO)).is_success
            health = (await it.front.client.get("/health")).json()
            assert told in health["policy"]["refused"]
            assert told in caplog.text
            it.write(fake)
            assert await it.reload.reload()
            assert it.live.refused is None

    run()


@on_loop
async def test_a_policy_none_of_whose_replicas_answers_is_refused(tmp_path: Path) -> None:
    """A wrong URL takes no gateway down; nor does it leave its marks on what serves."""
    async with upstream() as fake, world(tmp_path, fake) as it:
        it.reload.ready_s = 0.3
        before = it.live.edge
        it.file.write_text(
            "version: 1\nupstreams:\n"
            f"- {{url: '{fake.url}', drain: true, weight: 3}}\n- {{url: '{refused_port()}'}}\n"
        )
        assert not await it.reload.reload()
        assert "none of its replicas takes requests" in (it.live.refused or "")
        assert it.live.edge is before
        assert it.live.count == 1
        (replica,) = before.pool.replicas
        assert (replica.draining, replica.weight) == (False, 1.0)
        assert (await it.front.post(HELLO)).is_success


@on_loop
async def test_a_hundred_reloads_under_load_drop_nothing(tmp_path: Path) -> None:
    """Streams and short requests all the while; upstreams come and go; no place is left taken."""

    async def answer(peer: Peer) -> None:
        await peer.head()
        for _ in range(3):
            await peer.chunk(CHUNK)
            await asyncio.sleep(0.003)
        await peer.chunk(DONE)
        await peer.end()

    async with upstream(answer) as one, upstream(answer) as two, world(tmp_path, one, two) as it:
        edges = {it.live.edge}
        done = asyncio.Event()
        whole = 0

        async def visitor() -> None:
            nonlocal whole
            while not done.is_set():
                response = await it.front.post(STREAMED)
                assert response.content == 3 * CHUNK + DONE, response.content
                whole += 1

        visitors = [asyncio.create_task(visitor()) for _ in range(6)]
        for number in range(100):
            fakes = [(one, two), (one,), (two,)][number % 3]
            tiers = f"{{batch: {{queue_max: {10 + number // 10}}}}}"  # new queues now and then
            it.write(*fakes, max_in_flight=100 + number, keep_alive_s=1 + number / 10, tiers=tiers)
            assert await it.reload.reload(), it.live.refused
            edges.add(it.live.edge)
            assert it.live.edge.settings.max_in_flight == 100 + number
        done.set()
        await asyncio.gather(*visitors)
        assert len(edges) == 101
        assert whole > 100
        await until(lambda: it.live.count == 1)
        for edge in edges:
            assert edge.pool.in_flight == 0
            assert all(replica.in_flight == 0 for replica in edge.pool.replicas)
            assert all(replica.waiting_tokens == 0 for replica in edge.pool.replicas)
            for front in edge.admission.fronts.values():
                assert (front.queue.running, front.queue.waiting) == (0, 0)
        assert len(one.requests) + len(two.requests) == whole


@on_loop
async def test_a_process_reloads_when_its_file_changes_and_at_sighup(tmp_path: Path) -> None:
    async with upstream() as fake, process(fake, tmp_path, "{reload: watch}") as (child, client):
        file = tmp_path / "policy.yaml"

        file.write_text(file.read_text().replace("watch}", "signal, max_in_flight: 9}"))
        await reloaded(client, 1)
        child.send_signal(signal.SIGHUP)
        await reloaded(client, 2)
        assert (await client.post("/v1/chat/completions", json=HELLO)).is_success


@on_loop
async def test_deadlines_of_connections_are_those_of_the_new_policy(tmp_path: Path) -> None:
    async with (
        upstream() as fake,
        process(fake, tmp_path, "{body_timeout_s: 600}") as (child, client),
    ):
        file = tmp_path / "policy.yaml"
        file.write_text(file.read_text().replace("600", "0.3"))
        child.send_signal(signal.SIGHUP)
        await reloaded(client, 1)
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\n")
        assert b" 408 " in await reader.readline()
        writer.close()


async def reloaded(client: httpx.AsyncClient, times: int) -> None:
    """Returns once a gateway has reloaded so often."""
    while (await client.get("/health")).json()["policy"]["reloads"] < times:
        pass


def test_what_is_fixed_is_named_field_by_field(tmp_path: Path) -> None:
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text("version: 1\nruntime: {}\n")
    new.write_text("version: 1\ngateway: {host: '::1'}\nruntime: {workers: 2, threads: 1}\n")
    with pytest.raises(Refused) as caught:
        refuse_fixed(load(old), load(new))
    for name in ("gateway.host", "runtime.workers", "runtime.threads"):
        assert name in str(caught.value)
    new.write_text("version: 1\ngateway: {keep_alive_s: 3}\nruntime: {}\n")
    refuse_fixed(load(old), load(new))
