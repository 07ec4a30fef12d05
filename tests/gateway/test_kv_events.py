"""Which replicas are followed, what health says of it, and when what they told is worth nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cache.prefix_index import Mode
from gateway.edge import Edge, build
from gateway.kv_events import CONTRADICTIONS_MAX, mode_of
from gateway.replica import Replica
from policies.kv_following import HostsEvents
from policies.schema import Discovery, Upstream
from tests.gateway.publisher import Publisher
from tests.gateway.publishing import sockets
from tests.gateway.test_kv_follower import endpoints, work
from tests.gateway.world import Fake, Front, Peer, gateway, on_loop, until, upstream

POCKET = Path(__file__).parents[2] / "pocket" / "target"


def own(fake: Fake) -> Replica:
    return Replica(fake.url, own=True, tokenizer=POCKET)


async def kv_cache(edge: Front) -> dict[str, Any]:
    """Of the first replica, by the gateway's health."""
    return dict((await edge.client.get("/health")).json()["replicas"][0]["kv_cache"])


def index_knows(edge: Edge, fake: Fake, publisher: Publisher) -> bool:
    index = edge.index
    return index.mode(fake.url) is Mode.EXACT and index.told(fake.url) == publisher.truth()["GPU"]


@on_loop
async def test_an_own_worker_is_followed_by_what_its_health_tells() -> None:
    """It is exact while it is well; once it is not, nothing is known of it; then all again. How
    large its pool is is known, too."""
    live, replay = endpoints()
    publisher = Publisher()
    async with upstream(models=("m",)) as fake, sockets(publisher, live, replay) as one:
        fake.facts = {
            "kv_events": {"endpoint": live, "replay_endpoint": replay, "topic": ""},
            "blocks": {"total": 8},
        }
        async with gateway(own(fake)) as edge:
            work(publisher, 0)
            one.publish()
            await until(lambda: index_knows(edge.live.edge, fake, publisher))
            told = await kv_cache(edge)
            assert told["mode"] == "exact"
            assert told["told"] == {"GPU": len(publisher.truth()["GPU"])}
            (rank,) = told["events"]
            assert (rank["last"], rank["connected"]) == (publisher.number - 1, True)
            index = edge.live.edge.index
            index.size(fake.url, 100)  # whatever others think
            index.sent(fake.url, [bytes([at]) * 32 for at in range(20)], 0.0)
            assert index.report(fake.url)["sent"] == 8
            fake.health = 503
            await until(lambda: index.mode(fake.url) is Mode.APPROXIMATE)
            assert index.told(fake.url) == set()
            fake.health = 200
            await until(lambda: index_knows(edge.live.edge, fake, publisher))


@on_loop
async def test_a_foreign_server_is_followed_where_the_policy_says() -> None:
    live, replay = endpoints()
    publisher = Publisher()
    async with upstream(models=("m",)) as fake, sockets(publisher, live, replay) as one:
        at = {"endpoint": live, "replay_endpoint": replay}
        foreign = Upstream.model_validate(
            {"url": fake.url, "tokenizer": str(POCKET), "kv_events": at}
        )
        async with gateway(upstreams=(foreign,)) as edge:
            work(publisher, 0)
            one.publish()
            await until(lambda: index_knows(edge.live.edge, fake, publisher))


@on_loop
async def test_replicas_that_are_discovered_are_followed_at_their_own_hosts(tmp_path: Path) -> None:
    """Each at the ports that its source says; what came and went was known by guesses alone."""
    live, replay = endpoints()
    publisher = Publisher()
    ports = [int(one.rpartition(":")[2]) for one in (live, replay)]
    file = tmp_path / "replicas.yaml"
    async with upstream(models=("m",)) as fake, sockets(publisher, live, replay) as one:
        file.write_text(f"replicas: [{{url: '{fake.url}'}}]\n")
        source = Discovery.model_validate(
            {
                "file": str(file), "every_s": 0.02, "tokenizer": str(POCKET),
                "kv_events": {"port": ports[0], "replay_port": ports[1]},
            }
        )  # fmt: skip
        async with gateway(discovery=[source]) as edge:
            work(publisher, 0)
            one.publish()
            await until(lambda: index_knows(edge.live.edge, fake, publisher))
            file.write_text("replicas: []\n")
            await until(lambda: not edge.live.edge.index.told(fake.url))


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://10.0.0.7:8000", "tcp://10.0.0.7:5557"),
        ("http://[fd00::7]:8000", "tcp://[fd00::7]:5557"),
        ("https://engine-0.engines/v1", "tcp://engine-0.engines:5557"),
    ],
)
def test_a_discovered_replica_publishes_at_its_urls_host(url: str, endpoint: str) -> None:
    events = HostsEvents(port=5557, ranks=2)
    assert events.at(url).endpoint == endpoint
    with pytest.raises(ValidationError, match="beyond 65535"):
        HostsEvents(port=65535, ranks=2)
    with pytest.raises(ValidationError, match="give `tokenizer`, too"):
        Discovery(dns="engines", port=8000, kv_events=events)


@on_loop
async def test_events_of_a_foreign_servers_own_choice_are_not_followed() -> None:
    """Where to connect to is the policy's to say, not a stranger's."""
    live, replay = endpoints()
    async with upstream(models=("m",)) as fake, sockets(Publisher(), live, replay):
        fake.facts = {"kv_events": {"endpoint": live, "replay_endpoint": replay}}
        async with gateway(upstreams=(Upstream(url=fake.url, tokenizer=str(POCKET)),)) as edge:
            assert (await kv_cache(edge))["events"] == []


@on_loop
async def test_a_replica_that_does_other_than_it_told_is_read_again() -> None:
    live, replay = endpoints()
    publisher = Publisher()
    async with upstream(models=("m",)) as fake, sockets(publisher, live, replay) as one:
        fake.facts = {"kv_events": {"endpoint": live, "replay_endpoint": replay}}
        async with gateway(own(fake)) as edge:
            work(publisher, 0)
            one.publish()
            await until(lambda: index_knows(edge.live.edge, fake, publisher))
            events, asked = edge.live.edge.events, len(one.asked)
            for _ in range(CONTRADICTIONS_MAX - 1):
                events.delivered(fake.url, 10, 10, 0)
            events.delivered(fake.url, 10, 10, 16 * 9)  # the last block is computed again
            assert events.index.mode(fake.url) is Mode.EXACT
            for _ in range(CONTRADICTIONS_MAX):
                events.delivered(fake.url, 10, 10, 0)
            await until(lambda: len(one.asked) > asked)
            await until(lambda: index_knows(edge.live.edge, fake, publisher))
            assert (await kv_cache(edge))["events"][0]["holes"] == 1


def neighbours(count: int) -> int:
    """The first of some free ports in a row."""
    for first in range(20_000, 60_000, 7):
        with contextlib.ExitStack() as taken, contextlib.suppress(OSError):
            for port in range(first, first + count):
                taken.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")


@on_loop
async def test_ranks_of_a_server_are_followed_at_ports_in_a_row() -> None:
    """What either rank has, the server has; it is known exactly once both are."""
    first, second = Publisher(), Publisher()
    port = neighbours(4)
    live, replay = f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port + 2}"
    at = {"endpoint": live, "replay_endpoint": replay, "topic": "kv@pod", "ranks": 2}
    async with upstream(models=("m",)) as fake, sockets(first, live, replay):
        foreign = Upstream.model_validate(
            {"url": fake.url, "tokenizer": str(POCKET), "kv_events": at}
        )
        work(first, 0)
        work(second, 50)
        async with gateway(upstreams=(foreign,)) as edge:
            index = edge.live.edge.index
            await until(lambda: index.told(fake.url) == first.truth()["GPU"])
            assert index.mode(fake.url) is Mode.DEGRADED
            other = (f"tcp://127.0.0.1:{port + 1}", f"tcp://127.0.0.1:{port + 3}")
            async with sockets(second, *other):
                await until(lambda: index.mode(fake.url) is Mode.EXACT)
                both = first.truth()["GPU"] | second.truth()["GPU"]
                assert index.told(fake.url) == both
            await until(lambda: index.mode(fake.url) is Mode.DEGRADED)
            assert index.told(fake.url) == first.truth()["GPU"]


@on_loop
async def test_a_new_policy_changes_nothing_of_what_is_known() -> None:
    """One edge takes the other's place, and what replicas told is not read a second
    time; of a replica that no edge has any more nothing is kept."""
    live, replay = endpoints()
    publisher = Publisher()
    async with upstream(models=("m",)) as fake, sockets(publisher, live, replay) as one:
        fake.facts = {"kv_events": {"endpoint": live, "replay_endpoint": replay}}
        async with gateway(own(fake)) as edge:
            work(publisher, 0)
            one.publish()
            await until(lambda: index_knows(edge.live.edge, fake, publisher))
            before, asked = edge.live.edge, len(one.asked)
            after = build(before.policy, [own(fake)], before)
            await edge.live.replace(after, lambda _: asyncio.sleep(0))
            await until(lambda: edge.live.count == 1)
            work(publisher, 10)
            one.publish()
            await until(lambda: index_knows(edge.live.edge, fake, publisher))
            assert edge.live.edge.index is before.index
            assert len(one.asked) == asked
            edge.live.edge.index.sent("http://gone", [b"1" * 32], 0.0)
            await until(lambda: edge.live.edge.index.replicas() == [fake.url])
            edge.pool = edge.live.edge.pool


@on_loop
async def test_answers_that_find_other_than_was_told_lead_to_it() -> None:
    """Requests through the gateway to a replica that says it has their prompt and finds nothing of
    it: its events are read again. Where it finds what it told, nothing happens."""
    live, replay = endpoints()
    publisher, prompt, cached = Publisher(), list(range(160)), [144]

    async def answer(peer: Peer) -> None:
        details = {"prompt_tokens": 160, "prompt_tokens_details": {"cached_tokens": cached[0]}}
        await peer.json({"choices": [], "usage": details})

    async with upstream(answer, models=("m",)) as fake, sockets(publisher, live, replay) as one:
        fake.facts = {"kv_events": {"endpoint": live, "replay_endpoint": replay}}
        async with gateway(own(fake)) as edge:
            await edge.live.edge.prompts.loaded()
            publisher.store(tuple(prompt))
            publisher.step()
            one.publish()
            await until(lambda: index_knows(edge.live.edge, fake, publisher))
            asked = len(one.asked)
            for _ in range(2 * CONTRADICTIONS_MAX):
                await edge.post({"model": "m", "prompt": prompt}, "/v1/completions")
            assert len(one.asked) == asked
            cached[0] = 0
            for _ in range(CONTRADICTIONS_MAX):
                await edge.post({"model": "m", "prompt": prompt}, "/v1/completions")
            await until(lambda: len(one.asked) > asked)
            ladder = edge.live.edge.ladder
            assert ladder.captured == 3 * CONTRADICTIONS_MAX * 144
            assert ladder.evicted == CONTRADICTIONS_MAX * 144


def test_a_server_is_known_exactly_when_all_its_ranks_are() -> None:
    exact, guess, part = Mode.EXACT, Mode.APPROXIMATE, Mode.DEGRADED
    assert mode_of([exact, exact]) is exact
    assert mode_of([exact, guess]) is part
    assert mode_of([guess, guess]) is guess
    assert mode_of([part, exact]) is part
