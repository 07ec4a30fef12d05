"""The gateway's own page of metrics."""

from __future__ import annotations

import asyncio
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from gateway.exposition import Format
from gateway.fate import TRIED, tried_of
from gateway.meters import MODELS_MAX, OTHER, Meters
from gateway.metrics import COUNTERS, GAUGES, HISTOGRAMS, OF_ANSWERS, TOLD, Reading
from gateway.scrape import told
from policies.enabling import Gated
from policies.standing import Standing
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

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def said(text: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n' % text.encode()


def usage(**more: object) -> bytes:
    counts = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, **more}
    return b'data: {"choices":[],"usage":%s}\n\n' % json.dumps(counts).encode()


async def page(edge: Front, rollout: Mapping[str, Any] | None, form: Format) -> str:
    reading = Reading(edge.live, rollout, 1000.0)
    return "".join([head + samples.decode() async for _, head, samples in told(reading, form)])


async def scraped(edge: Front) -> dict[str, float]:
    response = await edge.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return values(response.text)


def values(text: str) -> dict[str, float]:
    """Value by name and labels' values, by their labels' names; no buckets."""
    return {
        " ".join([sample.name, *(text for _, text in sorted(sample.labels.items()))]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "le" not in sample.labels
    }


@on_loop
async def test_requests_are_counted_by_tier() -> None:
    async with upstream() as fake, gateway(fake) as edge:
        await edge.post(HELLO)
        await edge.post(STREAMED, headers={"x-headgate-tier": "interactive"})
        found = await scraped(edge)
        assert found["headgate_gateway_admitted_total standard"] == 1
        assert found["headgate_gateway_admitted_total interactive"] == 1
        assert found["headgate_gateway_first_token_in_time_total interactive"] == 1
        assert found["headgate_gateway_requests_running batch"] == 0
        assert found["headgate_gateway_replicas_ready"] == 1


@on_loop
async def test_a_replica_that_fails_is_told_of_though_others_answer_for_it() -> None:
    """The bug: what another one made good was in no metric, nor in the console."""

    async def breaks(peer: Peer) -> None:
        await peer.json({"error": {"message": "out of memory"}}, status=500)

    async def refuses(peer: Peer) -> None:
        await peer.json({"error": {"message": "too long"}}, status=400)

    async with (
        upstream() as good,
        upstream(breaks) as bad,
        gateway(good, bad, routing={"policy": "round_robin"}, retries={"budget_share": 1}) as edge,
    ):
        for _ in range(6):
            assert (await edge.post(HELLO)).status_code == 200
        good.answer = refuses
        bad.health = 503
        await until(lambda: not edge.pool.replicas[1].healthy)
        assert (await edge.post(HELLO)).status_code == 400
        await until(lambda: len(edge.live.edge.tracer.ring) == 7)
        found = await scraped(edge)
        tried = "headgate_gateway_replica_attempts_total"
        assert found[f"{tried} ok {good.url}"] == 6
        assert found[f"{tried} failed {bad.url}"] == len(bad.requests) > 0
        assert found[f"{tried} refused {good.url}"] == 1
        assert f"headgate_gateway_replica_requests_total error {bad.url}" not in found
        told = (await edge.client.get("/admin/overview")).json()["replicas"]
        none = dict.fromkeys(TRIED, 0)
        assert [one["tried"] for one in told] == [
            none | {"ok": 6, "refused": 1}, none | {"failed": len(bad.requests)},
        ]  # fmt: skip
        assert found[f"{tried} failed {good.url}"] == 0  # from the first on: rates see the next


@pytest.mark.parametrize(
    ("outcome", "broke", "how"),
    [
        ("200", False, "ok"), ("200", True, "failed"), ("404", False, "refused"),
        ("429", False, "refused"), ("500", False, "failed"), ("unreachable", False, "failed"),
        ("timeout", False, "failed"), ("failed", False, "failed"), ("late", False, "late"),
        ("left", False, "left"), ("stale", False, None),
    ],
)  # fmt: skip
def test_how_an_attempt_went(outcome: str, broke: bool, how: str | None) -> None:
    hop: Any = SimpleNamespace(outcome=outcome, broke=broke)
    assert tried_of(hop) == how


@on_loop
async def test_a_gateway_tells_what_it_is_and_what_its_process_takes() -> None:
    """Also as OpenMetrics, where a counter's name is told without its end."""
    async with upstream() as fake, gateway(fake) as edge:
        found = await scraped(edge)
        assert found["process_resident_memory_bytes"] > 2**20
        assert found["process_cpu_seconds_total"] > 0
        assert found["process_start_time_seconds"] <= time.time()
        (name,) = [name for name in found if name.startswith("headgate_gateway_info ")]
        assert found[name] == 1
        assert platform.python_version() in name
        asked = {"accept": "application/openmetrics-text"}
        told = (await edge.client.get("/metrics", headers=asked)).text
        families = {one.name for one in openmetrics.text_string_to_metric_families(told)}
        assert {"process_cpu_seconds", "process_resident_memory_bytes"} <= families


@on_loop
async def test_a_stream_is_counted_by_tier_model_and_arm() -> None:
    """Its first token (a role is none), its tokens' mean time, its largest gap, how it ended."""
    chunks = [b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n']
    chunks += [said("a"), said("b"), said("c"), usage(), DONE]

    async def answer(peer: Peer) -> None:
        await peer.head()
        for chunk in chunks:
            await peer.chunk(chunk)
            await asyncio.sleep(0)
        await peer.end()

    async with upstream(answer) as fake, gateway(fake) as edge:
        await edge.post(STREAMED)
        found = await scraped(edge)
        for name in ("time_to_first_token", "time_per_output_token", "request_duration"):
            assert found[f"gen_ai_server_{name}_seconds_count baseline m standard"] == 1
        assert found["headgate_gateway_requests_total baseline m ok standard"] == 1
        assert found["headgate_gateway_goodput_requests_total baseline true standard"] == 1
        assert found["headgate_token_ledger_tokens_total emitted"] == 3


@on_loop
async def test_a_tier_that_has_missed_nothing_says_so() -> None:
    """Kept and missed are there before the first answer: alerts divide the one by both, and the
    rate of a series that begins with its first miss does not know that miss."""

    async def answer(peer: Peer) -> None:
        await peer.stream(said("a"), usage(), DONE)

    async with upstream(answer) as fake, gateway(fake) as edge:
        for kept in (0, 1):
            found = await scraped(edge)
            for tier in ("interactive", "standard", "batch"):
                name = "headgate_gateway_goodput_requests_total baseline"
                assert found[f"{name} false {tier}"] == 0
                assert found[f"{name} true {tier}"] == (kept if tier == "standard" else 0)
            await edge.post(STREAMED)


@on_loop
async def test_traffic_adds_no_series() -> None:
    """Sessions, users, salts, request ids and models that nobody serves, each of them new: the page
    has the series that it had, and no word of theirs."""

    async def answer(peer: Peer) -> None:
        await peer.stream(said("a"), said("b"), usage(), DONE)

    async with upstream(answer) as fake, gateway(fake) as edge:
        for body in (STREAMED, STREAMED | {"model": "nobody's"}):
            await edge.post(body)
        before = set(await scraped(edge))
        for first in range(0, 100, 20):
            await asyncio.gather(*(strange(edge, first + at) for at in range(20)))
        assert set(await scraped(edge)) == before
        text = (await edge.client.get("/metrics")).text
    assert "secret" not in text
    assert len(text.splitlines()) < 1000
    assert 'model="other"' in text


async def strange(edge: Front, number: int) -> None:
    """A request whose every name is new, every other time even its model."""
    secret = f"secret{number}"
    headers = dict.fromkeys(("x-request-id", "x-session-id", "x-session-affinity"), secret)
    headers["traceparent"] = f"00-{number + 1:032x}-00f067aa0ba902b7-01"
    named = dict.fromkeys(("user", "prompt_cache_key", "cache_salt"), secret)
    named |= {"model": secret} if number % 2 else {}
    messages = [{"role": "user", "content": secret}]
    await edge.post(STREAMED | named | {"messages": messages}, headers=headers)


def test_a_thousand_models_add_no_series() -> None:
    """What clients ask for is a model only if a replica names it, and only so many are told."""
    meters = Meters()
    labels = {meters.model(f"m{number}", lambda: True) for number in range(1000)}
    assert len(labels) == MODELS_MAX + 1
    assert meters.model("one more", lambda: True) == meters.model("another", lambda: False) == OTHER
    assert meters.model("m1", lambda: False) == "m1"


@on_loop
async def test_buckets_name_a_trace_for_who_can_read_it() -> None:
    """OpenMetrics where it is asked for, with the client's own trace as the latest exemplar of a
    first token's bucket; the plain page has none."""

    async def answer(peer: Peer) -> None:
        await peer.stream(said("a"), said("b"), usage(), DONE)

    name = "gen_ai_server_time_to_first_token_seconds_bucket"
    async with upstream(answer) as fake, gateway(fake) as edge:
        trace = "2" * 32
        await edge.post(STREAMED, headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-03"})
        accept = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
        response = await edge.client.get("/metrics", headers=accept)
        plain = (await edge.client.get("/metrics")).text
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")
    exemplars = [
        sample.exemplar
        for family in openmetrics.text_string_to_metric_families(response.text)
        for sample in family.samples
        if sample.name == name and sample.exemplar is not None
    ]
    assert [one.labels for one in exemplars] == [{"trace_id": trace}]
    assert trace not in plain


@on_loop
async def test_streams_go_on_while_a_page_is_made() -> None:
    """Others on the loop get turns between its pieces: a scrape of many series stops no stream."""
    turns = 0

    async def turning() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async with upstream() as fake, gateway(fake) as edge:
        duration_s = edge.live.edge.meters.duration_s
        for number in range(4000):
            duration_s.observe(("standard", f"m{number}", "baseline"), 0.05)
        other = asyncio.ensure_future(turning())
        await page(edge, None, Format(openmetrics=True))
        other.cancel()
    assert turns > 1


@on_loop
async def test_every_metric_is_described_as_it_is() -> None:
    """docs/metrics.md has a row of each metric: its name, its labels, what it means."""
    described = PAGE.read_text()
    families = [(one.name, one.labels, one.text) for one in (*GAUGES, TOLD)]
    families += [(f"{one.name}_total", one.labels, one.text) for one in COUNTERS]
    families += [(name, OF_ANSWERS, text) for name, text, _ in HISTOGRAMS]
    for name, labels, text in families:
        names = ", ".join(f"`{label}`" for label in labels) or "—"
        assert f"| `{name}` | {names} | {text} |" in described, name
    rows = [line for line in described.split("## The gateway's")[1].splitlines() if "_" in line]
    names = {
        line.split("`")[1]
        for line in rows
        if line.startswith(("| `headgate_", "| `gen_ai_", "| `process_"))
    }
    assert names == {name for name, _, _ in families}


@on_loop
async def test_tokens_that_wait_are_told_for_an_autoscaler() -> None:
    """Prompts that wait here for a place, and those that were sent and have no first token."""
    release = asyncio.Event()
    name = "headgate_gateway_queued_uncached_tokens"
    async with upstream(held(release)) as fake, gateway(fake, running_per_replica=1) as edge:
        requests = [asyncio.ensure_future(edge.post(STREAMED)) for _ in range(3)]
        line = edge.live.edge.admission.health
        await until(lambda: bool(line()) and line()[0]["tiers"]["standard"]["waiting"] == 2)
        await until(lambda: fake.running == 1)
        found = await scraped(edge)
        sent = found[f"{name} replicas"]
        assert found[f"{name} gateway"] == 2 * sent > 0
        release.set()
        await asyncio.gather(*requests)
        found = await scraped(edge)
        assert found[f"{name} gateway"] == found[f"{name} replicas"] == 0


@on_loop
async def test_optimizations_and_a_rollout_show_their_state() -> None:
    """One of the states is 1; a verdict has an age, and time left; shares are those ordered."""
    stale = Standing("kv-int8", "kv.yaml", "lossy_kv", ("runtime.kv",), "stale", made_at=900.0,
                     expires_at=950.0)  # fmt: skip
    rollout = {"name": "w8", "share": 0.25, "shadow": 0.5, "ended": None, "lease_s": 9.0,
               "suspended": False}  # fmt: skip
    async with upstream() as fake, gateway(fake) as edge:
        edge.live.gated = Gated(PAGE, edge.live.edge.policy, (stale,))
        found = values(await page(edge, rollout, Format(openmetrics=False)))
    assert found["headgate_optimization_state kv-int8 stale"] == 1
    assert found["headgate_optimization_state kv-int8 on"] == 0
    assert found["headgate_optimization_enabled kv-int8"] == 0
    assert found["headgate_verdict_age_seconds kv-int8"] == 100
    assert found["headgate_verdict_valid_seconds kv-int8"] == -50
    assert found["headgate_rollout_share w8"] == 0.25
    assert found["headgate_rollout_shadow_share w8"] == 0.5
    assert found["headgate_rollout_state w8 live"] == 1
    assert found["headgate_rollout_state w8 ended"] == 0
