"""Overload live: the gateway as a process, simulated workers behind sockets, clients that stream.

Everything takes ten times as long as in the simulation, targets too, so that the two cores that
client, gateway and workers share have little to do.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from benchmarks.lab.report import MeasurementFailed
from benchmarks.lab.simulated import TPOT_S, Job, Worker
from command.machine import free_ports
from policies.schema import Gateway

SLOW = 10.0
READY_S = 60.0
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'


@dataclass(slots=True)
class Visit:
    """One request: when it comes, what it is, and what became of it."""

    at_s: float
    tier: str
    tokens: int
    answer_tokens: int
    status: int = 0
    ttft_s: float | None = None
    tpot_s: float = 0.0


async def run(visits: Sequence[Visit], workers: int) -> None:
    """Fills in what became of the visits."""
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(_worker(f"w{n}")) for n in range(workers)]
        url = await stack.enter_async_context(_gateway(urls))
        limit = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=limit))
        await asyncio.gather(*(_visit(session, url, visit) for visit in visits))


async def _visit(session: aiohttp.ClientSession, url: str, visit: Visit) -> None:
    clock = asyncio.get_running_loop().time
    await asyncio.sleep(visit.at_s)
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "word" * visit.tokens}],
        "max_tokens": visit.answer_tokens,
        "stream": True,
    }
    began = clock()
    headers = {"x-headgate-tier": visit.tier}
    async with session.post(url + "/v1/chat/completions", json=body, headers=headers) as answer:
        visit.status = answer.status
        first = None
        async for line in answer.content:
            if line.startswith(b'data: {"error"'):
                visit.status = 503
            if first is None and line.startswith(b"data: "):
                first = clock()
                visit.ttft_s = first - began
        if first is not None:
            visit.tpot_s = (clock() - first) / max(visit.answer_tokens - 1, 1)


@asynccontextmanager
async def _worker(name: str) -> AsyncIterator[str]:
    worker = Worker(name, fifo=False, slow=SLOW)
    clock = asyncio.get_running_loop().time

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        told = request.headers
        due = clock() + float(told["x-slo-ttft-ms"]) / 1000 if "x-slo-ttft-ms" in told else 0.0
        rank = (30 * SLOW * int(told["x-headgate-priority"]) + (due or clock()), clock())
        tokens = len(body["messages"][0]["content"]) // 4
        tpot_s = float(told.get("x-slo-tpot-ms", 1000 * SLOW * TPOT_S)) / 1000 / SLOW
        job = Job(tokens, body["max_tokens"], (), rank, tpot_s)
        worker.submit(job)
        try:
            await job.first.wait()
            answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await answer.prepare(request)
            said = 0
            while said < job.answer_tokens:
                if job.said > said:
                    await answer.write(EVENT * (job.said - said))
                    said = job.said
                elif job.done.is_set():
                    break
                await asyncio.sleep(0.02)
            usage = {"prompt_tokens": tokens, "completion_tokens": said}
            last = json.dumps({"choices": [], "usage": usage}, separators=(",", ":"))
            await answer.write(f"data: {last}\n\ndata: [DONE]\n\n".encode())
            return answer
        finally:
            worker.leave(job)

    async def healthy(_: web.Request) -> web.Response:
        return web.json_response({"status": "ready"})

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    app = web.Application(client_max_size=2**24)
    app.router.add_get("/health", healthy)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app, handler_cancellation=True)  # a client that leaves frees its place
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    work = asyncio.create_task(worker.run())
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        work.cancel()
        await runner.cleanup()


@asynccontextmanager
async def _gateway(replicas: Sequence[str]) -> AsyncIterator[str]:
    (port,) = free_ports(1, "127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="headgate-overload-") as folder:
        policy = Path(folder) / "policy.yaml"
        policy.write_text(json.dumps(_policy()))
        more = [part for replica in replicas for part in ("--replica", replica)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", str(policy), "--port", str(port), *more
        )
        try:
            await _ready(url)
            yield url
        finally:
            process.terminate()
            await process.wait()


def _policy() -> dict[str, Any]:
    """The targets that tiers ship with, longer."""
    tiers = {
        name: {"ttft_ms": SLOW * tier.ttft_ms, "tpot_ms": SLOW * tier.tpot_ms}
        for name, tier in Gateway().tiers.items()
        if tier.ttft_ms is not None and tier.tpot_ms is not None
    }
    return {"version": 1, "gateway": {"port": 0, "tiers": tiers}, "runtime": {"model": "pocket"}}


async def _ready(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(int(READY_S * 10)):
            try:
                async with session.get(url + "/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)
    raise MeasurementFailed(f"the gateway at {url} was not ready within {READY_S:g} s")
