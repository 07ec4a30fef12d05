"""What the recorder costs: two gateways before one upstream that computes nothing, one of which
records everything, under the same load in turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.lab.edge_load import Driven, Load, drive
from benchmarks.lab.edges import OURS, Edge, listening, ours, running
from benchmarks.lab.report import About, Goal, Measured, Settings, run
from benchmarks.lab.samples import median_added, medians, percentile
from benchmarks.lab.stack import cpu_s

_ROUNDS = 5
_IDLE_S = 0.01  # of CPU in a second: timers, and nothing of requests
_LOADS = {
    "short": Load(8, 400),
    "long": Load(8, 40, prompt_chars=32000),
    "paced": Load(32, 3, 100, 20),
}
_ALONE = Load(1, 400)
_RECORD = """gateway:
  record: {consent: given, max_bytes: 64 MiB}
"""
PLAIN, RECORDS = "plain", "records"

ABOUT = About(
    name="recording",
    measures=(
        "Two gateways, one of which records every request and answer with all its patterns, before "
        "one upstream that answers at once; the same load in turns, in rounds. `gateway`: CPU time "
        "of the process that serves, in us for a request (`short`: 64 characters, 8 at once; "
        "`long`: 32,000) or for a chunk (`paced`: 100 chunks 20 ms apart, 32 streams, the request "
        "counted in). `writer`: of the process beside it that parses, blots out and writes. "
        "`latency`: of one request at a time, in ms. Medians of the rounds; differences are "
        "medians of the differences within a round."
    ),
    goals=(
        Goal("added_us_per_request", 60.0, "at most", "adds at most 60 us to a short request"),
        Goal("added_us_per_chunk", 2.0, "at most", "adds at most 2 us to a paced chunk"),
        Goal("added_p99_ms", 0.5, "at most", "adds at most 0.5 ms at the 99th percentile"),
    ),
)

Row = dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    return run(ABOUT, measure, argv)


def measure(settings: Settings) -> Measured:
    rounds: dict[str, list[Row]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(listening("mock_upstream"))
        edges = {
            name: stack.enter_context(running(OURS, port, command=ours(policy)))
            for name, policy in ((PLAIN, ""), (RECORDS, _RECORD))
        }
        count = 2 if settings.quick else _ROUNDS
        for number in range(count):
            names = [PLAIN, RECORDS] if number % 2 == 0 else [RECORDS, PLAIN]
            for name in names:
                rounds[name].append(asyncio.run(_look(edges[name])))
            settings.progress(f"round {number + 1}")
    results = {name: medians(rows, 3) for name, rows in rounds.items()}
    values = {
        name: median_added(rounds[PLAIN], rounds[RECORDS], field, 3)
        for name, field in (
            ("added_us_per_request", "gateway_us_per_request_short"),
            ("added_us_per_chunk", "gateway_us_per_chunk_paced"),
            ("added_p99_ms", "latency_p99_ms"),
        )
    }
    return Measured(results, values, {"rounds": count})


async def _look(edge: Edge) -> Row:
    """One round of one gateway."""
    await drive(edge.port, Load(8, 3))
    await _settled(edge)
    alone = await drive(edge.port, _ALONE)
    row = {
        f"latency_{label}_ms": 1000 * percentile(alone.latencies_s, share)
        for label, share in (("p50", 50), ("p99", 99))
    }
    for name, load in _LOADS.items():
        serving_s, all_s = cpu_s(edge.process), edge.cpu_s()
        driven = await drive(edge.port, load)
        await _settled(edge)
        serving_s, all_s = cpu_s(edge.process) - serving_s, edge.cpu_s() - all_s
        count, unit = _units(driven)
        row[f"gateway_us_per_{unit}_{name}"] = 1e6 * serving_s / count
        row[f"writer_us_per_{unit}_{name}"] = 1e6 * (all_s - serving_s) / count
    return row


async def _settled(edge: Edge) -> None:
    """Until the writer, which comes after, has done what it has."""
    before_s, now_s = -1.0, edge.cpu_s()
    while now_s - before_s > _IDLE_S:
        await asyncio.sleep(1.0)
        before_s, now_s = now_s, edge.cpu_s()


def _units(driven: Driven) -> tuple[int, str]:
    return (driven.chunks, "chunk") if driven.chunks else (len(driven.latencies_s), "request")


if __name__ == "__main__":
    sys.exit(main())
