"""Routing beside the peers: each gateway, as a process, before the same simulated replicas."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.lab.conditions import ROOT
from benchmarks.lab.fleet_server import text_of
from benchmarks.lab.models import peers_home
from benchmarks.lab.report import About, Goal, Measured, MeasurementFailed, Settings, run
from benchmarks.lab.samples import percentile
from benchmarks.lab.workloads import BLOCK_TOKENS, MODEL, WORKLOADS, Names, Request
from command.machine import free_ports

_COUNT, _RATE, _BLOCKS = 4, 4000, 2048
_SPEED = 4.0  # times as fast as it would be
_HOST = "127.0.0.1"
_READY_S = 60.0
_OURS = "headgate"
# Settings of each that do best here, as far as they were tried.
PEERS: dict[str, tuple[str, ...]] = {
    "smg cache_aware": (
        "smg", "smg.launch_router", "--log-level", "warn", "--policy", "cache_aware",
        "--disable-worker-overload-protection", "--worker-wedge-secs", "0",
    ),
    "smg round_robin": (
        "smg", "smg.launch_router", "--log-level", "warn", "--policy", "round_robin",
        "--disable-worker-overload-protection", "--worker-wedge-secs", "0",
    ),
    "vllm-router cache_aware": (
        "vllm-router", "vllm_router.launch_router", "--log-level", "warning",
        "--policy", "cache_aware",
    ),
    "sglang-router cache_aware": (
        "sglang-router", "sglang_router.launch_router", "--log-level", "warn",
        "--policy", "cache_aware",
    ),
}  # fmt: skip

ABOUT = About(
    name="routing_peers",
    measures=(
        "The replicas of `benchmarks.routing` as four real HTTP servers, time four times as fast, "
        "behind each gateway in turn: the same requests, seeds and moments. What an answer's usage "
        "says was cached, and the time to its first event, in simulated seconds; medians over "
        "seeds. The text has no tokenizer: all gateways compare it as bytes."
    ),
    goals=(
        Goal(
            "p95_over_best_peer",
            0.5,
            "at most",
            "p95 TTFT on agents and hot at most half of the best peer's (worse of the two)",
        ),
        Goal("worst_p95_over_best_peer", 1.0, "at most", "p95 TTFT nowhere above the best peer's"),
    ),
    peers=("smg", "vllm-router", "sglang-router"),
    parts=tuple(WORKLOADS),
    more="`python -m benchmarks.lab.peers_setup smg vllm-router sglang-router` installs the peers.",
)


def main(argv: Sequence[str] | None = None) -> int:
    return run(ABOUT, measure, argv)


def measure(settings: Settings) -> Measured:
    seeds = range(1) if settings.quick else range(3)
    names = [_OURS, *(name for name in PEERS if (peers_home() / PEERS[name][0] / "bin").is_dir())]
    if len(names) == 1:
        raise MeasurementFailed(f"no peer is installed. {ABOUT.more}")
    results: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for workload in WORKLOADS:
        if settings.parts and workload not in settings.parts:
            continue
        found: dict[str, list[tuple[list[float], float]]] = {name: [] for name in names}
        for seed in seeds:
            for name in names:
                found[name].append(_one(name, workload, seed))
                settings.progress(f"{workload}: {name}, seed {seed}: {_told(found[name][-1:])}")
        results[workload] = {name: _told(runs) for name, runs in found.items()}
        settings.progress(f"{workload}: {results[workload]}")
        best = min(results[workload][name]["ttft_p95_s"] for name in names[1:])
        ratios[workload] = results[workload][_OURS]["ttft_p95_s"] / best
    wanted = [ratios[name] for name in ("agents", "hot") if name in ratios]
    values = {
        "p95_over_best_peer": round(max(wanted, default=0.0), 3),
        "worst_p95_over_best_peer": round(max(ratios.values()), 3),
    }
    return Measured(results, values, {"seeds": len(seeds), "speed": _SPEED})


def _told(runs: Sequence[tuple[list[float], float]]) -> dict[str, float]:
    return {
        "cached_share": round(median(share for _, share in runs), 3),
        "ttft_p50_s": round(median(percentile(ttft_s, 50) for ttft_s, _ in runs), 3),
        "ttft_p95_s": round(median(percentile(ttft_s, 95) for ttft_s, _ in runs), 3),
    }


def _one(name: str, workload: str, seed: int) -> tuple[list[float], float]:
    """Times to first events, and the share of tokens that was cached, behind one gateway."""
    requests = list(WORKLOADS[workload](random.Random(seed), Names()))
    with _replicas() as ports, _gateway(name, [f"http://{_HOST}:{port}" for port in ports]) as url:
        return asyncio.run(_drive(url, requests))


async def _drive(url: str, requests: Sequence[Request]) -> tuple[list[float], float]:
    ttft_s: list[float] = []
    counts = [0, 0]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        began = time.perf_counter()

        async def follow(request: Request | None) -> None:
            while request is not None:
                due = began + request.at / _SPEED
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                took_s, usage = await _ask(client, request)
                ttft_s.append(took_s * _SPEED)
                counts[0] += usage["prompt_tokens"]
                counts[1] += usage["prompt_tokens_details"]["cached_tokens"]
                request = request.then((time.perf_counter() - began) * _SPEED)

        await asyncio.gather(*map(follow, requests))
    return ttft_s, counts[1] / counts[0]


async def _ask(client: httpx.AsyncClient, request: Request) -> tuple[float, dict[str, Any]]:
    body = {
        "model": MODEL,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": len(request.answer) * BLOCK_TOKENS,
        "messages": [{"role": "user", "content": text_of(request.prompt)}],
    }
    sent = time.perf_counter()
    first_s, usage = None, None
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first_s = first_s or time.perf_counter() - sent
                usage = json.loads(line[6:]).get("usage") or usage
    if first_s is None or usage is None:
        raise MeasurementFailed(f"an answer with status {answer.status_code} told no usage")
    return first_s, usage


@contextlib.contextmanager
def _replicas() -> Iterator[list[int]]:
    command = [sys.executable, "-m", "benchmarks.lab.fleet_server"]
    command += map(str, (_COUNT, _RATE, _SPEED, _BLOCKS))
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield json.loads(process.stdout.readline())
        process.stdin.close()


@contextlib.contextmanager
def _gateway(name: str, workers: Sequence[str]) -> Iterator[str]:
    (port,) = free_ports(1, _HOST)
    url = f"http://{_HOST}:{port}"
    with tempfile.TemporaryDirectory() as folder:
        if name == _OURS:
            policy = Path(folder) / "policy.yaml"
            upstreams = "".join(f"  - url: {one}\n" for one in workers)
            policy.write_text(f"version: 1\nupstreams:\n{upstreams}", encoding="utf-8")
            command = [sys.executable, "-m", "gateway", str(policy), "--port", str(port)]
        else:
            package, module, *options = PEERS[name]
            command = [str(peers_home() / package / "bin/python"), "-m", module]
            command += ["--worker-urls", *workers, "--host", _HOST, "--port", str(port), *options]
            command += ["--prometheus-port", str(free_ports(1, _HOST)[0])]
        with subprocess.Popen(
            command, cwd=ROOT if name == _OURS else folder, env=os.environ,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            try:
                _await(f"{url}/health", lambda: process.poll() is None)
                time.sleep(2.0)  # until it has found all replicas well
                yield url
            finally:
                process.terminate()


def _await(url: str, runs: Callable[[], bool]) -> None:
    until = time.monotonic() + _READY_S
    while time.monotonic() < until and runs():
        try:
            with urllib.request.urlopen(url, timeout=2):  # http of our own
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    raise MeasurementFailed(f"{url} was not ready")


if __name__ == "__main__":
    sys.exit(main())
