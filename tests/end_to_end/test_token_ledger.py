"""The token ledger over recorded requests, with guesses, faults and clients that leave: it adds up.

A slice of what `python -m benchmarks.token_ledger` plays whole.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from benchmarks.lab.faulty import MISCOUNTS, Faulty
from benchmarks.token_ledger import RECORDING, TOKENS, WORKER, play, recorded, scrape
from command.machine import free_ports
from gateway.replica import Replica
from tests.end_to_end.stack import (
    ROOT,
    START_S,
    Program,
    assert_idle,
    miscounts,
    program,
    ready,
    until,
)
from tests.gateway.world import gateway, on_loop

pytestmark = pytest.mark.skipif(not RECORDING.exists(), reason="the recorded requests are missing")
SETTINGS = {
    "resume": "auto",
    "idle_timeout_s": 0.5,
    "retries": {"max_attempts": 6, "budget_share": 1.0, "budget_min_per_s": 50.0},
    "breaker": {"failures": 1000},
}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """One that guesses ahead: by look-ups, and by a draft for one tier."""
    folder = tmp_path_factory.mktemp("worker")
    policy = folder / "policy.yaml"
    policy.write_text(WORKER)
    with program(folder, "runtime", policy, *free_ports(1)) as one:
        until(lambda: ready(one), START_S, one.log.read_text)
        yield one


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


def test_tokens_add_up_whatever_breaks(worker: Program) -> None:
    """Answers are refused, reset, cut, garbled and stalled, clients leave, tokens are guessed: the
    counts of client, gateway, stream and worker agree for every answer that came whole."""

    @on_loop
    async def played() -> None:
        one, two = (Faulty(worker.url, random.Random(seed), 0.4) for seed in (1, 2))
        async with one, two, gateway(*behind(one, two), **SETTINGS) as edge:
            await edge.live.edge.prompts.loaded()
            ends = await play(edge.port, short(24), 0.1)
            meters = edge.live.edge.meters
            assert ends["whole"] > 6
            # Who leaves may do so behind the last byte.
            assert ends["whole"] <= meters.checked <= ends["whole"] + ends["left"]
            assert not any(meters.violations.values()), meters.violations
            stages = meters.stages
            assert stages["cached"] + stages["prefilled"] == stages["templated"]
            assert stages["drafted"] > stages["accepted"] > 0
            assert sum((one.made + two.made).values()) > 3

    played()
    assert_idle(worker)
    assert miscounts(worker) == {}
    told = scrape(worker.url)
    assert told[f"{TOKENS} drafted"] > told[f"{TOKENS} accepted"] > 0


def test_every_planted_miscount_is_found(worker: Program) -> None:
    """A replica tells another usage than its worker's, in each of its ways; the ledger names
    them."""

    @on_loop
    async def played() -> None:
        async with (
            Faulty(worker.url, random.Random(3), lies=1.0) as liar,
            gateway(*behind(liar), resume="auto") as edge,
        ):
            await edge.live.edge.prompts.loaded()
            await play(edge.port, short(24), 0.0)
            found = edge.live.edge.meters.violations
            assert {name: found[name] for name in MISCOUNTS if found[name]} == dict(liar.made)
            assert liar.made.keys() == MISCOUNTS.keys()
            assert sum(liar.made.values()) == 24

    played()
