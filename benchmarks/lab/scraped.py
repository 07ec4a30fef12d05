"""`python -m benchmarks.lab.scraped`: one gateway process of those that share a page of metrics,
with as many series as were asked for and no client but whoever scrapes.

The first of them scrapes and tells what that took; the others answer it until their input ends, and
tell what that took them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import MutableMapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

from gateway.__main__ import collect_seldom
from gateway.edge import Live, build
from gateway.exposition import ACCEPTED
from gateway.meters import Meters
from gateway.replica import Replica
from gateway.scrape import Scrape
from gateway.siblings import Siblings
from gateway.state import in_memory
from policies.schema import Deployment, Gateway, Runtime, Tier

TIERS = ("interactive", "standard", "relaxed", "batch")
TRACE = ("4bf92f3577b34da6a3ce929d0e0e4736", 1764000000.5)


def main() -> None:
    options = parse()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        told = runner.run(_run(options))
    print(json.dumps(told), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--of", type=int, required=True)
    parser.add_argument("--models", type=int, required=True)
    parser.add_argument("--openmetrics", action="store_true")
    parser.add_argument("--pages", type=int, required=True)
    return parser.parse_args()


async def _run(options: argparse.Namespace) -> dict[str, float]:
    settings = Gateway(processes=options.of, tiers={name: Tier() for name in TIERS})
    state = in_memory(settings)
    siblings = Siblings(options.folder, str(options.process)) if options.of > 1 else None
    state = replace(state, siblings=siblings)
    deployment = Deployment(version=1, gateway=settings, runtime=Runtime())
    replicas = [Replica(f"http://replica-{at}:8000") for at in range(4)]
    live = Live(build(deployment, replicas, state=state))
    fill(live.edge.meters, options.models)
    scrape = Scrape(live, lambda: None)
    collect_seldom()
    async with AsyncExitStack() as stack:
        if siblings is not None:
            await stack.enter_async_context(siblings.listening())
        print("ready", flush=True)
        began_s = time.process_time()
        if options.process == 0:
            await asyncio.to_thread(sys.stdin.readline)  # all are ready
            return await _scraping(scrape, options)
        await asyncio.to_thread(sys.stdin.read)
        return {"cpu_s": time.process_time() - began_s}


def fill(meters: Meters, models: int) -> None:
    """As after much traffic: every bucket of every series has a count and an exemplar."""
    histograms = (meters.first_token_s, meters.token_s, meters.duration_s, meters.gap_s)
    for tier in TIERS:
        for at in range(models):
            labels = (tier, f"model-{at}", "baseline")
            meters.requests[*labels, "ok"] += 1
            for histogram in histograms:
                for bound in histogram.bounds:
                    histogram.observe(labels, bound, TRACE)


async def _scraping(scrape: Scrape, options: argparse.Namespace) -> dict[str, float]:
    accept = ACCEPTED if options.openmetrics else "text/plain"
    scope = {"headers": [(b"accept", accept.encode())]}
    size_bytes = 0

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal size_bytes
        size_bytes += len(message.get("body", b""))

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    await scrape(scope, receive, send)  # the first one warms up
    size_bytes, cpu_s, took_s = 0, [], []
    for _ in range(options.pages):
        before, began = time.process_time(), time.perf_counter()
        await scrape(scope, receive, send)
        cpu_s.append(time.process_time() - before)
        took_s.append(time.perf_counter() - began)
    size = size_bytes / options.pages
    held_s, waits_s = [], []
    for _ in range(options.pages):
        turns = Turns()
        task = asyncio.ensure_future(turns.take())
        await asyncio.sleep(0)
        await scrape(scope, receive, send)
        await asyncio.sleep(0)  # its turn
        task.cancel()
        held_s.append(turns.most_cpu_s)
        waits_s.append(turns.longest_s)
    return {
        "kib": size / 1024,
        "cpu_ms": 1e3 * median(cpu_s),
        "page_ms": 1e3 * median(took_s),
        "held_ms": 1e3 * median(held_s),
        "wait_ms": 1e3 * median(waits_s),
    }


class Turns:
    """Somebody who wants the loop all the time, as many streams together do."""

    def __init__(self) -> None:
        self.longest_s = 0.0  # between two turns
        self.most_cpu_s = 0.0  # of the loop's thread, between two turns

    async def take(self) -> None:
        before, worked = time.perf_counter(), time.thread_time()
        while True:
            await asyncio.sleep(0)
            now, works = time.perf_counter(), time.thread_time()
            self.longest_s = max(self.longest_s, now - before)
            self.most_cpu_s = max(self.most_cpu_s, works - worked)
            before, worked = now, works


if __name__ == "__main__":
    main()
