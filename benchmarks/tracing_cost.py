"""What traces cost: five gateways before one upstream that computes nothing, the same load in
turns: one notes nothing at all, one keeps no traces, one keeps them, one samples them out, one
sends them all. And what a worker's own traces take.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from benchmarks.lab.conditions import ROOT
from benchmarks.lab.edge_load import Driven, Load, drive
from benchmarks.lab.edges import OURS, Command, Edge, listening, ours, running
from benchmarks.lab.report import (
    About,
    Goal,
    Measured,
    MeasurementFailed,
    Settings,
    run,
)
from benchmarks.lab.samples import median_added, medians

_ROUNDS = 4
# Of each, so many turns a round: what else the machine does then meets all alike.
_LOADS = {"request": (Load(8, 50), 8), "chunk": (Load(16, 1, 150, 10), 2)}
_SETTLED_S = 1.5  # until what is sent afterwards has been sent
_LIMIT_S = 120.0  # of what measures a worker's
UNTRACED, OFF, KEPT, OUT, IN = "untraced", "off", "kept", "sampled_out", "sampled_in"
POLICIES = {
    UNTRACED: "tracing: {keep: 0}\n",
    OFF: "tracing: {keep: 0}\n",
    KEPT: "tracing: {keep: 256}\n",
    OUT: "tracing: {keep: 256, endpoint: '%s', share: 0}\n",
    IN: "tracing: {keep: 256, endpoint: '%s', share: 1}\n",
}

ABOUT = About(
    name="tracing_cost",
    measures=(
        "Five gateways before one upstream that answers at once, the same load in turns: "
        "`untraced` notes nothing of a request: no moments, no phases, no `Server-Timing`, as no "
        "policy can have it (`benchmarks.lab.untraced`); `off` notes them, keeps no trace and "
        "sends none, `kept` keeps the latest 256 in memory, which is the "
        "default, `sampled_out` has a collector besides and a share of 0, `sampled_in` sends every "
        "trace. CPU time of the whole process, the thread that sends counted in: us for a short "
        "request, 8 at once, and for a chunk of a stream (150 chunks 10 ms apart, 16 streams, the "
        "request counted in). Medians of the rounds; `added` are medians of the differences from "
        "`untraced` within a round. `worker_` is what a worker calls of its own traces, in a "
        "process without server and engine, with other things going through the caches between "
        "the calls: us for a request of 16 steps, and for noting one step, over a worker that "
        "calls nothing of it."
    ),
    goals=(
        Goal("out_us_per_request", 50.0, "at most", "sampled out, at most 50 us a request"),
        Goal("out_us_per_chunk", 5.0, "at most", "sampled out, at most 5 us a chunk"),
        Goal("in_us_per_chunk", 5.0, "at most", "sampled in, at most 5 us a chunk"),
        Goal("kept_us_per_request", 50.0, "at most", "kept in memory, at most 50 us a request"),
        Goal("in_us_per_request", 140.0, "at most", "sent, at most 140 us a request"),
    ),
)

Row = dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    return run(ABOUT, measure, argv)


def measure(settings: Settings) -> Measured:
    rounds: dict[str, list[Row]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(_collector())
        port = stack.enter_context(listening("mock_upstream"))
        edges = {
            name: stack.enter_context(running(OURS, port, command=_command(name, url)))
            for name in POLICIES
        }
        names = list(edges)
        count = 2 if settings.quick else _ROUNDS
        for number in range(count):
            for name, row in asyncio.run(_round(edges)).items():
                rounds[name].append(row)
            settings.progress(f"round {number + 1}")
        workers = _workers(url)
    results = {name: medians(rows, 2) for name, rows in rounds.items()}
    for name in names[1:]:
        for unit in _LOADS:
            results[name][f"added_us_per_{unit}"] = median_added(
                rounds[UNTRACED], rounds[name], f"us_per_{unit}", 2
            )
    results |= workers
    values = {
        "out_us_per_request": results[OUT]["added_us_per_request"],
        "out_us_per_chunk": results[OUT]["added_us_per_chunk"],
        "in_us_per_chunk": results[IN]["added_us_per_chunk"],
        "kept_us_per_request": results[KEPT]["added_us_per_request"],
        "in_us_per_request": results[IN]["added_us_per_request"],
    }
    return Measured(results, values, {"rounds": count})


def _command(name: str, url: str) -> Command:
    return ours(
        POLICIES[name].replace("%s", url),
        module="benchmarks.lab.untraced" if name == UNTRACED else "gateway",
    )


def _workers(url: str) -> dict[str, Row]:
    """What a worker's traces take, sampled out and sent."""
    command = [sys.executable, "-m", "benchmarks.lab.worker_tracing"]
    shares = [f"worker_{OUT}=0:{url}", f"worker_{IN}=1:{url}"]
    try:
        said = subprocess.run(
            [*command, *shares],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=True,
        ).stdout
    except subprocess.SubprocessError as error:
        raise MeasurementFailed(f"a worker's traces could not be measured: {error}") from None
    told: dict[str, Row] = json.loads(said)
    return told


async def _round(edges: Mapping[str, Edge]) -> dict[str, Row]:
    """All of them by turns."""
    names = list(edges)
    rows: dict[str, Row] = {name: {} for name in names}
    for unit, (load, turns) in _LOADS.items():
        for edge in edges.values():
            await drive(edge.port, Load(8, 3))
        await asyncio.sleep(_SETTLED_S)
        before_s = {name: edge.cpu_s() for name, edge in edges.items()}
        counts = dict.fromkeys(names, 0)
        for turn in range(turns):
            at = turn % len(names)
            for name in names[at:] + names[:at]:
                counts[name] += _count(await drive(edges[name].port, load))
        await asyncio.sleep(_SETTLED_S)
        for name, edge in edges.items():
            rows[name][f"us_per_{unit}"] = 1e6 * (edge.cpu_s() - before_s[name]) / counts[name]
    return rows


def _count(driven: Driven) -> int:
    return driven.chunks or len(driven.latencies_s)


@contextlib.contextmanager
def _collector() -> Iterator[str]:
    """The URL of one that takes everything and looks at nothing."""

    class Sink(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    sys.exit(main())
