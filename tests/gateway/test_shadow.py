"""A mirrored request is part of the trace of the request that it mirrors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from gateway.trace_ring import told as as_told
from policies.tracing import Tracing
from tests.collector import collecting, whole
from tests.gateway.test_tracing import PARENT
from tests.gateway.test_variants import broken, put
from tests.gateway.world import (
    STREAMED,
    Answer,
    Peer,
    Replica,
    gateway,
    held,
    on_loop,
    pong,
    until,
    upstream,
)


def shadows(spans: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in spans if one["attributes"].get("headgate.arm") == "shadow"]


@pytest.mark.parametrize("parent", [PARENT, None], ids=["joined", "begun"])
@pytest.mark.parametrize("outlives", [True, False], ids=["after", "before"])
def test_a_mirrored_request_is_a_span_below_the_one_root(
    outlives: bool, parent: str | None
) -> None:
    """The candidate's replica joins a CLIENT span, marked as a shadow's, whether that ends before
    the root or after it; one that outlives the root is linked to it. A collector gets each once."""

    @on_loop
    async def run() -> None:
        release = asyncio.Event()

        async def waits(peer: Peer) -> None:
            await release.wait()
            await pong(peer)

        with collecting() as collector:
            tracing = Tracing(endpoint=collector.url, share=1.0)
            async with (
                upstream(pong if outlives else waits) as old,
                upstream(waits if outlives else pong) as new,
                gateway(old, tracing=tracing) as front,
            ):
                await put(front, new, share=0.0, shadow=1.0)
                headers = {"traceparent": parent} if parent else {}
                asked = asyncio.create_task(front.post(STREAMED, headers=headers))
                tracer = front.live.edge.tracer
                if outlives:
                    await asked
                    await until(lambda: len(tracer.ring) == 1)
                    assert not shadows(as_told(next(iter(tracer.ring)))["spans"])
                else:
                    await until(lambda: len(new.requests) == 1 and not new.running)
                release.set()
                await asked
                await until(lambda: len(tracer.ring) == 1)
                trail = next(iter(tracer.ring))
                await until(lambda: trail.shadow is not None and trail.shadow.ended > 0)
                kept: dict[str, Any] = as_told(next(iter(tracer.ring)))
                told = new.requests[0].headers["traceparent"]
                await until(lambda: len(collector.spans) == len(kept["spans"]))
        root, *below = kept["spans"]
        (shadow,) = shadows(below)
        assert {one["parent_id"] for one in below} == {root["span_id"]}
        assert told.split("-")[1:3] == [kept["trace_id"], shadow["span_id"]]
        assert (shadow["kind"], shadow["name"]) == ("CLIENT", "chat m")
        assert (shadow["end_s"] > root["end_s"]) == outlives
        assert ("links" in shadow) == outlives
        sent = collector.spans
        assert whole(sent).span_id == root["span_id"]
        assert {one.span_id: one.links for one in sent if one.links} == (
            {shadow["span_id"]: [root["span_id"]]} if outlives else {}
        )

    run()


@pytest.mark.parametrize("outlives", [True, False], ids=["after", "before"])
@on_loop
async def test_of_a_request_that_is_sent_after_all_a_shadows_worker_is_asked_too(
    outlives: bool,
) -> None:
    """It was not sampled, took too long, and so both workers are asked for their spans of it; one
    that answers for nobody and is slower than the root, once more at its end."""
    release, asked = asyncio.Event(), set[tuple[str, bool]]()
    path = f"/traces/{PARENT.split('-')[1]}"

    async def waits(peer: Peer) -> None:
        await release.wait()
        await pong(peer)

    def spied(name: str, answer: Answer) -> Answer:
        async def answers(peer: Peer) -> None:
            if peer.request.path == path:
                asked.add((name, release.is_set()))
                await peer.json({"spans": []})
            else:
                await answer(peer)

        return answers

    with collecting() as collector:
        tracing = Tracing(endpoint=collector.url, share=0.0, slow_s=1e-6)
        async with (
            upstream(spied("old", pong if outlives else waits)) as old,
            upstream(spied("new", waits if outlives else pong)) as new,
            gateway(Replica(old.url, own=True, kind="headgate"), tracing=tracing) as front,
        ):
            worker = {"url": new.url, "kind": "headgate"}
            await put(front, replicas=[worker], share=0.0, shadow=1.0)
            headers = {"traceparent": PARENT[:-2] + "00"}
            post = asyncio.create_task(front.post(STREAMED, headers=headers))
            await until(lambda: bool(old.requests and new.requests))
            tracer = front.live.edge.tracer
            if outlives:
                await post
            else:
                await until(lambda: not new.running)
            release.set()
            await post
            (trail,) = tracer.ring
            await until(lambda: trail.shadow is not None and trail.shadow.ended > 0)
            kept = as_told(next(iter(tracer.ring)))
            await until(lambda: len(collector.spans) == len(kept["spans"]))
            # That of the shadow once it has all of it.
            await until(lambda: ("new", True) in asked and "old" in {name for name, _ in asked})
    assert kept["keep"] == "slow"
    assert len(shadows(kept["spans"])) == 1
    assert whole(collector.spans).flags & 1 == 0


@on_loop
async def test_a_canary_that_fails_and_its_rescue_are_one_tree() -> None:
    """Each request to either replica joins a CLIENT span of its own below the client's root."""
    async with upstream() as old, upstream(broken) as new, gateway(old) as front:
        await put(front, new, share=1.0)
        answer = await front.post(STREAMED, headers={"traceparent": PARENT})
        assert answer.status_code == 200
        ring = front.live.edge.tracer.ring
        await until(lambda: len(ring) == 1)
        root, *below = as_told(next(iter(ring)))["spans"]
        told = [one.headers["traceparent"].split("-") for one in (*new.requests, *old.requests)]
    clients = [one["span_id"] for one in below if one["kind"] == "CLIENT"]
    assert {one[1] for one in told} == {PARENT.split("-")[1]}
    assert [one[2] for one in told] == clients
    assert {one["parent_id"] for one in below} == {root["span_id"]}


@on_loop
async def test_a_shadow_that_is_left_in_the_middle_ends_its_span() -> None:
    """With the rollout ends what is under way; the span is there, and nobody's error."""
    never = asyncio.Event()
    async with upstream() as old, upstream(held(never)) as new, gateway(old) as front:
        await put(front, new, share=0.0, shadow=1.0)
        await front.post(STREAMED)
        ring = front.live.edge.tracer.ring
        await until(lambda: len(ring) == 1 and len(new.requests) == 1)
        variant: Any = front.live.beside
        await variant.shadows.end()
        (shadow,) = shadows(as_told(next(iter(ring)))["spans"])
    assert shadow["attributes"]["headgate.outcome"] == "left"
    assert shadow["status"] == "UNSET"
