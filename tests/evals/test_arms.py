"""Arms that come up, and those that do not: told soon, and with the reason; who asks whom."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from evals.arms import Arm, Starting, risen, series, started, summed
from evals.execute import prepare
from evals.keys import refuse_keyless
from policies.binding import pair
from policies.edge import Admin
from policies.hypothesis import Hypothesis
from policies.load import PolicyError, load_hypothesis
from policies.slo import Tenant
from tests.gateway.world import HELLO, gateway, on_loop, refused_port, upstream

HYPOTHESIS = """\
apiVersion: headgate/v1
kind: Hypothesis
metadata: {name: down}
baseline: {config: base.yaml}
candidate: {patch: {gateway.routing.policy: round_robin}}
kind_of_change: routing_only
guardrails: [{suite: pocket, metric: served, test: paired_ni, margin: 2%}]
"""


def test_a_gateway_whose_server_is_down_is_given_up_soon(tmp_path: Path) -> None:
    """What it waits for is told as it waits, and is the reason; no other arm is started then."""
    nobody = refused_port()
    (tmp_path / "base.yaml").write_text(f"version: 1\nupstreams: [{{url: '{nobody}'}}]\n")
    file = tmp_path / "h.yaml"
    file.write_text(HYPOTHESIS)
    asked: Hypothesis = load_hypothesis(file)
    said: list[str] = []
    began = time.monotonic()

    async def check() -> dict[str, str]:
        starting = Starting(asked, pair(file, asked), tmp_path / "arms", said.append, edge_s=15.0)
        async with started(starting) as arms:
            return {name: arm.broken for name, arm in arms.items()}

    broken = asyncio.run(check())
    assert time.monotonic() - began < 60
    assert "did not serve in 15 s" in broken["baseline"]
    assert f"still waiting for {nobody}" in broken["baseline"]
    assert [one.split()[0] for one in said] == ["baseline"]
    assert {broken[name] for name in ("candidate", "aa", "sabotage")} == {
        "not started: the baseline does not run"
    }


@pytest.mark.parametrize("cold_blocks", [True, False])
@on_loop
async def test_the_spoiled_arm_leaves_the_baselines_caches_alone(
    tmp_path: Path, cold_blocks: bool
) -> None:
    """Where nothing is salted it has a server of its own; else one asks for both."""
    async with upstream() as fake:
        (tmp_path / "base.yaml").write_text(f"version: 1\nupstreams: [{{url: '{fake.url}'}}]\n")
        file = tmp_path / "h.yaml"
        design = f"design: {{aa_control: false, cold_blocks: {str(cold_blocks).lower()}}}\n"
        file.write_text(HYPOTHESIS + design)
        asked = load_hypothesis(file)
        starting = Starting(asked, pair(file, asked), tmp_path / "arms")
        async with started(starting) as arms, aiohttp.ClientSession() as session:
            url = f"{arms['sabotage'].url}/v1/chat/completions"
            async with session.post(url, json=HELLO) as answer:
                assert answer.status == 200
            seen = summed(await series(arms["baseline"])).get("headgate_gateway_requests_total", 0)
    assert (len(fake.requests), seen) == (1, float(cold_blocks))


@on_loop
async def test_counters_are_read_with_the_operators_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client's key does not open the metrics of a gateway that has an admin key."""
    for name in ("CLIENTS", "OPERATOR"):
        monkeypatch.setenv(name, f"hg-{name}")
    async with upstream() as fake:
        (tmp_path / "base.yaml").write_text(
            "version: 1\ngateway: {tenants: {clients: {key_env: CLIENTS}}, "
            f"admin: {{key_env: OPERATOR}}}}\nupstreams: [{{url: '{fake.url}'}}]\n"
        )
        file = tmp_path / "h.yaml"
        keyed = HYPOTHESIS.replace("base.yaml}", "base.yaml, api_key_env: CLIENTS}")
        keyed = keyed.replace("candidate: {", "candidate: {api_key_env: CLIENTS, ")
        file.write_text(keyed + "design: {aa_control: false}\n")
        asked = load_hypothesis(file)
        async with started(Starting(asked, pair(file, asked), tmp_path / "arms")) as arms:
            assert not arms["baseline"].broken
            seen = summed(await series(arms["baseline"]))
    assert seen["headgate_gateway_replicas_ready"] == 1


@on_loop
async def test_counters_of_a_server_at_a_url_are_read_with_the_key_that_its_arm_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway with an operator's key tells a client nothing; an arm at a URL could name none."""
    for name in ("CLIENTS", "OPERATOR"):
        monkeypatch.setenv(name, f"hg-{name}")
    tenants = {"clients": Tenant(key_env="CLIENTS")}
    admin = Admin(key_env="OPERATOR")
    async with upstream() as fake, gateway(fake, tenants=tenants, admin=admin) as edge:
        for named, seen in (("", None), (", metrics_key_env: OPERATOR", 1)):
            arm = f"{{url: '{edge.url}', api_key_env: CLIENTS{named}}}"
            text = HYPOTHESIS.replace("{config: base.yaml}", arm)
            patch = "{patch: {gateway.routing.policy: round_robin}}"
            text = text.replace(patch, arm.replace("api_key_env", "model: m, api_key_env"))
            file = tmp_path / "h.yaml"
            file.write_text(text + "design: {aa_control: false, sabotage_control: false}\n")
            asked = load_hypothesis(file)
            async with started(Starting(asked, pair(file, asked), tmp_path / "arms")) as arms:
                assert not arms["candidate"].broken
                told = summed(await series(arms["candidate"]))
                assert told.get("headgate_gateway_replicas_ready") == seen
    monkeypatch.delenv("OPERATOR")
    with pytest.raises(PolicyError, match=r"metrics_key_env  the environment has no OPERATOR"):
        prepare(file)
    file.write_text(HYPOTHESIS.replace("base.yaml}", "base.yaml, metrics_key_env: OPERATOR}"))
    with pytest.raises(PolicyError, match="its own admin key is sent"):
        load_hypothesis(file)


@pytest.mark.parametrize(
    ("tenants", "baseline", "refused"),
    [
        ("{one: {key_env: CLIENTS}}", "", ""),  # the only one: it need not be said
        ("{one: {key_env: CLIENTS}, two: {key_env: OTHERS}}", ", api_key_env: OTHERS", ""),
        ("{one: {key_env: CLIENTS}, two: {key_env: OTHERS}}", "", "one's key by api_key_env"),
        ("{one: {key_env: GONE}}", "", "the environment has no GONE"),
    ],
)
@on_loop
async def test_both_arms_of_a_policy_with_tenants_are_asked_with_a_key_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tenants: str, baseline: str, refused: str
) -> None:
    """The candidate patches what the baseline serves, and had to name the key again: without it
    every request of the run was refused, which was a verdict, `invalid`."""
    for name in ("CLIENTS", "OTHERS"):
        monkeypatch.setenv(name, f"hg-test-{name}-of-an-arm")
    async with upstream() as fake:
        (tmp_path / "base.yaml").write_text(
            f"version: 1\ngateway: {{tenants: {tenants}}}\nupstreams: [{{url: '{fake.url}'}}]\n"
        )
        file = tmp_path / "h.yaml"
        file.write_text(
            HYPOTHESIS.replace("base.yaml}", f"base.yaml{baseline}}}")
            + "design: {aa_control: false, sabotage_control: false}\n"
        )
        asked = load_hypothesis(file)
        configured = pair(file, asked)
        if refused:
            with pytest.raises(PolicyError, match=refused):
                refuse_keyless(file, asked, configured)
            return
        refuse_keyless(file, asked, configured)
        async with started(Starting(asked, configured, tmp_path / "arms")) as arms:
            assert {name: arm.broken for name, arm in arms.items()} == {
                "baseline": "", "candidate": "",
            }  # fmt: skip


@on_loop
async def test_what_several_processes_of_an_arm_counted_is_read_whole(tmp_path: Path) -> None:
    """Whichever of them the requests came to, and the question for its counters."""
    async with upstream() as fake:
        (tmp_path / "base.yaml").write_text(
            f"version: 1\ngateway: {{processes: 2}}\nupstreams: [{{url: '{fake.url}'}}]\n"
        )
        file = tmp_path / "h.yaml"
        file.write_text(HYPOTHESIS + "design: {aa_control: false, sabotage_control: false}\n")
        asked = load_hypothesis(file)
        async with started(Starting(asked, pair(file, asked), tmp_path / "arms")) as arms:
            arm = arms["baseline"]
            assert not arm.broken
            before = await series(arm)
            for count in range(1, 7):
                async with aiohttp.ClientSession() as session:
                    url = f"{arm.url}/v1/chat/completions"
                    async with session.post(url, json=HELLO) as answer:
                        assert answer.status == 200
                grown = risen(before, await series(arm))
                assert grown["headgate_gateway_requests_total"] == count


def test_a_process_that_starts_anew_takes_nothing_from_what_the_others_counted() -> None:
    """Of two processes one has lost its 90 and counted 5 since, the other has gone on by 3."""
    before = {("page", "n", '{process="0"}'): 90.0, ("page", "n", '{process="1"}'): 10.0}
    after = {("page", "n", '{process="0"}'): 5.0, ("page", "n", '{process="1"}'): 13.0}
    assert risen(before, after) == {"n": 8}
    assert risen(after, after) == {}
    assert summed(after) == {"n": 18}


@on_loop
async def test_a_page_that_lacks_a_process_is_looked_at_again() -> None:
    """It is starting anew; what it counts next would else be missing, and later be too much."""
    looks = 0

    async def metrics(_request: web.Request) -> web.Response:
        nonlocal looks
        looks += 1
        told = f'headgate_gateway_process_told{{process="1"}} {float(looks > 1)}\n'
        return web.Response(text='n_total{process="0"} 2\n' + told)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        page = f"http://127.0.0.1:{runner.addresses[0][1]}/metrics"
        found = await series(Arm("baseline", "", pages=(page,)))
    finally:
        await runner.cleanup()
    assert looks == 2
    assert found[page, "n_total", '{process="0"}'] == 2
    assert found[page, "headgate_gateway_process_told", '{process="1"}'] == 1
