"""Several gateway processes on one port, as `headgate serve` runs them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.gateway.world import DONE, HELLO, STREAMED, Fake, held, on_loop, until, upstream

ROOT = Path(__file__).parents[2]
CHUNK = b'data: {"choices":[]}\n\n'


class Served:
    """`headgate serve` as a process, and what it has said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said = ""
        self.url = ""

    async def until(self, pattern: str) -> re.Match[str]:
        """Reads on to the first text that matches."""
        assert self.process.stdout is not None
        while (found := re.search(pattern, self.said)) is None:
            piece = await self.process.stdout.read(4096)
            assert piece, self.said
            self.said += piece.decode()
        return found

    def gateways(self) -> dict[str, psutil.Process]:
        """The gateway processes by the port of their own."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            arguments = child.cmdline()
            found[arguments[arguments.index("--private") + 1]] = child
        return found


@asynccontextmanager
async def serve(folder: Path, fake: Fake, settings: str) -> AsyncIterator[Served]:
    policy = folder / "policy.yaml"
    policy.write_text(f"version: 1\ngateway: {settings}\nupstreams: [{{url: '{fake.url}'}}]\n")
    environ = {name: value for name, value in os.environ.items() if name != "HEADGATE_PORT"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "headgate", "serve", str(policy), cwd=ROOT, env=environ,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    served = Served(process)
    try:
        served.url = (await served.until(r"gateway +(http://\S+)"))[1]
        await served.until(r"ready in ")
        yield served
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@on_loop
async def test_of_four_processes_one_is_killed_and_nobody_elses_client_notices(
    tmp_path: Path,
) -> None:
    """Only its own streams break; new requests go on at once; it is started again; all drain."""
    release = asyncio.Event()
    async with (
        upstream(held(release, CHUNK), models=("m",)) as fake,
        serve(tmp_path, fake, "{port: 0, processes: 4, drain_s: 10}") as served,
        httpx.AsyncClient(base_url=served.url, timeout=30) as client,
    ):
        assert "by 4 processes" in served.said
        assert "each of 4 gateways gives its share of limits" in served.said
        gateways = served.gateways()
        assert len(gateways) == 4
        streams = [asyncio.create_task(stream_of(client)) for _ in range(24)]
        await until(lambda: fake.running == 24)
        victim = max(gateways.values(), key=lambda one: len(clients_of(one, served)))
        doomed = len(clients_of(victim, served))
        assert doomed > 0
        victim.kill()
        await until(lambda: fake.running == 24 - doomed)
        other = asyncio.create_task(client.post("/v1/chat/completions", json=STREAMED))
        await until(lambda: fake.running == 25 - doomed)
        release.set()
        whole = await asyncio.gather(*streams, return_exceptions=True)
        assert whole.count(CHUNK + DONE) == 24 - doomed
        assert all(isinstance(one, bytes | httpx.TransportError) for one in whole)
        assert (await other).content == CHUNK + DONE
        await served.until(r"gateway \d was killed by SIGKILL")
        await served.until(r"gateway \d is ready again")
        assert served.gateways().keys() == gateways.keys()
        for _ in range(20):
            async with httpx.AsyncClient(base_url=served.url, timeout=30) as fresh:
                done = await fresh.post("/v1/chat/completions", json=HELLO | {"stream": True})
                assert done.content == CHUNK + DONE
        served.process.send_signal(signal.SIGINT)
        assert await served.process.wait() == 0


@on_loop
async def test_any_process_tells_what_another_keeps(tmp_path: Path) -> None:
    """`headgate trace ID` and `headgate explain ID`, whichever process the kernel leads them to."""
    async with (
        upstream(models=("m",)) as fake,
        serve(tmp_path, fake, "{port: 0, processes: 3}") as served,
    ):
        async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
            answer = await client.post("/v1/chat/completions", json=HELLO)
        request, receipt = (answer.headers[n] for n in ("x-request-id", "x-headgate-receipt"))
        pages = (f"/admin/traces/{request}", f"/v1/receipts/{receipt}")
        for port in served.gateways():
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as own:
                for page in pages:
                    assert (await own.get(page)).status_code == 200
                told = (await own.get("/admin/traces")).json()
                assert [one["request_id"] for one in told["traces"]] == [request]
                assert told["processes"] == {"asked": 3, "of": 3}
        victim = next(iter(served.gateways().values()))
        victim.kill()
        await served.until(r"gateway \d is ready again")
        for port in served.gateways():
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as own:
                told = (await own.get("/admin/traces")).json()
                assert told["processes"] == {"asked": 3, "of": 3}
        served.process.send_signal(signal.SIGINT)
        assert await served.process.wait() == 0


@on_loop
async def test_scrapes_of_several_processes_are_one_story(tmp_path: Path) -> None:
    """Whichever process a scrape comes to: no counter goes back, and all requests are in the sum;
    one that is killed begins its own series again, under its own number."""
    async with (
        upstream(models=("m",)) as fake,
        serve(tmp_path, fake, "{port: 0, processes: 3}") as served,
    ):
        before: dict[str, float] = {}
        for sent in range(20):
            async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
                assert (await client.post("/v1/chat/completions", json=HELLO)).status_code == 200
            async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
                now = counters((await client.get("/metrics")).text)
            assert all(now[name] >= value for name, value in before.items())
            assert admitted(now) == sent + 1
            before = now
        processes = served.gateways()
        for port in processes:
            assert await history_of(port) == 20
        port, victim = next(iter(processes.items()))
        number = victim.cmdline()[victim.cmdline().index("--process") + 1]
        victim.kill()
        await served.until(r"gateway \d is ready again")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            after = counters((await client.get("/metrics")).text)
        fell = {name for name, value in before.items() if after.get(name, 0) < value}
        assert all(f'process="{number}"' in name for name in fell)
        served.process.send_signal(signal.SIGINT)
        assert await served.process.wait() == 0


async def history_of(port: str) -> float:
    """The last count of the console's samples, once it is that of its totals: each second once, and
    who asks again gets what has come since."""
    samples: list[dict[str, Any]] = []
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        while True:
            since = samples[-1]["at"] if samples else 0
            told = (await client.get("/admin/overview", params={"since": since})).json()
            assert (told["process"]["told"], told["process"]["of"]) == (3, 3)
            for sample in told["samples"]:
                assert not samples or sample["at"] == samples[-1]["at"] + 1
                samples.append(sample)
            (standard,) = (one["now"] for one in told["tiers"] if one["name"] == "standard")
            if samples and samples[-1]["tiers"].get("standard") == standard:
                counts = [one["tiers"].get("standard", {}).get("admitted", 0) for one in samples]
                assert counts == sorted(counts)
                return float(standard["admitted"])
            await asyncio.sleep(0.1)


def counters(text: str) -> dict[str, float]:
    """By name and labels; of those that begin with the process, all are there from the start."""
    found = (line.rpartition(" ") for line in text.splitlines() if "_total{" in line)
    return {name: float(value) for name, _, value in found}


def admitted(found: dict[str, float]) -> float:
    return sum(v for name, v in found.items() if name.startswith("headgate_gateway_admitted_total"))


async def stream_of(client: httpx.AsyncClient) -> bytes:
    return (await client.post("/v1/chat/completions", json=STREAMED)).content


def clients_of(gateway: psutil.Process, served: Served) -> list[int]:
    """The ports of the clients that a process talks with."""
    port = int(served.url.rpartition(":")[2])
    return [
        one.raddr.port
        for one in gateway.net_connections("tcp")
        if one.status == psutil.CONN_ESTABLISHED and one.laddr.port == port
    ]
