"""Scores of a run as events of spans, which the servers that were asked join."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from evals.pairs import BASELINE, CANDIDATE
from tests.collector import collecting
from tests.evals.test_run import Server, hypothesis, ran, rows, suite


class Noting(Server):
    """Notes which trace it was asked to join."""

    def __init__(self) -> None:
        super().__init__()
        self.joined: list[str | None] = []

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.joined.append(request.headers.get("traceparent"))
        return await super().chat(request)


def run(tmp_path: Path, warmup: int = 0) -> list[str | None]:
    async def check() -> list[str | None]:
        asked: Any = hypothesis(aa_control=False, warmup=warmup)
        server = Noting()
        async with server.served():
            arms = [server.arm(BASELINE), server.arm(CANDIDATE)]
            await ran(asked, arms, suite(asked, rows(10)), tmp_path / "j")
        return server.joined

    return asyncio.run(check())


def test_each_request_of_a_judgement_has_a_span_with_its_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the environment names a collector; the servers' spans stand below."""
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        joined = run(tmp_path)
    spans = collector.spans
    assert len(spans) == len(set(joined)) == 20
    assert {f"00-{one.trace_id}-{one.span_id}-01" for one in spans} == set(joined)
    assert {one.attributes["headgate.arm"] for one in spans} == {BASELINE, CANDIDATE}
    assert {one.service for one in spans} == {"headgate-evals"}
    assert {tuple(one.events) for one in spans} == {("gen_ai.evaluation.result",)}
    assert all(
        one.event_attributes == [
            {"gen_ai.evaluation.name": "correct", "gen_ai.evaluation.score.value": 1.0}
        ]
        for one in spans
    )  # fmt: skip


def test_a_request_that_only_warms_up_joins_no_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not judged, so that no span of ours is ever sent for it: the server's would be without
    their root, or stand a second time below the one of the same question that is judged."""
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        joined = run(tmp_path, warmup=1)
    judged = [one for one in joined if one is not None]
    assert len(joined) > len(judged) == len(set(judged)) == 20
    assert {f"00-{one.trace_id}-{one.span_id}-01" for one in collector.spans} == set(judged)


def test_without_a_collector_requests_carry_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert set(run(tmp_path)) == {None}
