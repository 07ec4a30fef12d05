"""Replicas that come and go, by a file and by DNS, while requests are under way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from gateway.replica import Replica
from policies.load import load, resolve_discovery
from policies.schema import Discovery
from tests.gateway.world import (
    DONE,
    HELLO,
    STREAMED,
    Front,
    Peer,
    gateway,
    held,
    on_loop,
    until,
    upstream,
)

EVERY_S = 0.02


def listed(file: Path, *entries: str) -> Discovery:
    """Writes the file as a deployment tool does: whole, and put in place at once."""
    fresh = file.with_suffix(".new")
    fresh.write_text("replicas:" + "".join(f"\n  - {{{entry}}}" for entry in entries or ()) + "\n")
    if not entries:
        fresh.write_text("replicas: []\n")
    fresh.replace(file)
    return Discovery(file=str(file), every_s=EVERY_S, kind="vllm", weight=3.0)


def healthy(edge: Front) -> set[str]:
    return {replica.url for replica in edge.pool.replicas if replica.healthy}


@on_loop
async def test_replicas_of_a_file_join_and_leave_without_a_dropped_request(tmp_path: Path) -> None:
    """One is listed, another joins, the first one leaves while its stream goes on to its end."""
    release = asyncio.Event()
    file = tmp_path / "replicas.yaml"
    slow = held(release, b"data: {}\n\n")
    async with upstream(slow) as first, upstream() as second:
        source = listed(file, f"url: '{first.url}'")
        async with gateway(discovery=[source]) as edge:
            await until(lambda: healthy(edge) == {first.url})
            running = asyncio.create_task(edge.post(STREAMED))
            await until(lambda: first.running == 1)
            listed(file, f"url: '{first.url}'", f"url: '{second.url}', weight: 2")
            await until(lambda: healthy(edge) == {first.url, second.url})
            listed(file, f"url: '{second.url}', weight: 2")
            await until(lambda: edge.pool.replicas[0].draining)
            for _ in range(4):
                assert (await edge.post(HELLO)).status_code == 200
            assert (len(first.requests), len(second.requests)) == (1, 4)
            release.set()
            assert (await running).content.endswith(DONE)
            await until(lambda: [one.url for one in edge.pool.replicas] == [second.url])
            state = (await edge.client.get("/health")).json()["replicas"]
            assert [(one["weight"], one["kind"]) for one in state] == [(2.0, "vllm")]


@on_loop
async def test_a_replica_that_drains_takes_nothing_new_and_comes_back(tmp_path: Path) -> None:
    """`drain: true` in the file; /health tells it; with nobody else the client hears 503."""
    file = tmp_path / "replicas.yaml"
    async with (
        upstream() as fake,
        gateway(discovery=[listed(file, f"url: '{fake.url}'")]) as edge,
    ):
        await until(lambda: healthy(edge) == {fake.url})
        assert (await edge.post(HELLO)).status_code == 200
        listed(file, f"url: '{fake.url}', drain: true")
        await until(lambda: edge.pool.replicas[0].draining)
        response = await edge.post(HELLO)
        assert response.status_code == 503
        assert "takes nothing new" in response.json()["error"]["message"]
        health = await edge.client.get("/health")
        assert (health.status_code, health.json()["replicas"][0]["draining"]) == (503, True)
        listed(file, f"url: '{fake.url}'")
        await until(lambda: not edge.pool.replicas[0].draining)
        assert (await edge.post(HELLO)).status_code == 200


@pytest.mark.parametrize("junk", ["replicas: [{url: 7}]", "replicas: [", "nothing: 1", None])
@on_loop
async def test_a_bad_file_changes_nothing_and_is_told_once(
    tmp_path: Path, junk: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A file half written, or gone: the fleet is what it was. The next good one counts."""
    file = tmp_path / "replicas.yaml"
    async with (
        upstream() as one,
        upstream() as two,
        gateway(discovery=[listed(file, f"url: '{one.url}'")]) as edge,
    ):
        await until(lambda: healthy(edge) == {one.url})
        if junk is None:
            file.unlink()
        else:
            whole = tmp_path / "whole.yaml"  # read while it is written, it would be told twice
            whole.write_text(junk)
            whole.replace(file)
        await until(lambda: "goes on with what it knows" in caplog.text)
        await asyncio.sleep(5 * EVERY_S)
        assert caplog.text.count("goes on with what it knows") == 1
        assert (await edge.post(HELLO)).status_code == 200
        listed(file, f"url: '{one.url}'", f"url: '{two.url}'")
        await until(lambda: healthy(edge) == {one.url, two.url})


@on_loop
async def test_a_name_in_dns_gives_the_addresses_behind_it() -> None:
    """Each address is a replica; a name that is not there leaves an empty fleet, not a crash."""
    async with upstream() as fake:
        port = urlsplit(fake.url).port
        source = Discovery(dns="localhost", port=port, every_s=EVERY_S)
        nobody = Discovery(dns="nobody.invalid", port=1, every_s=60.0)
        async with gateway(discovery=[source, nobody], wait=False) as edge:
            await until(lambda: fake.url in healthy(edge))
            assert (await edge.post(HELLO)).status_code == 200


@on_loop
async def test_what_is_listed_again_before_it_was_idle_stays_the_same_replica(
    tmp_path: Path,
) -> None:
    """What was learned of it stays, and requests flow at once."""
    file = tmp_path / "replicas.yaml"
    release = asyncio.Event()

    async def slow(peer: Peer) -> None:
        await release.wait()
        await peer.json({"choices": []})

    async with (
        upstream(slow) as fake,
        gateway(discovery=[listed(file, f"url: '{fake.url}'")]) as edge,
    ):
        await until(lambda: healthy(edge) == {fake.url})
        replica: Replica = edge.pool.replicas[0]
        running = asyncio.create_task(edge.post(HELLO))
        await until(lambda: fake.running == 1)
        listed(file)
        await until(lambda: replica.gone)
        listed(file, f"url: '{fake.url}'")
        await until(lambda: not replica.gone)
        assert edge.pool.replicas == (replica,)
        release.set()
        assert (await running).status_code == 200


def test_the_file_stands_beside_the_policy(tmp_path: Path) -> None:
    """As every other path of a policy does."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 1\ndiscovery: [{file: replicas.yaml}, {dns: a.b, port: 1}]\n")
    first, second = resolve_discovery(policy, load(policy)).discovery
    assert first.file == str(tmp_path / "replicas.yaml")
    assert second.file is None
