"""`python -m benchmarks.lab.edge_hop`: what the stack's proxy costs before a gateway.

The same load on one gateway and on HAProxy before it, with the stack's settings, in turns. Prints
medians of the rounds: the processor time of the proxy, and what it adds to a first token.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

from benchmarks.lab.conditions import ROOT, load
from benchmarks.lab.edge_load import Driven, Load, drive
from benchmarks.lab.edges import OURS, Edge, listening, running

CONFIGURATION = ROOT / "deploy" / "haproxy" / "haproxy.cfg"
ROUNDS = 15
SHORT = Load(8, 100)
PACED = Load(32, 1, 100, 20)
FIRST = Load(1, 60, 1)  # a stream of one chunk: until its end is until its first token


def main() -> int:
    program = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        print("haproxy is not installed here: apt-get install haproxy", file=sys.stderr)
        return 1

    def command(upstreams: Sequence[str], port: int, folder: Path) -> Sequence[str]:
        """Both of the stack's gateways are the one that there is."""
        told = CONFIGURATION.read_text(encoding="utf-8").replace("bind :8080", f"bind :{port}")
        there = upstreams[0].removeprefix("http://")
        file = folder / "haproxy.cfg"
        file.write_text(re.sub(r"gateway-\d:8080", there, told), encoding="utf-8")
        return program, "-db", "-f", str(file)

    with contextlib.ExitStack() as stack:
        port = stack.enter_context(listening("mock_upstream"))
        gateway = stack.enter_context(running(OURS, port))
        proxy = stack.enter_context(running("haproxy", gateway.port, command=command))
        found: dict[str, list[float]] = defaultdict(list)
        for number in range(ROUNDS):
            for name, value in asyncio.run(_round(gateway, proxy, bool(number % 2))).items():
                found[name].append(value)
    for name, values in found.items():
        low, _, high = quantiles(values, n=4)
        print(f"{name:42} {median(values):8.3f}   (quartiles {low:.3f} to {high:.3f})")
    print(f"{ROUNDS} rounds; load {load():.1f} at the end")
    return 0


async def _round(gateway: Edge, proxy: Edge, proxy_first: bool) -> dict[str, float]:
    row = {}
    for name, cost in (("a short request", SHORT), ("32 paced streams", PACED)):
        before = proxy.cpu_s(), gateway.cpu_s()
        driven = await drive(proxy.port, cost, gateway.key)
        theirs, ours = proxy.cpu_s() - before[0], gateway.cpu_s() - before[1]
        per = 1e6 / (driven.chunks or len(driven.latencies_s))
        unit = "a chunk" if driven.chunks else "each"
        row[f"{name}: proxy's CPU, us {unit}"] = theirs * per
        row[f"{name}: gateway's CPU, us {unit}"] = ours * per
    ports = [gateway.port, proxy.port]
    taken = {
        at: await drive(at, FIRST, gateway.key)
        for at in (reversed(ports) if proxy_first else ports)
    }
    for share in (0.5, 0.95):
        direct, through = (_at(taken[at], share) for at in ports)
        row[f"first token, p{100 * share:.0f}: direct, ms"] = 1000 * direct
        row[f"first token, p{100 * share:.0f}: added, ms"] = 1000 * (through - direct)
    return row


def _at(driven: Driven, share: float) -> float:
    return sorted(driven.latencies_s)[int(share * (len(driven.latencies_s) - 1))]


if __name__ == "__main__":
    sys.exit(main())
