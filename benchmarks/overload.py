"""`python -m benchmarks.overload`: recorded traffic at 0.5 to 3 times what the replicas can do.

The gateway's own admission, on a virtual clock, before simulated workers; beside it the same
workers first come, first served. Errors count as misses.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.lab import live_overload, report, virtual
from benchmarks.lab.conditions import ROOT
from benchmarks.lab.report import About, Goal, Measured, Settings
from benchmarks.lab.samples import four_digits, percentile
from benchmarks.lab.simulated import BLOCK_CHARS, SEQUENCES, TPOT_S, Job, Worker
from cache.memory_store import MemoryStore
from gateway.admission import Admission
from gateway.call import CHAT_PATH, Call
from gateway.fairness import price
from gateway.keys import Known
from gateway.limits import Limits
from gateway.tiers import Tiers
from gateway.usage import Usage
from policies.schema import Deployment, Gateway, Runtime, Tenant, Tier
from policies.slo import key_hash
from runtime.wire import Problem

REPLAY = ROOT.parent / "shared" / "data" / "replay" / "requests.jsonl.gz"
LOADS = (0.5, 1.0, 1.5, 2.0, 3.0)
WORKERS = 2
REPEATS = 3  # of the recording, one behind the other
TIERS = ("interactive", "standard", "batch")
LIVE = 120  # requests of the live run
LIVE_TOKENS = 60
WARM_S = 5.0  # of each run's beginning, which are not counted

ABOUT = About(
    name="overload",
    measures=(
        "Goodput by tier under overload: 2,000 recorded requests (chat, documents, agents, "
        "retrieval, batch; arrival times of a production trace) at 0.5 to 3 times what two "
        "simulated workers can do, through the gateway's own admission on a virtual clock, and "
        "first come, first served beside it. A request is good when its first token and its "
        "tokens came within the tier's targets (batch: when it was answered); errors are misses. "
        "`live_at_2x` is a gateway process between sockets, ten times slower, targets too. "
        "The service gap is the largest difference of what two tenants got while both waited."
    ),
    goals=(
        Goal("interactive_at_2x", 0.99, "at least", "interactive within its targets at twice"),
        Goal("batch_moves_at_2x", 0.05, "at least", "batch's answered share at twice"),
        Goal("gap_share_of_bound", 1.0, "at most", "service gap within the bound of the paper"),
        Goal("collapse_3x", 0.9, "at least", "good requests a second at 3x, of those at 1x"),
    ),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One recorded request."""

    at_s: float
    tenant: str
    tier: str
    tokens: int
    answer_tokens: int
    blocks: tuple[int, ...]


@dataclass(slots=True)
class Outcome:
    """What became of one."""

    row: Row
    due_s: float
    ttft_s: float | None = None
    tpot_s: float = 0.0
    ended_s: float = 0.0
    status: int = 200


@dataclass(slots=True)
class Gaps:
    """The largest difference of service between two tenants of a tier while both waited."""

    largest: float = 0.0
    _since: dict[tuple[str, str, str], tuple[float, float]] = field(default_factory=dict)

    def look(self, tier: str, served: dict[str, float], waiting: Sequence[str]) -> None:
        pairs = {(tier, a, b) for a in waiting for b in waiting if a < b}
        for pair in [known for known in self._since if known[0] == tier and known not in pairs]:
            del self._since[pair]
        for pair in pairs:
            _, a, b = pair
            now = (served.get(a, 0.0), served.get(b, 0.0))
            then = self._since.setdefault(pair, now)
            self.largest = max(self.largest, abs((now[0] - then[0]) - (now[1] - then[1])))


def rows(quick: bool) -> list[Row]:
    """The recording, or where there is none, requests of about the same sizes."""
    found = _recorded() if REPLAY.exists() else _drawn()
    return found[:600] if quick else found


def _recorded() -> list[Row]:
    found = []
    with gzip.open(REPLAY, "rt", encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            body = entry["body"]
            text = json.dumps(body.get("tools", "")) + json.dumps(body["messages"])
            found.append(
                Row(
                    entry["t_ms"] / 1000,
                    entry["tenant"],
                    entry["tier"],
                    len(text) // 4,
                    max(1, body["max_tokens"]),
                    _blocks(text),
                )
            )
    return found


def _blocks(text: str) -> tuple[int, ...]:
    data, chain, found = text.encode(), 0, []
    for start in range(0, len(data) - BLOCK_CHARS + 1, BLOCK_CHARS):
        chain = hash((chain, zlib.crc32(data[start : start + BLOCK_CHARS])))
        found.append(chain)
    return tuple(found)


def _drawn() -> list[Row]:
    rng = random.Random(5)
    kinds = (("interactive", "chat", 240), ("standard", "agent", 1370), ("batch", "batch", 930))
    found, at_s = [], 0.0
    for number in range(2000):
        at_s += rng.expovariate(6.36)
        tier, name, tokens = rng.choices(kinds, (55, 31, 14))[0]
        size = max(8, round(rng.expovariate(1 / tokens)))
        tenant = f"{name}-{rng.randrange(4)}"
        shared = [hash((tenant, index)) for index in range(size // 32)]
        own = [hash((number, index)) for index in range(size // 32)]
        answer = max(1, round(rng.expovariate(1 / 190)))
        found.append(Row(at_s, tenant, tier, size, answer, (*shared, *own)))
    return found


class Run:
    """One replay against the workers, with the gateway's admission or without."""

    def __init__(self, traffic: Sequence[Row], *, tiers: bool) -> None:
        self.traffic = traffic
        self.tiers = tiers
        self.outcomes: list[Outcome] = []
        self.gaps = Gaps()

    async def go(self) -> Run:
        loop = asyncio.get_running_loop()
        self.workers = [Worker(f"w{n}", fifo=not self.tiers) for n in range(WORKERS)]
        work = [asyncio.create_task(worker.run()) for worker in self.workers]
        names = sorted({row.tenant for row in self.traffic})
        tenants = {name: Tenant(keys=(key_hash(name),)) for name in names}
        gateway = Gateway(tenants=tenants)
        policy = Deployment(version=1, gateway=gateway, runtime=Runtime(max_sequences=SEQUENCES))
        self.known = {name: Known(name, rights) for name, rights in tenants.items()}
        self.chooser = Tiers.of(gateway, b"")
        limits = Limits(MemoryStore(loop.time), loop.time)
        rng = random.Random(7)
        self.admission = Admission(policy, lambda: self.workers, limits, loop.time, rng)
        self.served: dict[str, dict[str, float]] = {tier: {} for tier in gateway.tiers}
        visits = [asyncio.create_task(self._visit(row, loop)) for row in self.traffic]
        await asyncio.gather(*visits)
        for task in work:
            task.cancel()
        return self

    async def _visit(self, row: Row, loop: asyncio.AbstractEventLoop) -> None:
        await asyncio.sleep(row.at_s - loop.time())
        outcome = Outcome(row, loop.time())
        self.outcomes.append(outcome)
        try:
            if self.tiers:
                await self._admitted(row, outcome, loop)
            else:
                await self._served(
                    row, outcome, loop, Job(row.tokens, row.answer_tokens, row.blocks)
                )
        except Problem as problem:
            outcome.status = problem.status
        outcome.ended_s = loop.time()

    async def _admitted(self, row: Row, outcome: Outcome, loop: asyncio.AbstractEventLoop) -> None:
        data = {"max_tokens": row.answer_tokens}
        call = Call(CHAT_PATH, "m", True, b"{}", {"x-headgate-tier": row.tier}, None, data)
        tenant = self.known[row.tenant]
        service = self.chooser.tier(call, tenant)
        async with self.admission.place(call, tenant, service, row.tokens) as place:
            due = loop.time() + 30 * service.rules.priority
            job = Job(
                row.tokens,
                row.answer_tokens,
                row.blocks,
                (due + (service.ttft_ms or 0) / 1000, loop.time()),
                (service.tpot_ms or 1000 * TPOT_S) / 1000,
            )
            self._note(row, price(row.tokens, 0))
            await self._served(row, outcome, loop, job, place.began)
            self._note(row, price(0, row.answer_tokens))
            place.used(Usage(row.tokens, row.answer_tokens, job.cached))

    async def _served(
        self,
        row: Row,
        outcome: Outcome,
        loop: asyncio.AbstractEventLoop,
        job: Job,
        began: Any = None,
    ) -> None:
        worker = min(self.workers, key=lambda one: one.in_flight)
        worker.submit(job)
        try:
            await job.first.wait()
            outcome.ttft_s = loop.time() - outcome.due_s
            if began is not None:
                began()
            first = loop.time()
            await job.done.wait()
            outcome.tpot_s = (loop.time() - first) / max(row.answer_tokens - 1, 1)
        finally:
            worker.leave(job)

    def _note(self, row: Row, amount: float) -> None:
        served = self.served[row.tier]
        served[row.tenant] = served.get(row.tenant, 0.0) + amount
        for front in self.admission.fronts.values():
            self.gaps.look(row.tier, served, list(front.queue.lines[row.tier].heaps))


def good(tier: Tier, one: Outcome | live_overload.Visit, slow: float = 1.0) -> bool:
    """Within the tier's targets, where everything takes `slow` times as long."""
    if one.status != 200 or one.ttft_s is None:
        return False
    in_time = tier.ttft_ms is None or one.ttft_s <= slow * tier.ttft_ms / 1000
    return in_time and (tier.tpot_ms is None or one.tpot_s <= slow * tier.tpot_ms / 1000)


def capacity(traffic: Sequence[Row]) -> float:
    """Requests a second, when all are there at once."""
    at_once = [replace(row, at_s=0.0) for row in traffic]
    outcomes = virtual.run(Run(at_once, tiers=False).go()).outcomes
    return len(outcomes) / max(one.ended_s for one in outcomes)


def at_load(traffic: Sequence[Row], load: float, able_per_s: float) -> list[Row]:
    """The recording, repeated, faster or slower so that its mean rate is `load` of what is able."""
    span_s = traffic[-1].at_s
    speed = load * able_per_s / (len(traffic) / span_s)
    return [
        replace(row, at_s=(row.at_s + turn * span_s) / speed)
        for turn in range(REPEATS)
        for row in traffic
    ]


def summary(run: Run) -> dict[str, Any]:
    """By tier: the share that was good, that was answered, that was refused; waits for tokens."""
    counted = [one for one in run.outcomes if one.due_s >= WARM_S]
    span_s = max(one.due_s for one in counted) - WARM_S
    told: dict[str, Any] = {}
    tiers = Gateway().tiers
    for tier in TIERS:
        own = [one for one in counted if one.row.tier == tier]
        ttft = [one.ttft_s for one in own if one.ttft_s is not None]
        told[tier] = {
            "good": sum(good(tiers[tier], one) for one in own) / len(own),
            "answered": sum(one.status == 200 for one in own) / len(own),
            "refused": sum(one.status != 200 for one in own) / len(own),
            "ttft_p50_s": percentile(ttft, 50) if ttft else None,
            "ttft_p99_s": percentile(ttft, 99) if ttft else None,
        }
    told["good_per_s"] = sum(good(tiers[one.row.tier], one) for one in counted) / span_s
    return told


def fairness() -> tuple[float, float]:
    """One tenant floods, one asks a tenth as often, both always wait: gap and bound, in service."""
    rng = random.Random(3)
    traffic = []
    for number in range(900):
        tenant = "flood" if number % 10 else "modest"
        tokens, answer = rng.randint(50, 2000), rng.randint(10, 400)
        blocks = tuple(hash((number, index)) for index in range(tokens // 16))
        traffic.append(Row(0.001 * number, tenant, "batch", tokens, answer, blocks))
    run = virtual.run(Run(traffic, tiers=True).go())
    under_way = WORKERS * SEQUENCES * max(row.tokens + row.answer_tokens for row in traffic)
    return run.gaps.largest, 2 * max(price(2000, 0), price(0, under_way))


def live(traffic: Sequence[Row], count: int) -> dict[str, Any]:
    """`count` requests at twice what is able, through a gateway process, ten times slower. Answers
    are cut to LIVE_TOKENS and no prompt is cached, so that what is able is another number."""
    short = [
        replace(row, answer_tokens=min(row.answer_tokens, LIVE_TOKENS), blocks=())
        for row in traffic
    ]
    scaled = at_load(short, 2.0, capacity(short))[:count]
    slow = live_overload.SLOW
    visits = [
        live_overload.Visit(slow * row.at_s, row.tier, row.tokens, row.answer_tokens)
        for row in scaled
    ]
    asyncio.run(live_overload.run(visits, WORKERS))
    told: dict[str, Any] = {"requests": len(visits)}
    tiers = Gateway().tiers
    for tier in TIERS:
        own = [one for one in visits if one.tier == tier]
        told[tier] = {
            "good": sum(good(tiers[tier], one, slow) for one in own) / max(len(own), 1),
            "answered": sum(one.status == 200 for one in own) / max(len(own), 1),
        }
    return told


def measure(settings: Settings) -> Measured:
    traffic = rows(settings.quick)
    able_per_s = capacity(traffic)
    settings.progress(f"the workers can do {able_per_s:.2f} requests a second")
    tiered: dict[str, Any] = {}
    fifo: dict[str, Any] = {}
    for load in LOADS:
        scaled = at_load(traffic, load, able_per_s)
        tiered[f"{load:g}x"] = summary(virtual.run(Run(scaled, tiers=True).go()))
        fifo[f"{load:g}x"] = summary(virtual.run(Run(scaled, tiers=False).go()))
        settings.progress(
            f"{load:g}x: interactive {tiered[f'{load:g}x']['interactive']['good']:.3f}, "
            f"first come first served {fifo[f'{load:g}x']['interactive']['good']:.3f}"
        )
    gap, bound = fairness()
    results = {
        "capacity_per_s": able_per_s,
        "tiers": tiered,
        "first_come": fifo,
        "service_gap": {"largest": gap, "bound": bound},
        "live_at_2x": live(traffic, LIVE // 8 if settings.quick else LIVE),
    }
    values = {
        "interactive_at_2x": tiered["2x"]["interactive"]["good"],
        "batch_moves_at_2x": tiered["2x"]["batch"]["answered"],
        "gap_share_of_bound": gap / bound,
        "collapse_3x": tiered["3x"]["good_per_s"] / tiered["1x"]["good_per_s"],
    }
    more = {"traffic": "recorded" if REPLAY.exists() else "drawn", "workers": WORKERS}
    return Measured(four_digits(results), four_digits(values), more)


def main(argv: Sequence[str] | None = None) -> int:
    return report.run(ABOUT, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
