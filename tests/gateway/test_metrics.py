"""The gateway's own page of metrics."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from gateway.metrics import COUNTERS, GAUGES, HISTOGRAMS, OF_ANSWERS
from tests.gateway.world import DONE, HELLO, STREAMED, Front, Peer, gateway, on_loop, upstream

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def said(text: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n' % text.encode()


def usage(**more: object) -> bytes:
    counts = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, **more}
    return b'data: {"choices":[],"usage":%s}\n\n' % json.dumps(counts).encode()


async def scraped(edge: Front) -> dict[str, float]:
    """Value by name and labels' values, by their labels' names; no buckets."""
    response = await edge.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        " ".join([sample.name, *(text for _, text in sorted(sample.labels.items()))]): sample.value
        for family in text_string_to_metric_families(response.text)
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
async def test_every_metric_is_described_as_it_is() -> None:
    """docs/metrics.md has a row of each metric: its name, its labels, what it means."""
    described = PAGE.read_text()
    families = [(one.name, one.labels, one.text) for one in GAUGES]
    families += [(f"{one.name}_total", one.labels, one.text) for one in COUNTERS]
    families += [(name, OF_ANSWERS, text) for name, text, _ in HISTOGRAMS]
    for name, labels, text in families:
        names = ", ".join(f"`{label}`" for label in labels) or "—"
        assert f"| `{name}` | {names} | {text} |" in described, name
    rows = [line for line in described.split("## The gateway's")[1].splitlines() if "_" in line]
    names = {line.split("`")[1] for line in rows if line.startswith(("| `headgate_", "| `gen_ai_"))}
    assert names == {name for name, _, _ in families}
