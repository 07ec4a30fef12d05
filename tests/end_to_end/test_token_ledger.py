"""The token ledger over recorded requests, with faults and clients that leave: it adds up.

A slice of what `python -m benchmarks.token_ledger` plays whole.
"""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

import pytest

from benchmarks.lab.faulty import MISCOUNTS, Faulty
from benchmarks.token_ledger import RECORDING, play, recorded
from gateway.replica import Replica
from tests.end_to_end.stack import ROOT, Stack, assert_idle, miscounts
from tests.gateway.world import gateway, on_loop

pytestmark = pytest.mark.skipif(not RECORDING.exists(), reason="the recorded requests are missing")
SETTINGS = {
    "resume": "auto",
    "idle_timeout_s": 0.5,
    "retries": {"max_attempts": 6, "budget_share": 1.0, "budget_min_per_s": 50.0},
    "breaker": {"failures": 1000},
}


def short(count: int) -> list[dict[str, Any]]:
    """Recorded requests that a busy machine answers soon."""
    return list(islice((b for b in recorded() if b["stream"] and len(str(b)) < 1500), count))


def behind(*faulty: Faulty) -> list[Replica]:
    """As replicas whose prompts the gateway counts by the model's own tokenizer."""
    folder = ROOT / "pocket" / "target"
    return [
        Replica(f"http://127.0.0.1:{one.port}", own=True, kind="headgate", tokenizer=folder)
        for one in faulty
    ]


def test_tokens_add_up_whatever_breaks(stack: Stack) -> None:
    """Answers are refused, reset, cut, garbled and stalled, clients leave: the counts of client,
    gateway, stream and worker agree for every answer that came whole."""

    @on_loop
    async def played() -> None:
        one, two = (Faulty(stack.worker.url, random.Random(seed), 0.4) for seed in (1, 2))
        async with one, two, gateway(*behind(one, two), **SETTINGS) as edge:
            await edge.live.edge.prompts.loaded()
            ends = await play(edge.port, short(24), 0.1)
            meters = edge.live.edge.meters
            assert meters.checked == ends["whole"] > 6
            assert not any(meters.violations.values()), meters.violations
            assert (
                meters.stages["cached"] + meters.stages["prefilled"] == meters.stages["templated"]
            )
            assert sum((one.made + two.made).values()) > 3

    played()
    assert_idle(stack.worker)
    assert miscounts(stack.worker) == {}


def test_every_planted_miscount_is_found(stack: Stack) -> None:
    """A replica tells another usage than its worker's, in four ways; the ledger names each."""

    @on_loop
    async def played() -> None:
        async with (
            Faulty(stack.worker.url, random.Random(3), lies=1.0) as liar,
            gateway(*behind(liar), resume="auto") as edge,
        ):
            await edge.live.edge.prompts.loaded()
            await play(edge.port, short(10), 0.0)
            found = edge.live.edge.meters.violations
            assert {name: found[name] for name in MISCOUNTS if found[name]} == dict(liar.made)
            assert sum(liar.made.values()) == 10

    played()
