"""Routing over simulated replicas: four kinds of traffic, and a real trace, in virtual time."""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.lab.conditions import ROOT
from benchmarks.lab.fleet import Fleet, Ours, Outcome, Plain, Router
from benchmarks.lab.report import About, Goal, Measured, Settings, run
from benchmarks.lab.samples import percentile
from benchmarks.lab.workloads import BLOCK_TOKENS, WORKLOADS, Names, Request

_WORKERS = 4
_RATE = 4000.0  # tokens a second
_CACHE_BLOCKS = 2048  # 32k tokens
_PLAIN = ("round_robin", "least_loaded", "longest_prefix")
_TIERS = ("interactive", "batch")
TRACE = ROOT.parent / "shared" / "data" / "traces" / "mooncake_conversation_00-40min.jsonl.gz"
_TRACE_LOAD = 0.7  # of what the replicas can compute at the ideal share of hits
_TRACE_BIN_S = 3.0  # its times are rounded to this

ABOUT = About(
    name="routing",
    measures=(
        "Four simulated replicas, each of which prefills one prompt after another at 4,000 "
        "tokens/s and keeps 32k tokens in an LRU of blocks of 16; virtual time, the gateway's "
        "own routing. `agents`: 32 sessions of 6 growing turns behind a system prompt of 1k, 16 "
        "at once; `hot`: 15 requests/s, 80 % with the same beginning of 3k; `burst`: 20 times 8 "
        "equal prompts of 2k at once; `tenants`: 64 system prompts of 1.5k and 4.5k unique, at "
        "97 % of the fleet. `round_robin`, `least_loaded` and `longest_prefix` (plain, ties to "
        "the least loaded) beside ours, by tier; medians over seeds of the share of cached "
        "tokens and of TTFT. `trace`: 40 minutes of Mooncake's conversations with caches "
        "without limit, at 70 % of what the replicas can compute; `ideal_share` is the hits as "
        "a part of those of one cache for all, `busiest` the tokens that the busiest replica "
        "computes over the mean. The trace is not shipped: without its file that part is left "
        "out, and its goals are not measured."
    ),
    goals=(
        Goal(
            "p95_over_best_plain",
            0.5,
            "at most",
            "p95 TTFT on agents and hot at most half of the best plain way's (worse of the two)",
        ),
        Goal(
            "worst_p95_over_best_plain",
            1.0,
            "at most",
            "p95 TTFT nowhere above the best plain way's",
        ),
        Goal(
            "trace_ideal_share",
            0.97,
            "at least",
            "97 % of the ideal hits on the trace, with 4 and 8 replicas",
        ),
        Goal(
            "trace_busiest",
            1.05,
            "at most",
            "busiest over mean at most 1.05 on the trace, with 4 and 8 replicas",
        ),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    return run(ABOUT, measure, argv)


def measure(settings: Settings) -> Measured:
    seeds = 2 if settings.quick else 5
    results: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for name in WORKLOADS:
        results[name] = {}
        for way in (*_PLAIN, *_TIERS):
            outcomes = [simulate(name, way, seed) for seed in range(seeds)]
            results[name][way] = _told(outcomes)
            settings.progress(f"{name}: {way} {results[name][way]}")
        best = min(results[name][way]["ttft_p95_s"] for way in _PLAIN)
        ratios[name] = results[name]["interactive"]["ttft_p95_s"] / best
    values = {
        "p95_over_best_plain": round(max(ratios["agents"], ratios["hot"]), 3),
        "worst_p95_over_best_plain": round(max(ratios.values()), 3),
    }
    if not TRACE.is_file():
        missing = dict.fromkeys(("trace_ideal_share", "trace_busiest"), f"no {TRACE.name}")
        return Measured(results, values, {"seeds": seeds}, missing)
    traces = {f"trace, {count} replicas": _trace(count, settings) for count in (4, 8)}
    values["trace_ideal_share"] = min(told["ours"]["ideal_share"] for told in traces.values())
    values["trace_busiest"] = max(told["ours"]["busiest"] for told in traces.values())
    return Measured(results | traces, values, {"seeds": seeds})


def simulate(name: str, way: str, seed: int) -> Outcome:
    """One workload under one way of routing: plain, or a tier's."""
    fleet = Fleet(_WORKERS, _RATE, _CACHE_BLOCKS, BLOCK_TOKENS)
    router = _router(way, _WORKERS, lambda: fleet.now, seed + 1000)
    return fleet.run(WORKLOADS[name](random.Random(seed), Names()), router)


def _router(way: str, count: int, clock: Callable[[], float], seed: int) -> Router:
    rng = random.Random(seed)
    return Plain(way, count, rng) if way in _PLAIN else Ours(count, clock, rng, way)


def _told(outcomes: Sequence[Outcome]) -> dict[str, float]:
    return {
        "cached_share": round(median(one.hit_share for one in outcomes), 3),
        "ttft_p50_s": round(median(percentile(one.ttft_s, 50) for one in outcomes), 3),
        "ttft_p95_s": round(median(percentile(one.ttft_s, 95) for one in outcomes), 3),
    }


# ---- the trace ----------------------------------------------------------------------------------


def _trace(count: int, settings: Settings) -> dict[str, Any]:
    """A block of the trace counts as one of ours, and rates by as much less: all that is learned
    and compared is in proportion."""
    requests = sorted(read_trace(TRACE, random.Random(1)), key=lambda request: request.at)
    ideal, computed = ideal_hits([request.prompt for request in requests])
    rate = computed * BLOCK_TOKENS / requests[-1].at / count / _TRACE_LOAD
    told: dict[str, Any] = {"ideal_hit_share": round(ideal, 4)}
    ways = ("ours", "round_robin", "longest_prefix")
    for way in ways:
        fleet = Fleet(count, rate, 10**9, BLOCK_TOKENS)
        rng = random.Random(2)
        router: Router = (
            Ours(count, lambda one=fleet: one.now, rng, "standard", tells=True)  # type: ignore[misc]
            if way == "ours"
            else Plain(way, count, rng)
        )
        outcome = fleet.run(requests, router)
        told[way] = {
            "ideal_share": round(outcome.hit_share / ideal, 4),
            "busiest": round(outcome.busiest_over_mean, 3),
            "ttft_p50_s": round(percentile(outcome.ttft_s, 50), 2),
            "ttft_p95_s": round(percentile(outcome.ttft_s, 95), 2),
        }
        settings.progress(f"trace, {count} replicas: {way} {told[way]}")
    return told


def read_trace(path: Path, rng: random.Random) -> Iterator[Request]:
    """Requests of blocks of 512 tokens; times are spread within what they were rounded to."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            at = row["timestamp"] / 1000 + rng.random() * _TRACE_BIN_S
            yield Request(at, tuple(row["hash_ids"]), ())


def ideal_hits(prompts: Sequence[Sequence[int]]) -> tuple[float, int]:
    """The share of blocks that one cache without limit would find, and how many it would not."""
    known: set[int] = set()
    found = total = 0
    for prompt in prompts:
        held = next((at for at, one in enumerate(prompt) if one not in known), len(prompt))
        found += min(held, len(prompt) - 1)
        total += len(prompt)
        known.update(prompt)
    return found / total, total - found


if __name__ == "__main__":
    sys.exit(main())
