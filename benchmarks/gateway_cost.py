"""What the gateway costs beside its peers: CPU time of the whole process tree, before one upstream
that computes nothing, under the same load, in turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.lab import peers_setup
from benchmarks.lab.edge_load import Driven, Load, drive
from benchmarks.lab.edges import COMMANDS, OURS, Edge, installed, listening, running
from benchmarks.lab.report import About, Goal, Measured, Settings, run
from benchmarks.lab.samples import medians

_RUST = ("smg", "vllm-router", "sglang-router")
_LITELLM = "litellm"
_PEERS = (*_RUST, _LITELLM)
_ROUNDS = 5
# LiteLLM takes fifty times as long for a request: it gets fewer, of the same kind.
_LOADS = {
    "short": (Load(8, 150), Load(8, 10)),
    "long": (Load(8, 40, prompt_chars=32000), Load(8, 5, prompt_chars=32000)),
    "burst": (Load(8, 4, 500), Load(2, 1, 500)),
    "paced": (Load(32, 1, 100, 20), Load(32, 1, 100, 20)),
}
_ALONE = (Load(1, 200), Load(1, 30))  # for the latency that a gateway adds

ABOUT = About(
    name="gateway_cost",
    peers=_PEERS,
    measures=(
        "Starts every gateway as its users do, with cache-aware routing, and ours with a tenant's "
        "key and its limits besides, before one upstream that answers at once, and sends the same "
        "load to one after the other, in rounds. `ms_per_request`: CPU time, user and system, of "
        "the gateway's whole process tree for a short request, 8 at once; `long` ones have prompts "
        "of 32,000 characters. `us_per_chunk`: for a chunk of a stream, everything of the request "
        "counted in; in a burst 500 come at once, 8 streams; paced, 100 come 20 ms apart, 32 "
        "streams. `added_ms`: latency of one request at a time less that of the upstream asked "
        "directly in the same round. `requests_per_cpu_s` is what a core could serve. Medians of "
        "the rounds; ratios are medians of the ratios within a round."
    ),
    goals=(
        Goal("ms_per_request", 0.6, "at most", "a short request takes at most 0.6 ms of CPU"),
        Goal("us_per_paced_chunk", 60.0, "at most", "a paced chunk takes at most 60 us of CPU"),
        Goal("added_p50_ms", 1.0, "at most", "adds at most 1 ms at the median"),
        Goal("rss_mb", 100.0, "at most", "holds at most 100 MB"),
        Goal("over_litellm", 25.0, "at least", "25 x LiteLLM's requests per CPU second"),
        Goal("beside_rust", 1.2, "at most", "a request costs at most 1.2 x the best Rust router"),
        Goal("paced_beside_rust", 1.0, "at most", "a paced chunk costs less than with all three"),
    ),
    more="`--setup [PEER ...]` makes environments and ends; line by line:\n"
    + peers_setup.told(peers_setup.GATEWAYS),
)

Row = dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--setup"]:
        return peers_setup.main(arguments[1:], peers_setup.GATEWAYS)
    return run(ABOUT, measure, arguments)


def measure(settings: Settings) -> Measured:
    names = [name for name in COMMANDS if installed(name)]
    rounds: dict[str, list[Row]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(listening("mock_upstream"))
        started = [stack.enter_context(running(name, port)) for name in names]
        settings.progress(f"{', '.join(names)} are ready")
        for number in range(2 if settings.quick else _ROUNDS):
            turn = started[number % len(started) :] + started[: number % len(started)]
            for edge in turn:
                rounds[edge.name].append(asyncio.run(_look(edge, port)))
            settings.progress(f"round {number + 1}")
    results = {name: medians(rows, 3) for name, rows in rounds.items()}
    return Measured(
        results,
        _values(results, rounds),
        {"rounds": len(rounds[OURS])},
        _missing(names),
    )


async def _look(edge: Edge, upstream_port: int) -> Row:
    """One round of one gateway."""
    slow = edge.name == _LITELLM
    await drive(edge.port, Load(8, 3), edge.key)  # connections, and whatever is made at first
    row: Row = {}
    for name, loads in _LOADS.items():
        before_s = edge.cpu_s()
        driven = await drive(edge.port, loads[slow], edge.key)
        cpu_s = edge.cpu_s() - before_s
        row |= _costs(name, driven, cpu_s)
    direct = await drive(upstream_port, _ALONE[slow])
    through = await drive(edge.port, _ALONE[slow], edge.key)
    for name, share in (("p50", 0.5), ("p95", 0.95)):
        row[f"added_{name}_ms"] = 1000 * (_at(through, share) - _at(direct, share))
    row["rss_mb"] = edge.rss_mb()
    return row


def _costs(name: str, driven: Driven, cpu_s: float) -> Row:
    requests = len(driven.latencies_s)
    if driven.chunks:
        return {f"us_per_chunk_{name}": 1e6 * cpu_s / driven.chunks}
    row = {f"ms_per_request_{name}": 1000 * cpu_s / requests}
    if name == "short":
        row["requests_per_s"] = requests / driven.took_s
        row["requests_per_cpu_s"] = requests / cpu_s
    return row


def _at(driven: Driven, share: float) -> float:
    return sorted(driven.latencies_s)[int(share * (len(driven.latencies_s) - 1))]


def _values(
    results: Mapping[str, Mapping[str, Any]], rounds: Mapping[str, Sequence[Row]]
) -> dict[str, float]:
    ours = results[OURS]
    values = {
        "ms_per_request": ours["ms_per_request_short"],
        "us_per_paced_chunk": ours["us_per_chunk_paced"],
        "added_p50_ms": ours["added_p50_ms"],
        "rss_mb": ours["rss_mb"],
    }
    if _LITELLM in rounds:
        values["over_litellm"] = _ratio(rounds, "requests_per_cpu_s", (_LITELLM,))
    if all(name in rounds for name in _RUST):
        values["beside_rust"] = _ratio(rounds, "ms_per_request_short", _RUST)
        values["paced_beside_rust"] = _ratio(rounds, "us_per_chunk_paced", _RUST)
    return values


def _ratio(rounds: Mapping[str, Sequence[Row]], field: str, peers: Sequence[str]) -> float:
    """Ours over the least of the peers, within each round."""
    ratios = [
        ours[field] / min(rounds[peer][number][field] for peer in peers)
        for number, ours in enumerate(rounds[OURS])
    ]
    return round(median(ratios), 3)


def _missing(names: Sequence[str]) -> dict[str, str]:
    reasons = {}
    if _LITELLM not in names:
        reasons["over_litellm"] = "litellm is not installed"
    if absent := [name for name in _RUST if name not in names]:
        why = f"not installed: {', '.join(absent)}"
        reasons |= {"beside_rust": why, "paced_beside_rust": why}
    return reasons


if __name__ == "__main__":
    sys.exit(main())
