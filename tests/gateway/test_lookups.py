"""What each tenant used, and requests sifted by what one looks for: of all gateway processes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from gateway import tenants as counted
from gateway.fate import FATES, fate_of
from gateway.sieve import BOUNDS_S, FIELDS, Sieve, merged, sift
from gateway.tenants import COUNTS, MOST, OTHERS, SLOT_S, WINDOW_S, Tenants, together
from gateway.usage import Usage
from policies.slo import key_hash
from tests.gateway.scripted import ASKED, PROMPT_TOKENS, TOKENS, Engine, stall
from tests.gateway.test_siblings import folder, two
from tests.gateway.world import Front, gateway, held, on_loop, until, upstream

__all__ = ["folder"]
REQUESTS, TENANTS = "/admin/requests", "/admin/tenants"
KEYS = {"acme": "hg-acme-0123456789abcdefghij", "zeta": "hg-zeta-0123456789abcdefghij"}
TWO = {name: {"keys": [key_hash(key)]} for name, key in KEYS.items()}
STEERING = {"authorization": "Bearer steering"}


async def get(front: Front, path: str, **asked: Any) -> Any:
    answer = await front.client.get(path, params=asked, headers=STEERING)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def ask(front: Front, tenant: str, tier: str = "standard", **more: Any) -> int:
    headers = {"authorization": f"Bearer {KEYS[tenant]}", "x-headgate-tier": tier}
    answer = await front.post(ASKED | more, headers=headers)
    return int(answer.status_code)


async def ended(front: Front, requests: int) -> None:
    """Their trails are closed a moment after their answers."""
    await until(lambda: len(front.live.edge.tracer.ring) == requests)


def trail(**more: Any) -> Any:
    """As far as they are looked at."""
    known = {
        "tenant": "a", "model": "m", "service": None, "arm": "", "hops": (), "usage": None,
        "status": 200, "error": "", "ttft_s": None, "tpot_s": None, "e2e_s": 1.0, "ended": 0.0,
        "request_id": "req_1", "trace_id": "t", "receipt": None, "at": 0.0, "keep": "",
        "stream": True,
    }  # fmt: skip
    return SimpleNamespace(**known | more)


# ---- tenants ------------------------------------------------------------------------------------


@on_loop
async def test_each_tenant_is_told_with_what_it_used_and_what_is_left_and_no_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By name: requests, tokens by tier, limits and what is left of them, who was sent away. One
    that asked for nothing is there, too. Looking takes nothing of a limit."""
    monkeypatch.setenv("STEER", "steering")
    tenants: dict[str, Any] = {name: dict(one) for name, one in TWO.items()}
    tenants["acme"] |= {"requests_per_minute": 3, "tokens_per_day": 10_000, "weight": 2.0}
    async with (
        upstream(Engine("one")) as fake,
        gateway(fake, tenants=tenants, admin={"key_env": "STEER"}) as front,
    ):
        assert [await ask(front, "acme") for _ in range(2)] == [200, 200]
        assert await ask(front, "acme", "batch") == 200
        assert await ask(front, "acme") == 429
        assert await ask(front, "acme", temperature="hot", messages=0) in (400, 422)
        await ended(front, 5)
        for _ in range(3):
            told = await get(front, TENANTS)
        acme, zeta = told["tenants"]
        each = PROMPT_TOKENS + len(TOKENS)
        assert (acme["name"], acme["weight"], acme["known"]) == ("acme", 2.0, True)
        for span in (acme["now"], acme["ever"], told["all"]["ever"]):
            assert (span["ok"], span["limited"], span["refused"]) == (3, 1, 1)
            assert (span["requests"], span["judged"], span["missed"]) == (5, 3, 0)
            assert span["billed_tokens"] == 3 * each
            assert span["computed"] == 3 * each - span["cached_tokens"]
            assert span["tiers"] == {"batch": each, "standard": 2 * each}
        requests, budget = acme["limits"]
        assert (requests["what"], requests["limit"], requests["per"]) == ("requests", 3, "minute")
        assert 0 <= requests["left"] < 1
        assert (budget["what"], budget["left"]) == ("budget", 10_000 - 3 * each)
        assert (zeta["name"], zeta["ever"]["requests"], zeta["limits"]) == ("zeta", 0, [])
        assert told["window_s"] == WINDOW_S
        assert told["others"] is None
        text = json.dumps(told)
        assert not any(key in text or key_hash(key) in text for key in KEYS.values())
        (only,) = (await get(front, TENANTS, top=1, by="limited"))["tenants"]
        assert only["name"] == "acme"
        for wrong in ({"by": "key"}, {"top": 0}, {"top": 1000}, {"tpo": 3}):
            answer = await front.client.get(TENANTS, params=wrong, headers=STEERING)
            assert answer.status_code == 400
        assert (await front.client.get(TENANTS)).status_code == 401
        theirs = {"authorization": f"Bearer {KEYS['acme']}"}
        for path in (TENANTS, REQUESTS):
            assert (await front.client.get(path, headers=theirs)).status_code == 401


@on_loop
async def test_what_several_processes_counted_is_one_list(folder: Path) -> None:
    """Each has its own requests; whichever is asked tells of all, and of how many it could ask."""
    async with upstream(Engine("one")) as fake, two(folder, fake) as (one, other):
        for front, count in ((one, 2), (other, 3)):
            for _ in range(count):
                assert (await front.post(ASKED)).status_code == 200
            await ended(front, count)
        for front in (one, other):
            told = await get(front, TENANTS)
            (everybody,) = told["tenants"]
            assert (everybody["name"], everybody["ever"]["ok"]) == ("", 5)
            assert told["processes"] == {"asked": 2, "of": 2}
            found = await get(front, REQUESTS, limit=4)
            assert (found["matched"], found["kept"], len(found["requests"])) == (5, 5, 4)
            assert sum(one["count"] for one in found["buckets"]) == 5


@on_loop
async def test_limits_that_processes_share_out_are_told_as_the_share_that_one_gives(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a store each of two processes gives half of 10 requests a minute."""
    monkeypatch.setenv("STEER", "steering")
    tenants = {"acme": dict(TWO["acme"], requests_per_minute=10)}
    more: dict[str, Any] = {"tenants": tenants, "admin": {"key_env": "STEER"}}
    async with upstream(Engine("one")) as fake, two(folder, fake, **more) as (one, _):
        assert await ask(one, "acme") == 200
        await ended(one, 1)
        told = await get(one, TENANTS)
        (limit,) = told["tenants"][0]["limits"]
        assert (told["share_of"], limit["limit"]) == (2, 5)
        assert 4 <= limit["left"] < 5


rows = st.lists(
    st.tuples(
        st.sampled_from("abcdefgh"), st.floats(0, 3 * WINDOW_S), st.sampled_from(("ok", "failed")),
        st.integers(0, 99),
    ),
    max_size=60,
)  # fmt: skip


@given(rows, st.integers(1, 9), st.integers(1, 3))
def test_what_is_told_adds_up_however_it_is_split(some: Any, top: int, among: int) -> None:
    """Over processes, and into the first few and all others; the window has what ended in it, and
    nothing that ended a slot before."""
    some = sorted(some, key=lambda one: one[1])
    processes = [Tenants() for _ in range(among)]
    for at, (name, moment, fate, tokens) in enumerate(some):
        usage = Usage(tokens, 1, 0)
        status = 200 if fate == "ok" else 500
        processes[at % among].ended(trail(tenant=name, ended=moment, status=status, usage=usage))
    now = 3 * WINDOW_S
    told = together([one.told(now) for one in processes], "hi", "computed", top)
    everything = told["all"]
    assert everything["ever"]["requests"] == len(some)
    assert everything["ever"]["prompt_tokens"] == sum(one[3] for one in some)
    assert everything["ever"]["failed"] == sum(one[2] == "failed" for one in some)
    recent = everything["now"]["requests"]
    assert recent <= sum(one[1] > now - WINDOW_S for one in some)
    assert recent >= sum(one[1] > now - WINDOW_S + SLOT_S for one in some)
    rest = told["others"]["ever"]["requests"] if told["others"] else 0
    assert sum(one["ever"]["requests"] for one in told["tenants"]) + rest == len(some)
    assert len(told["tenants"]) <= top
    order = [one["now"]["computed"] for one in told["tenants"]]
    assert order == sorted(order, reverse=True)


def test_more_tenants_than_are_counted_each_are_counted_together() -> None:
    """However many there are, memory is bounded, and no request is lost from the sum."""
    kept = Tenants()
    for at in range(MOST + 7):
        for _ in range(2):
            kept.ended(trail(tenant=f"t{at}"))
    told = kept.told(0.0)
    assert len(told) == MOST + 1
    assert sum(told[OTHERS][1][""]) == 14
    shown = together([told], (), "requests", 5)
    assert [len(shown["tenants"]), shown["others"]["tenants"]] == [5, MOST - 5 + 1]
    assert shown["all"]["ever"]["requests"] == 2 * (MOST + 7)
    assert len(COUNTS) == len(FATES) + len(counted.TOKENS)


# ---- requests -----------------------------------------------------------------------------------


@on_loop
async def test_requests_are_found_by_what_they_were_and_a_bucket_leads_to_a_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By tenant, tier, outcome, text and how long they took; each bucket names the slowest of it,
    which has a trace."""
    monkeypatch.setenv("STEER", "steering")
    tenants: dict[str, Any] = {name: dict(one) for name, one in TWO.items()}
    tenants["zeta"] |= {"requests_per_minute": 1}
    async with (
        upstream(Engine("one")) as fake,
        gateway(fake, tenants=tenants, admin={"key_env": "STEER"}) as front,
    ):
        for tenant, tier in (("acme", "batch"), ("acme", "standard"), ("zeta", "batch")):
            assert await ask(front, tenant, tier) == 200
        assert await ask(front, "zeta") == 429
        await ended(front, 4)

        async def lines(**asked: Any) -> list[tuple[str, str]]:
            found = await get(front, REQUESTS, **asked)
            assert found["matched"] == len(found["requests"])
            return [(one["tenant"], one["outcome"]) for one in found["requests"]]

        assert await lines() == [
            ("zeta", "limited"), ("zeta", "ok"), ("acme", "ok"), ("acme", "ok"),
        ]  # fmt: skip
        assert await lines(tenant="acme", tier="batch") == [("acme", "ok")]
        assert await lines(outcome="limited") == [("zeta", "limited")]
        assert await lines(outcome="missed") == []
        assert await lines(tenant="nobody") == []
        assert await lines(text="RATE_LIMIT") == [("zeta", "limited")]
        found = await get(front, REQUESTS, order="slowest")
        slowest = max(found["requests"], key=lambda one: one["ttft_s"] or 0)
        assert found["requests"][0]["id"] == slowest["id"]
        assert await lines(text=slowest["id"]) == [(slowest["tenant"], "ok")]
        assert await lines(text=slowest["receipt"]) == [(slowest["tenant"], "ok")]
        assert found["choices"]["tenant"] == ["acme", "zeta"]
        assert found["choices"]["replica"] == [fake.url]
        (last,) = [one for one in found["buckets"] if one["slowest"] == slowest["id"]]
        trace = await get(front, f"/admin/traces/{last['slowest']}")
        assert sum(trace["phases"].values()) == pytest.approx(trace["e2e_s"], abs=1e-6)
        over = slowest["ttft_s"]
        assert await lines(over_s=over) == []
        assert "Say it." not in json.dumps(found)
        for wrong in (
            {"outcome": "bad"}, {"clock": "cpu"}, {"order": "x"}, {"over_s": "-1"},
            {"under_s": "nan"}, {"limit": 0}, {"tennant": "acme"},
        ):  # fmt: skip
            answer = await front.client.get(REQUESTS, params=wrong, headers=STEERING)
            assert answer.status_code == 400, wrong


@on_loop
async def test_one_that_left_and_one_that_failed_are_told_apart() -> None:
    """Who left missed nothing; what a replica could not answer did."""

    async def away(peer: Any) -> None:
        await peer.json({"error": {"message": "no"}}, status=500)

    async with upstream(away) as fake, gateway(fake) as front:
        assert (await front.post(ASKED)).status_code >= 500
        await ended(front, 1)
        found = await get(front, REQUESTS, outcome="missed")
        assert [one["outcome"] for one in found["requests"]] == ["failed"]
    release = asyncio.Event()
    async with upstream(held(release, b'data: {"choices":[]}\n\n')) as fake, gateway(fake) as front:
        task = asyncio.ensure_future(front.post(ASKED))
        await until(lambda: fake.running == 1)
        task.cancel()
        await ended(front, 1)
        found = await get(front, REQUESTS)
        assert [one["outcome"] for one in found["requests"]] == ["cancelled"]
        release.set()


@on_loop
async def test_what_was_computed_for_who_left_is_counted() -> None:
    """The bug: requests that were cancelled counted nothing, so that who always left was the
    cheapest tenant. What was foreseen of the prompt, and seen of the answer; nothing is billed."""
    engine = Engine("one")
    async with upstream(stall(engine, 3)) as fake, gateway(fake) as front:
        async with front.client.stream("POST", "/v1/chat/completions", json=ASKED) as answer:
            async for piece in answer.aiter_text():
                if TOKENS[2] in piece:
                    break
        await ended(front, 1)
        (one,) = front.live.edge.tracer.ring
        assert one.receipt is not None
        assert one.receipt.foreseen is not None
        (seen,) = (await get(front, TENANTS))["tenants"]
        ever = seen["ever"]
        assert (ever["cancelled"], ever["billed_tokens"]) == (1, 0)
        assert 1 <= ever["untold_tokens"] - one.receipt.foreseen.prompt <= 3  # in as many reads
        assert ever["computed"] == ever["untold_tokens"]


@settings(deadline=None)  # loops are made and ended
@given(
    st.lists(st.tuples(st.floats(0, 100), st.sampled_from((200, 404, 500))), max_size=40),
    st.integers(1, 3),
)
def test_buckets_have_each_request_once_and_lead_to_the_slowest(some: Any, among: int) -> None:
    """However processes share them; and the list of a bucket has as many as the bucket says."""
    every = [
        trail(ttft_s=took, status=status, request_id=f"r{at}")
        for at, (took, status) in enumerate(some)
    ]
    parts = [every[at::among] for at in range(among)]
    sieve = Sieve.of({})
    whole = merged([asyncio.run(sift(one, sieve)) for one in parts], sieve)
    assert sum(one["count"] for one in whole["buckets"]) == whole["matched"] == len(every)
    assert sum(one["missed"] for one in whole["buckets"]) == sum(s == 500 for _, s in some)
    for over, bucket in zip((0.0, *BOUNDS_S), whole["buckets"], strict=True):
        asked = {"over_s": str(over)}
        if bucket["under_s"] is not None:
            asked["under_s"] = str(bucket["under_s"])
        found = asyncio.run(sift(every, Sieve.of(asked)))
        assert found["matched"] == bucket["count"]
        times = [one["ttft_s"] for one in found["requests"]]
        assert bucket["slowest_s"] == max(times, default=0.0)
    assert set(whole["choices"]) == set(FIELDS)


@pytest.mark.parametrize(
    ("more", "fate"),
    [
        ({}, "ok"), ({"status": 400, "error": "bad"}, "refused"),
        ({"status": 429, "error": "429"}, "refused"),
        ({"status": 429, "error": "insufficient_quota"}, "limited"),
        ({"status": 503, "error": "overloaded"}, "shed"),
        ({"status": 504, "error": "deadline_exceeded"}, "shed"),
        ({"status": 200, "error": "upstream_stream_cut"}, "failed"),
        ({"status": 200, "error": "client_cancelled"}, "cancelled"),
        ({"ttft_s": 2.1, "service": SimpleNamespace(ttft_ms=2000.0, tpot_ms=None)}, "late"),
        ({"tpot_s": 0.2, "service": SimpleNamespace(ttft_ms=None, tpot_ms=100.0)}, "late"),
    ],
)  # fmt: skip
def test_how_it_ended_is_one_word(more: dict[str, Any], fate: str) -> None:
    assert fate_of(trail(**more)) == fate
