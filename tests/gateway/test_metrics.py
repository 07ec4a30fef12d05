"""The gateway's own page of metrics."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.world import HELLO, STREAMED, gateway, on_loop, upstream

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


@on_loop
async def test_requests_are_counted_by_tier() -> None:
    async with upstream() as fake, gateway(fake) as edge:
        await edge.post(HELLO)
        await edge.post(STREAMED, headers={"x-headgate-tier": "interactive"})
        response = await edge.client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        found = {
            (sample.name, sample.labels.get("tier")): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }
        assert found["headgate_gateway_admitted_total", "standard"] == 1
        assert found["headgate_gateway_admitted_total", "interactive"] == 1
        assert found["headgate_gateway_first_token_in_time_total", "interactive"] == 1
        assert found["headgate_gateway_requests_running", "batch"] == 0
        assert found["headgate_gateway_replicas_ready", None] == 1


@on_loop
async def test_every_metric_is_described(tmp_path: Path) -> None:
    record = {"consent": "given", "path": str(tmp_path)}
    async with upstream() as fake, gateway(fake, record=record) as edge:
        text = (await edge.client.get("/metrics")).text
        described = PAGE.read_text()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removeprefix("headgate_gateway_")
                assert f"`{name}`" in described, name
