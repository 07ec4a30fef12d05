"""Which replica gets a request, what follows when it cannot take it, what is told of the fleet."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from gateway.client import Client
from gateway.health import Watch
from gateway.replica import Replica, replicas_of
from policies.schema import Deployment
from tests.gateway.world import (
    DONE,
    HELLO,
    STREAMED,
    Fake,
    Peer,
    gateway,
    held,
    on_loop,
    refused_port,
    until,
    upstream,
)


def ready(url: str, *models: str) -> Replica:
    """A replica that the gateway believes to be well."""
    return Replica(url, own=True, models={name: {} for name in models}, healthy=True, tried=True)


async def busy(peer: Peer) -> None:
    await peer.json({"error": {"message": "full", "code": "busy"}}, status=503, retry_after="3")


@on_loop
async def test_streams_go_to_the_least_loaded_replica() -> None:
    """Eight long streams over two replicas: four each."""
    release = asyncio.Event()
    answer = held(release)
    async with upstream(answer) as one, upstream(answer) as two, gateway(one, two) as edge:
        streams = [asyncio.create_task(edge.post(STREAMED)) for _ in range(8)]
        await until(lambda: one.running + two.running == 8)
        assert (one.running, two.running) == (4, 4)
        assert sorted(r.in_flight for r in edge.pool.replicas) == [4, 4]
        release.set()
        assert all(response.is_success for response in await asyncio.gather(*streams))


@on_loop
async def test_a_replica_that_refuses_connections_is_skipped_and_marked_down() -> None:
    """The client notices nothing; the fleet's health does, at once, and why."""
    async with upstream() as fake, gateway(fake) as edge:
        dead = ready(refused_port(), "m")
        edge.pool.replicas = (dead, *edge.pool.replicas)
        edge.pool.replicas[1].in_flight = 5  # the dead one is the obvious choice
        assert (await edge.post(STREAMED)).content.endswith(DONE)
        edge.pool.replicas[1].in_flight = 0
        assert not dead.healthy
        health = (await edge.client.get("/health")).json()
        assert health["status"] == "ready"
        assert "cannot connect" in health["replicas"][0]["error"]


def test_an_upstream_out_of_reach_is_logged_once_though_it_never_was_well(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Our own workers are refused while they load: that is no news."""
    for replica in (Replica("http://far"), Replica("http://own", own=True)):
        replica.mark_down("refused")
        replica.mark_down("refused")
    assert [record.getMessage() for record in caplog.records] == [
        "replica http://far is down: refused"
    ]


@on_loop
async def test_a_503_is_retried_elsewhere_and_relayed_when_there_is_nowhere_else() -> None:
    """A full replica passes its request on, and is left alone for as long as it says; a full
    fleet's answer reaches the client."""
    for payload in (HELLO, STREAMED):
        async with upstream(busy) as full, upstream() as free, gateway(full, free) as edge:
            edge.pool.replicas[1].in_flight = 5
            assert (await edge.post(payload)).status_code == 200
            assert len(full.requests) == len(free.requests) == 1
            assert (await edge.post(payload)).status_code == 200
            assert (len(full.requests), len(free.requests)) == (1, 2)
            edge.pool.replicas[1].in_flight = 0
    async with upstream(busy) as one, upstream(busy) as two, gateway(one, two) as edge:
        response = await edge.post(HELLO)
        assert (response.status_code, response.headers["retry-after"]) == (503, "3")
        assert len(one.requests) == len(two.requests) == 1


@pytest.mark.parametrize("payload", [HELLO, STREAMED])
@on_loop
async def test_nothing_is_retried_after_the_first_byte(payload: dict) -> None:
    """A cut answer was begun: asking again could do the same work twice."""

    async def answer(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(b"data: {}\n\n")
        peer.abort()

    async with upstream(answer) as one, upstream(answer) as two, gateway(one, two) as edge:
        await edge.post(payload)
        assert len(one.requests) + len(two.requests) == 1


@on_loop
async def test_a_replica_that_dies_on_a_fresh_request_is_502_where_nothing_is_retried() -> None:
    """With one attempt, only a connection that idled before, and did no work, is replaced."""

    async def answer(peer: Peer) -> None:
        peer.abort()

    once = {"max_attempts": 1}
    async with (
        upstream(answer) as one,
        upstream(answer) as two,
        gateway(retries=once) as edge,
    ):
        edge.pool.replicas = (ready(one.url, "m"), ready(two.url, "m"))  # no probe's connections
        response = await edge.post(HELLO)
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "upstream_failed"
        assert len(one.requests) + len(two.requests) == 1


@on_loop
async def test_a_stale_connection_is_replaced_without_the_client_noticing() -> None:
    """A kept-alive connection that the replica closes under a request costs a second attempt."""
    seen: Counter[object] = Counter()  # the objects: an id may come back

    async def answer(peer: Peer) -> None:
        seen[peer._writer] += 1
        if seen[peer._writer] > 1:  # the second request on one connection
            peer.abort()
        else:
            await peer.json({"choices": []})

    # Believed well and never probed, so that only requests use connections.
    async with (
        upstream(answer) as fake,
        gateway() as edge,
    ):
        edge.pool.replicas = (ready(fake.url, "m"),)
        for _ in range(6):
            assert (await edge.post(HELLO)).status_code == 200
        assert len(fake.requests) > 6


@on_loop
async def test_an_answer_that_is_not_http_is_502() -> None:
    """Garbage from a replica is an upstream failure, not the gateway's."""

    async def answer(peer: Peer) -> None:
        await peer.raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")

    async with upstream(answer) as fake, gateway(fake) as edge:
        response = await edge.post(HELLO)
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "upstream_failed"


@on_loop
async def test_while_workers_start_the_client_is_told_to_wait() -> None:
    """503 with Retry-After, a message that says loading, and health that says starting."""
    async with upstream(health=503) as fake, gateway(fake, wait=False) as edge:
        response = await edge.post(HELLO)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        error = response.json()["error"]
        assert error["code"] == "no_replica"
        assert "loading" in error["message"]
        health = await edge.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "starting")
        fake.health = 200
        await until(lambda: edge.pool.replicas[0].healthy)
        assert (await edge.client.get("/health")).json()["status"] == "ready"
        assert (await edge.post(HELLO)).status_code == 200


@on_loop
async def test_a_replica_that_went_down_is_probed_back() -> None:
    """No replica: 503 that names it and why; once it listens again, requests flow."""
    fake = Fake()
    async with upstream() as first, gateway(first) as edge:
        replica = edge.pool.replicas[0]
        host, port = first.url.removeprefix("http://").split(":")
        replica.url = refused_port()
        response = await edge.post(HELLO)
        # The kept-alive connection belongs to another address: connecting is what fails.
        assert response.status_code == 503
        error = response.json()["error"]
        assert error["code"] == "no_replica"
        assert replica.url in error["message"]
        health = await edge.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "down")
        replica.url = f"http://{host}:{port}"
        await until(lambda: replica.healthy)
        assert (await edge.post(HELLO)).status_code == 200
    assert fake.requests == []


@pytest.mark.parametrize("stranger", [None, "another run"])
@on_loop
async def test_a_stranger_on_a_workers_port_gets_no_request(stranger: str | None) -> None:
    """After a worker died, another program, a worker of another `serve` too, can have its port."""
    async with upstream(run_token="ours") as own, upstream(run_token=stranger) as other:
        replica = Replica(own.url, own=True, run_token="ours")
        async with gateway(replica) as edge:
            assert (await edge.post(HELLO)).status_code == 200
            replica.url = other.url
            replica.doubt.set()
            await until(lambda: not replica.healthy)
            response = await edge.post(HELLO)
            assert response.status_code == 503
            assert "another program answers" in response.json()["error"]["message"]
            assert other.requests == []
            replica.url = own.url
            await until(lambda: replica.healthy)


@pytest.mark.parametrize("turns", range(5))
@on_loop
async def test_a_watch_that_is_cancelled_while_it_is_doubted_ends(turns: int) -> None:
    """wait_for swallowed the cancellation, and a gateway told to stop just then never did."""
    replica = ready("http://127.0.0.1:1")
    pausing = asyncio.create_task(Watch(Client(1.0), replica)._pause(60.0))
    await asyncio.sleep(0)
    replica.doubt.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    in_time = pausing.cancel()
    await asyncio.wait([pausing])
    assert pausing.cancelled() == in_time


@on_loop
async def test_a_foreign_server_without_health_is_known_by_its_models() -> None:
    """/health 404 is no illness; a refused key is, and says so."""
    async with (
        upstream(health=404, models=("big", "small")) as fake,
        gateway(Replica(fake.url, api_key="sk-1")) as edge,
    ):
        assert sorted(edge.pool.replicas[0].models) == ["big", "small"]
        assert (await edge.post(HELLO | {"model": "big"})).status_code == 200


@on_loop
async def test_models_are_the_union_of_healthy_replicas() -> None:
    """OpenAI's list shape; fields that a replica adds are kept; a model is described once."""
    async with (
        upstream(models=("m", "a")) as one,
        upstream(models=("m", "org/b")) as two,
        gateway(one, two) as edge,
    ):
        listing = (await edge.client.get("/v1/models")).json()
        assert listing["object"] == "list"
        assert sorted(entry["id"] for entry in listing["data"]) == ["a", "m", "org/b"]
        for entry in listing["data"]:
            assert {"id", "object", "created", "owned_by", "max_model_len"} <= set(entry)
        single = (await edge.client.get("/v1/models/org/b")).json()
        assert single["id"] == "org/b"
        edge.pool.replicas[1].healthy = False
        listing = (await edge.client.get("/v1/models")).json()
        assert sorted(entry["id"] for entry in listing["data"]) == ["a", "m"]


@on_loop
async def test_fingerprints_of_all_replicas_are_one_question() -> None:
    """Each replica's own words; null for one that has none, says junk, or is not there."""

    async with (
        upstream(fingerprint=b'{"root": "ab"}') as one,
        upstream() as two,
        upstream(fingerprint=b"[]") as three,
    ):
        gone = Replica(refused_port())
        async with gateway(one, two, three, gone, wait=False) as edge:
            answer = await edge.client.get("/v1/fingerprint")
            assert answer.status_code == 200
            assert answer.json() == {
                "object": "list",
                "data": [
                    {"url": one.url, "fingerprint": {"root": "ab"}},
                    {"url": two.url, "fingerprint": None},
                    {"url": three.url, "fingerprint": None},
                    {"url": gone.url, "fingerprint": None},
                ],
            }


def test_keys_of_upstreams_come_from_the_environment() -> None:
    """A missing variable is found before anything listens."""
    policy = Deployment.model_validate(
        {"version": 1, "upstreams": [{"url": "http://x:1/v1", "api_key_env": "KEY"}]}
    )
    own, foreign = replicas_of(policy, ["http://127.0.0.1:9/"], {"KEY": "sk-1"})
    assert (own.url, own.own, own.api_key) == ("http://127.0.0.1:9", True, None)
    assert (foreign.url, foreign.own, foreign.api_key) == ("http://x:1", False, "sk-1")
    assert "sk-1" not in repr(foreign)
    for environ in ({}, {"KEY": ""}, {"KEY": " \n"}):  # never a Bearer with nothing behind it
        with pytest.raises(KeyError, match="KEY"):
            replicas_of(policy, [], environ)
