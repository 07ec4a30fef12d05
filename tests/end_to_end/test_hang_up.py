"""A client that hangs up in the middle of a stream, as pages, ledgers and traces tell of it."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from tests.collector import whole
from tests.end_to_end.stack import (
    LIMIT_S,
    PROBE,
    Program,
    Stack,
    assert_idle,
    idle,
    miscounts,
    until,
)
from tests.end_to_end.test_cancel import ENDLESS, LIMIT_CPU_S, read_chunks
from tests.end_to_end.test_tracing import GATEWAY, RUNTIME, arrived, asked
from tests.gateway.test_metrics import scraped
from tests.gateway.world import STREAMED, Peer, gateway, on_loop, until as soon, upstream

LATE_TOKENS = 64  # that may be made until the worker hears of it: of some steps of one answer
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n' % (b"x" * 8000)


def page(one: Program) -> dict[str, float]:
    """What it counts, by name and the one label that tells how something ended."""
    totals: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(PROBE.get(f"{one.url}/metrics").text):
        for sample in family.samples:
            ends = sample.labels.get("outcome") or sample.labels.get("reason")
            totals[f"{sample.name} {ends}" if ends else sample.name] += sample.value
    return totals


def test_who_hangs_up_is_counted_as_gone_and_stops_the_work(stack: Stack) -> None:
    """Both pages tell of it, as of no failure; the worker has stopped within a few tokens of two
    thousand; no ledger has an entry of what did not come whole; the trace ends as the client's
    going, in both programs."""
    assert_idle(stack.worker)
    front, back, cpu_s = page(stack.gateway), page(stack.worker), stack.worker.cpu_s()
    sock, trace_id, _ = asked(stack, ENDLESS | {"stream": True})
    got = read_chunks(sock, 5)
    sock.close()
    until(
        lambda: idle(stack.worker) and stack.gateway.health()["in_flight"] == 0,
        LIMIT_S, lambda: str(stack.worker.health()),
    )  # fmt: skip
    assert stack.worker.cpu_s() - cpu_s < LIMIT_CPU_S

    def more(name: str, now: dict[str, float], before: dict[str, float]) -> float:
        return now[name] - before[name]

    after = page(stack.gateway)
    requests = "headgate_gateway_requests_total"
    assert more(f"{requests} cancelled", after, front) == 1
    for other in ("ok", "error", "refused", "timeout"):
        assert more(f"{requests} {other}", after, front) == 0
    assert more("headgate_token_ledger_requests_total", after, front) == 0
    # A token's event or two may have been on their way.
    assert 0 <= more("headgate_gateway_bytes_after_cancel_total", after, front) <= 2**14
    worker = page(stack.worker)
    assert more("headgate_token_ledger_requests_total", worker, back) == 0
    abandoned = more("headgate_abandoned_tokens_total abort", worker, back)
    assert got.count(b'"content":') - 1 <= abandoned < 1000
    assert 0 <= more("headgate_late_tokens_total", worker, back) <= LATE_TOKENS
    assert miscounts(stack.gateway) == miscounts(stack.worker) == {}
    spans = arrived(stack, trace_id, GATEWAY, RUNTIME)
    root = whole(spans)
    assert root.attributes["error.type"] == "client_cancelled"
    assert not any(span.error for span in spans)


@on_loop
async def test_what_comes_in_vain_is_on_the_page() -> None:
    """A replica says far more than its client reads, which is held back, and then hangs up: what
    had come, and nobody got, is counted, and the replica's connection is closed."""
    sent = 0
    held_back = asyncio.Event()

    async def answer(peer: Peer) -> None:
        nonlocal sent
        await peer.head()
        while not held_back.is_set():
            sent += len(EVENT)
            try:
                await asyncio.wait_for(peer.chunk(EVENT), 0.5)
            except TimeoutError:
                held_back.set()
        await asyncio.Event().wait()

    async with upstream(answer) as replica, gateway(replica) as edge:
        name = "headgate_gateway_bytes_after_cancel_total"
        assert (await scraped(edge))[name] == 0
        reader, writer = await edge.send(STREAMED)
        got = await reader.readuntil(b"\n\n")
        await held_back.wait()
        writer.transport.abort()
        await soon(lambda: not (replica.running or edge.pool.in_flight))
        told = await scraped(edge)
        assert 2**14 < told[name] <= sent - len(got)
        assert replica.was_left
        cancelled = [
            count
            for key, count in told.items()
            if key.startswith("headgate_gateway_requests_total") and "cancelled" in key
        ]
        assert cancelled == [1.0]
