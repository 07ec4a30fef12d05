"""What the console asks for: one object of real numbers, for whoever may steer and nobody else."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.history import KEPT, History
from gateway.overview import LATE_S, of_late
from gateway.tallies import LATEST, Tallies
from gateway.tiers import Service
from gateway.trace_ring import Ring
from gateway.tracing import Tracer
from gateway.trail import Trail
from policies.slo import Tier
from policies.tracing import Tracing
from tests.gateway.scripted import ASKED, TOKENS, Engine
from tests.gateway.test_variants import PATH, broken, hi, put, steer
from tests.gateway.world import HELLO, Front, gateway, on_loop, until, upstream

OVERVIEW = "/admin/overview"


async def overview(front: Front, query: str = "") -> Any:
    answer = await front.client.get(OVERVIEW + query)
    assert answer.status_code == 200, answer.text
    return answer.json()


@on_loop
async def test_it_tells_what_requests_did_and_no_text() -> None:
    """Tiers with promises and counts, replicas with what was learned, the latest receipts, each of
    which can be read whole."""
    async with upstream(Engine("one")) as fake, gateway(fake) as front:
        for _ in range(4):
            assert (await front.post(ASKED)).status_code == 200
        told = await overview(front)
        standard = next(one for one in told["tiers"] if one["name"] == "standard")
        assert (standard["ttft_ms"], standard["now"]["admitted"]) == (2000.0, 4)
        assert standard["now"]["in_time"] == 4
        (replica,) = told["replicas"]
        assert (replica["url"], replica["state"], replica["models"]) == (fake.url, "ready", ["m"])
        assert replica["rates"]["prefill_tokens_per_s"] > 0
        assert [one["replica"] for one in told["requests"]] == [fake.url] * 4
        assert told["requests"][0]["at"] >= told["requests"][3]["at"]
        assert 0 < standard["ttft_s"]["p50"] <= standard["ttft_s"]["p95"]
        assert standard["now"]["network_s"] + standard["now"]["prefill_s"] > 0
        assert told["tokens"]["stages"]["emitted"] == 4 * len(TOKENS)
        name = told["requests"][0]["receipt"]
        whole = (await front.client.get(f"/admin/receipts/{name}")).json()
        assert whole["decisions"][0]["options"][0]["url"] == fake.url
        assert (await front.client.get("/admin/receipts/rcpt_no")).status_code == 404
        text = json.dumps(told) + json.dumps(whole)
        assert "Say it." not in text
        assert "quick" not in text
        assert told["rollout"] is None


@on_loop
async def test_a_rollout_is_told_while_it_runs_and_how_it_ended_afterwards() -> None:
    """Both arms are counted by what was observed, each answer once however often one looks; when
    the controller has taken the candidate away, its end is still there to be seen."""
    async with upstream(hi) as old, upstream(broken) as new, gateway(old) as front:
        await put(front, new, share=0.5)
        for at in range(40):
            answer = await front.post(HELLO, headers={"x-session-id": f"s{at}"})
            assert answer.status_code == 200
            await overview(front)
        await until(lambda: front.live.edge.pool.in_flight == 0)
        told = (await overview(front))["rollout"]
        seen = (await front.client.get("/admin/observations")).json()["observations"]
        arms = {arm: sum(one["arm"] == arm for one in seen) for arm in ("baseline", "candidate")}
        assert {name: arm["requests"] for name, arm in told["arms"].items()} == arms
        assert told["arms"]["candidate"]["failed"] == arms["candidate"] == 3
        assert "answers failed" in told["ended"]
        assert (await front.client.delete(f"{PATH}?id=r1&result=rolled+back")).status_code == 200
        gone = (await overview(front))["rollout"]
        assert (gone["id"], gone["left"], gone["ended"]) == ("r1", "rolled back", told["ended"])


@on_loop
async def test_a_paused_rollout_keeps_its_share_and_says_so() -> None:
    """Through further leases, and through a controller that comes back; until it is resumed."""
    async with upstream(hi) as old, upstream(hi) as new, gateway(old) as front:
        await put(front, new, share=0.5)
        status, told = await steer(front, "POST", f"{PATH}/pause", id="r1", why="looking closer")
        assert (status, told["candidate"]["paused"]) == (200, "looking closer")
        assert told["candidate"]["share"] == 0.5
        _, told = await steer(front, "PATCH", id="r1", share=0.5, lease_s=60)
        assert told["candidate"]["paused"] == "looking closer"
        again = await put(front, new, share=0.5)
        assert again["paused"] == "looking closer"
        assert again["since"] == told["candidate"]["since"]
        status, told = await steer(front, "POST", f"{PATH}/resume", id="r1")
        assert (status, told["candidate"]["paused"]) == (200, None)
        assert (await steer(front, "POST", f"{PATH}/pause", id="another"))[0] == 404
        await steer(front, "POST", f"{PATH}/rollback", id="r1", why="enough")
        assert (await steer(front, "POST", f"{PATH}/pause", id="r1"))[0] == 409


@on_loop
async def test_samples_are_told_once_and_the_oldest_are_forgotten() -> None:
    async with upstream() as fake, gateway(fake) as front:
        moments = iter(range(10, 10 + 2 * KEPT))
        history = History(front.live, lambda: None, clock=lambda: next(moments))
        for _ in range(KEPT + 5):
            history.take()
        kept = history.since(0)
        assert [one["at"] for one in kept] == list(range(15, 15 + KEPT))
        assert [one["at"] for one in history.since(kept[-3]["at"])] == [
            one["at"] for one in kept[-2:]
        ]
        wrong = await front.client.get(f"{OVERVIEW}?since=soon")
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "since")


PROMISED = Service("standard", Tier(), 1.0, None, None, False)


def ended(at: int, tier: str = "standard") -> Trail:
    """A stream whose first token took `at` ten thousandths of the second that it lasted."""
    one = Trail(f"r{at}", "/", 0.0, 0.0)
    one.at, one.ended, one.spoke, one.stream = 1000.0, 1.0, at / 10_000, True
    one.service = replace(PROMISED, tier=tier)
    return one


def test_others_go_on_while_many_requests_are_looked_through() -> None:
    """The bug: of 2,000 requests in a minute they waited 6.5 ms."""

    async def run() -> None:
        ring, turns = Ring(10_000), 0
        for at in range(10_000):
            ring.keep(ended(at))

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(others())
        late = (await of_late(ring, Tallies(), 1010.0))["standard"]
        task.cancel()
        assert turns > 1
        assert late.slowest == (0.9999, "r9999")

    asyncio.run(run())


def test_a_tier_has_its_times_whatever_others_get_meanwhile() -> None:
    """The bug: quantiles were of the traces that are kept, and 256 of a busy tier left a quiet one
    without any. Those that are kept longer because they failed or were late are not what is usual,
    and in no quantile twice. What ended more than a minute ago is in none."""
    reply: Any = SimpleNamespace(
        status=200, recent=b"", streaming=False, pulse=SimpleNamespace(first_at=0.5, pieces=1)
    )

    async def run() -> None:
        tracer, tallies = Tracer(Tracing(keep=4)), Tallies()
        for tier, count in (("quiet", 3), ("busy", 1000)):
            for at in range(count):
                trail = ended(at, tier)
                trail.last = 0.0 if at == 0 else 1.0  # the first ended a second before the others
                tracer.end(trail, reply, None, tallies, ask_nobody)
        found = await of_late(tracer.ring, tallies, 1000.5 + LATE_S)
        assert {name: len(late.ttft_s) for name, late in found.items()} == {
            "quiet": 2, "busy": LATEST,
        }  # fmt: skip

    asyncio.run(run())


async def ask_nobody(*_: object) -> None:
    raise AssertionError("nothing is sent")


@on_loop
async def test_the_page_needs_no_key_and_its_data_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser sends no key for a page. There is nothing in it; what it shows is kept from
    strangers, from other pages, and from tenants."""
    monkeypatch.setenv("STEER", "steering")
    tenants = {"a": {"keys": ["0" * 64]}}
    async with (
        upstream() as fake,
        gateway(fake, tenants=tenants, admin={"key_env": "STEER"}) as front,
    ):
        page = await front.client.get("/console")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert (await front.client.get("/console/console.css")).status_code == 200
        assert (await front.client.post("/console")).status_code == 405
        assert (await front.client.get("/console/../admin/overview")).status_code in (401, 404)
        for path in (OVERVIEW, "/admin/receipts/x"):
            assert (await front.client.get(path)).status_code == 401
            wrong = {"authorization": "Bearer no"}
            assert (await front.client.get(path, headers=wrong)).status_code == 401
        right = {"authorization": "Bearer steering"}
        assert (await front.client.get(OVERVIEW, headers=right)).status_code == 200


@on_loop
async def test_no_other_page_reads_or_steers() -> None:
    """Where this machine needs no key: a foreign page's requests tell their Origin, and so does
    that of whatever else serves pages on this machine."""
    async with upstream(hi) as old, upstream(hi) as new, gateway(old) as front:
        await put(front, new, share=0.5)
        for origin in ("https://evil.example", "http://127.0.0.1:1", "http://localhost"):
            foreign = {"origin": origin, "content-type": "text/plain"}
            for path in ("pause", "resume", "rollback"):
                answer = await front.client.post(
                    f"{PATH}/{path}", content=b'{"id":"r1","why":"x"}', headers=foreign
                )
                assert answer.status_code == 403
                assert answer.json()["error"]["code"] == "origin_not_allowed"
            assert (await front.client.get(OVERVIEW, headers=foreign)).status_code == 403
        own = {"origin": f"http://127.0.0.1:{front.port}"}
        assert (await front.client.get(OVERVIEW, headers=own)).status_code == 200
        rollout = (await overview(front))["rollout"]
        assert (rollout["paused"], rollout["ended"]) == (None, None)
