"""Routing beside the peers: each gateway, as a process, before the same simulated replicas."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.lab.client import ask, body_of, open_session
from benchmarks.lab.edges import (
    COMMANDS,
    OURS,
    Command,
    installed,
    listening,
    ours,
    router,
    running,
)
from benchmarks.lab.fleet_server import text_of
from benchmarks.lab.report import About, Goal, Measured, MeasurementFailed, Settings, run
from benchmarks.lab.samples import percentile
from benchmarks.lab.workloads import BLOCK_TOKENS, MODEL, WORKLOADS, Names, Request

_COUNT, _RATE, _BLOCKS = 4, 4000, 2048
_SPEED = 4.0  # times as fast as it would be
_HOST = "127.0.0.1"
# Settings of each that do best here, as far as they were tried.
_UNGUARDED = ("--disable-worker-overload-protection", "--worker-wedge-secs", "0")
_AWARE = ("--policy", "cache_aware")
_TURNS = ("--policy", "round_robin")
GATEWAYS: dict[str, Command] = {
    OURS: ours(),
    "smg cache_aware": router("smg", "smg.launch_router", "warn", *_AWARE, *_UNGUARDED),
    "smg round_robin": router("smg", "smg.launch_router", "warn", *_TURNS, *_UNGUARDED),
    "vllm-router cache_aware": COMMANDS["vllm-router"],
    "sglang-router cache_aware": COMMANDS["sglang-router"],
}

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
    names = [name for name in GATEWAYS if installed(name.partition(" ")[0])]
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
        ratios[workload] = results[workload][OURS]["ttft_p95_s"] / best
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
    settings = map(str, (_COUNT, _RATE, _SPEED, _BLOCKS))
    with (
        listening("fleet_server", *settings) as ports,
        running(name, *ports, command=GATEWAYS[name]) as edge,
    ):
        time.sleep(2.0)  # until it has found all replicas well
        return asyncio.run(_drive(f"http://{_HOST}:{edge.port}", requests))


async def _drive(url: str, requests: Sequence[Request]) -> tuple[list[float], float]:
    ttft_s: list[float] = []
    counts = [0, 0]
    async with open_session() as client:
        began = time.perf_counter()

        async def follow(request: Request | None) -> None:
            while request is not None:
                due = began + request.at / _SPEED
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                answer = (await ask(client, url, _body(request))).answer()
                ttft_s.append(answer.opened_s * _SPEED)
                counts[0] += answer.usage["prompt_tokens"]
                counts[1] += answer.usage["prompt_tokens_details"]["cached_tokens"]
                request = request.then((time.perf_counter() - began) * _SPEED)

        await asyncio.gather(*map(follow, requests))
    return ttft_s, counts[1] / counts[0]


def _body(request: Request) -> bytes:
    messages = [{"role": "user", "content": text_of(request.prompt)}]
    return body_of(MODEL, messages, max_tokens=len(request.answer) * BLOCK_TOKENS)


if __name__ == "__main__":
    sys.exit(main())
