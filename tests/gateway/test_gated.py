"""The gateway and optimizations: what it starts with, says, tells, and does when it reads again."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.edge import Live, build
from gateway.reload import Origin, Reload
from policies.binding import sides
from policies.leaves import edge_facts
from policies.load import load_hypothesis
from policies.side import Side
from tests.cache.tiny_tokenizers import byte_level, write_folder
from tests.gateway.test_process import ROOT, free_port
from tests.gateway.world import listening, on_loop, until, upstream
from tests.policies.gated_world import DAY, World, build as build_world

TRIM = "{gateway.trim.drop: oldest}"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return build_world(tmp_path)


def policy(url: str) -> str:
    return f"version: 1\nupstreams: [{{url: '{url}', tokenizer: server}}]\n"


def judged(world: World, url: str) -> None:
    """Trimming has passed on these upstreams."""
    write_folder(world.folder / "server", byte_level())
    world.hypothesis("trim", TRIM, "lossy_input")
    world.serve("trim", text=policy(url))
    world.judge("trim", at=time.time())


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


async def started(world: World) -> tuple[dict[str, Any], str]:
    """What a gateway that is started by hand tells of the optimization, and what it has said."""
    port = free_port()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", str(world.policy), "--port", str(port),
        cwd=ROOT, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            await until_up(client)
            told = (await client.get("/v1/fingerprint")).json()
    finally:
        child.terminate()
        _, said = await child.communicate()
    assert child.returncode == 0
    (one,) = told["optimizations"]
    return one, said.decode()


@pytest.mark.parametrize(
    ("file", "old", "new", "leaf"),
    [
        ("a.jsonl", "ho", "hu", "suite:a"),
        ("policy.yaml", "version: 1", "version: 1\ngateway: {routing: {policy: p2c}}", "routing"),
        ("server/tokenizer_config.json", "assistant", "Assistant", "upstreams"),
    ],
)
@on_loop
async def test_a_gateway_by_hand_says_and_tells_what_is_on_and_what_has_become_stale(
    world: World, file: str, old: str, new: str, leaf: str
) -> None:
    """`python -m gateway` decides by itself: on, and not once a row of the suite, the policy or the
    chat template has changed."""
    async with upstream() as fake:
        judged(world, fake.url)
        one, said = await started(world)
        assert (one["state"], one["enabled"]) == ("on", True)
        assert "optimization trim: on  " in said
        rewrite(world.folder / file, old, new)
        one, said = await started(world)
        assert (one["state"], one["enabled"], one["stale_leaves"]) == ("stale", False, [leaf])
        assert f"optimization trim: stale  {leaf} has changed since its verdict" in said


async def until_up(client: httpx.AsyncClient) -> None:
    while True:
        try:
            if (await client.get("/health")).is_success:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.05)


@on_loop
async def test_a_policy_that_is_read_again_decides_again(world: World) -> None:
    """A limit of bodies changes nothing of it; a quarantine takes the patch out of what serves."""
    async with upstream() as fake:
        judged(world, fake.url)
        origin = Origin(world.policy, environ={})
        found = origin.gated()
        live = Live(build(*origin.read(found)))
        live.gated = found
        async with listening(live) as front:
            await until(lambda: any(replica.healthy for replica in live.edge.pool.replicas))
            reload = Reload(origin, live)
            assert live.edge.settings.trim.drop == "oldest"
            before = (await front.client.get("/v1/fingerprint")).json()
            assert before["optimizations"][0]["state"] == "on"

            world.serve("trim", text=policy(fake.url) + "gateway: {max_body_bytes: 4096}\n")
            assert await reload.reload()
            assert live.edge.settings.trim.drop == "oldest"

            world.ledger.quarantine("trim", found.standings[0].candidate, "looped")
            assert await reload.reload()
            assert live.edge.settings.trim.drop == "off"
            after = (await front.client.get("/v1/fingerprint")).json()
            assert after["optimizations"][0]["state"] == "quarantined"
            changed = [
                name
                for name, digest in after["gateway"]["leaves"].items()
                if digest != before["gateway"]["leaves"][name]
            ]
            assert changed == ["trim"]


@on_loop
async def test_a_hypothesis_that_became_wrong_changes_nothing(world: World) -> None:
    """As any policy that cannot be taken: the old one goes on, and why is told."""
    async with upstream() as fake:
        judged(world, fake.url)
        origin = Origin(world.policy, environ={})
        live = Live(build(*origin.read()))
        live.gated = origin.gated()
        async with listening(live):
            (world.folder / "trim.yaml").write_text("kind: Hypothesis\n")
            assert not await Reload(origin, live).reload()
            assert live.edge.settings.trim.drop == "oldest"
            assert "trim.yaml:1:1" in (live.refused or "")


def test_the_leaves_that_a_gateway_tells_are_those_of_its_side(world: World) -> None:
    """What is served can be compared with what was judged."""
    judged(world, "http://127.0.0.1:9")
    file = world.folder / "trim.yaml"
    _, candidate, _ = sides(file, load_hypothesis(file))
    found = world.gated(now=time.time() + DAY)
    assert Side.of(edge_facts(world.folder, found.deployment)) == candidate
