"""`GET /metrics` of the gateway: every metric, what it means and where its number stands.

Labels are few and bounded: tiers, arms and invariants are the policy's or ours, models are those
that replicas have named, replicas those that there are. A tenant, a user or a session is no label:
nobody bounds how many there are, and what a tenant does is no other's to read. docs/metrics.md
describes every metric; the file is long because it is a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import TYPE_CHECKING, Any

from gateway import process
from gateway.edge import Edge, Live
from gateway.exposition import Format
from gateway.histogram import Histogram
from gateway.replica import Replica
from gateway.tallies import Tally

if TYPE_CHECKING:
    from policies.standing import Standing

PREFIX = "headgate_gateway_"
STATES = ("on", "off", "stale", "quarantined")  # of an optimization
STAGES = ("live", "suspended", "lapsed", "ended")  # of a rollout

Values = float | Mapping[tuple[str, ...], float]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a page is made of, at one moment."""

    live: Live
    rollout: Mapping[str, Any] | None  # as this process goes by it
    now: float  # seconds since 1970

    @property
    def edge(self) -> Edge:
        return self.live.edge

    @property
    def standings(self) -> Sequence[Standing]:
        return self.live.gated.standings if self.live.gated is not None else ()


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: a value, or values by what its labels are. Nothing where it does not apply."""

    name: str
    text: str
    read: Callable[[Reading], Values]
    labels: tuple[str, ...] = ()


def _by(values: Mapping[str, float]) -> Values:
    return {(name,): value for name, value in values.items()}


def _lines(what: str) -> Callable[[Reading], Values]:
    """A number of each tier's line, over all queues."""

    def read(r: Reading) -> Values:
        found = dict.fromkeys(r.edge.admission.tiers, 0)
        for front in r.edge.admission.fronts.values():
            for tier, line in front.queue.lines.items():
                found[tier] += getattr(line, what)
        return _by(found)

    return read


def _tallied(read: Callable[[Tally], float]) -> Callable[[Reading], Values]:
    """A number of each tier's tally."""
    return lambda r: _by(
        {tier: read(r.edge.admission.tallies.of(tier)) for tier in r.edge.admission.tiers}
    )


def _phases(r: Reading) -> Values:
    return {
        (name, tier): s
        for tier in r.edge.admission.tiers
        for name, s in r.edge.admission.tallies.of(tier).phase_s.items()
    }


def _replicas(read: Callable[[Reading, Replica], float | None]) -> Callable[[Reading], Values]:
    """A number of each replica that there is; None where nothing is known yet."""

    def values(r: Reading) -> Values:
        found = ((one.url, read(r, one)) for one in r.edge.pool.replicas)
        return {(url,): value for url, value in found if value is not None}

    return values


def _learned(read: Callable[[Any], float]) -> Callable[[Reading], Values]:
    """A number of the learned pace of each replica of which first tokens were seen."""

    def one(r: Reading, replica: Replica) -> float | None:
        known = r.edge.routing.replicas.get(replica.url)
        return read(known.pace) if known is not None and known.pace.seen else None

    return _replicas(one)


def _queued(r: Reading) -> Values:
    waiting = sum(
        line.uncached
        for front in r.edge.admission.fronts.values()
        for line in front.queue.lines.values()
    )
    sent = sum(replica.waiting_tokens for replica in r.edge.pool.replicas)
    return _by({"gateway": waiting, "replicas": sent})


def _rungs(r: Reading) -> Values:
    ladder = r.edge.ladder
    return _by(
        {
            "prompt": ladder.prompt,
            "ideal": ladder.anywhere,
            "available": ladder.available,
            "captured": ladder.captured,
            "delivered": ladder.delivered,
        }
    )


def _missed(r: Reading) -> Values:
    ladder = r.edge.ladder
    return _by({name: getattr(ladder, name) for name in ("unknown", "down", "load", "evicted")})


def _trimmed(r: Reading) -> Values:
    totals = r.edge.shortener.totals
    return _by({"removed": totals.removed_tokens, "again": totals.again_tokens})


def _drafted(r: Reading) -> Values:
    stages = r.edge.meters.stages
    accepted = stages["accepted"]
    return _by({"accepted": accepted, "rejected": stages["drafted"] - accepted})


def _recorded(r: Reading) -> Values:
    return _by(r.edge.recorder.told()) if r.edge.recorder is not None else {}


def _answered(name: str) -> Callable[[Reading], Values]:
    """A number of the response cache, where there is one."""
    return lambda r: {} if r.edge.answers is None else r.edge.answers.told()[name]


def _by_replica(r: Reading) -> Values:
    return {
        (url, outcome): count
        for url, outcomes in r.edge.meters.replicas.items()
        for outcome, count in outcomes.items()
    }


def _goodput(r: Reading) -> Values:
    """With zeros before the first: a share of misses, and its rate, are numbers from the start."""
    counted = r.edge.meters.goodput
    arms = dict.fromkeys([(tier, "baseline") for tier in r.edge.admission.tiers])
    arms |= dict.fromkeys((tier, arm) for tier, arm, _ in list(counted))
    return {(*arm, met): counted[*arm, met] for arm in arms for met in ("true", "false")}


def _optimizations(r: Reading) -> Values:
    return {
        (one.hypothesis, state): float(one.state == state)
        for one in r.standings
        for state in STATES
    }


def _standing(read: Callable[[Standing, float], float | None]) -> Callable[[Reading], Values]:
    """A number of each optimization of the policy."""

    def values(r: Reading) -> Values:
        found = ((one.hypothesis, read(one, r.now)) for one in r.standings)
        return {(name,): value for name, value in found if value is not None}

    return values


def _age_s(one: Standing, now: float) -> float | None:
    return None if one.made_at is None else now - one.made_at


def _left_s(one: Standing, now: float) -> float | None:
    return None if one.expires_at is None else one.expires_at - now


def _rollout(name: str) -> Callable[[Reading], Values]:
    """A number of the rollout, where there is one."""
    return lambda r: {} if r.rollout is None else {(r.rollout["name"],): r.rollout[name]}


def _stage(r: Reading) -> Values:
    if r.rollout is None:
        return {}
    at = "live"
    if r.rollout["ended"]:
        at = "ended"
    elif not r.rollout["lease_s"]:
        at = "lapsed"
    elif r.rollout["suspended"]:
        at = "suspended"
    return {(r.rollout["name"], stage): float(stage == at) for stage in STAGES}


def _store_up(r: Reading) -> Values:
    far = r.edge.state.far
    return {} if far is None else float(far.up)


def _outages(r: Reading) -> Values:
    far = r.edge.state.far
    return {} if far is None else far.outages


@cache
def _version() -> str:
    try:
        return version("headgate")
    except PackageNotFoundError:  # it runs from a folder that was never installed
        return "0"


GAUGES = (
    Family(
        PREFIX + "info",
        "1, with what serves as labels.",
        lambda _: {(_version(), python_version()): 1.0},
        ("version", "python"),
    ),
    Family(
        "process_resident_memory_bytes",
        "Memory of this process that is really there.",
        lambda _: process.resident_bytes(),
    ),
    Family(
        "process_start_time_seconds",
        "When this process began, in seconds since 1970.",
        lambda _: process.started_at(),
    ),
    Family(
        "process_open_fds",
        "Files and connections that it has open.",
        lambda _: process.open_files(),
    ),
    Family(
        PREFIX + "requests_in_flight",
        "Requests, waiting ones included.",
        lambda r: r.edge.pool.in_flight,
    ),
    Family(
        PREFIX + "requests_waiting",
        "Requests that wait for a replica.",
        _lines("waiting"),
        ("tier",),
    ),
    Family(
        PREFIX + "requests_running",
        "Requests that a replica works on.",
        _lines("running"),
        ("tier",),
    ),
    Family(
        PREFIX + "queued_uncached_tokens",
        "Prompt tokens still to be computed before a first token: of requests that wait here, and "
        "of those that were sent.",
        _queued,
        ("where",),
    ),
    Family(
        PREFIX + "replicas_ready",
        "Replicas that take requests.",
        lambda r: sum(replica.healthy for replica in r.edge.pool.replicas),
    ),
    Family(
        PREFIX + "replica_up",
        "1 while it takes requests.",
        _replicas(lambda _, one: float(one.healthy)),
        ("replica",),
    ),
    Family(
        PREFIX + "replica_draining",
        "1 while it takes nothing new: by hand, by the policy, or since its source left it out.",
        _replicas(lambda _, one: float(one.spared)),
        ("replica",),
    ),
    Family(
        PREFIX + "replica_in_flight",
        "Requests that it works on for this gateway.",
        _replicas(lambda _, one: one.in_flight),
        ("replica",),
    ),
    Family(
        PREFIX + "replica_prefill_tokens_per_second",
        "Prompt tokens that it computes a second, as learned from its first tokens.",
        _learned(lambda pace: 1 / pace.s_per_token),
        ("replica",),
    ),
    Family(
        PREFIX + "ttft_prediction_error_ratio",
        "By which factor its first tokens come sooner or later than foreseen, typically; 1: as "
        "foreseen.",
        _learned(lambda pace: pace.factor),
        ("replica",),
    ),
    Family(
        PREFIX + "ttft_prediction_trusted",
        "0 while its predictions are so wrong that nothing is decided by them.",
        _learned(lambda pace: float(not pace.wrong)),
        ("replica",),
    ),
    Family(
        PREFIX + "store_up",
        "1 while the shared store answers; absent without one.",
        _store_up,
    ),
    Family(
        "headgate_optimization_state",
        "1 for the state that an optimization of the policy is in, 0 for the others.",
        _optimizations,
        ("name", "state"),
    ),
    Family(
        "headgate_optimization_enabled",
        "1 while it is served.",
        _standing(lambda one, _: float(one.enabled)),
        ("name",),
    ),
    Family(
        "headgate_verdict_age_seconds",
        "Since the verdict that it goes by was made; absent without one.",
        _standing(_age_s),
        ("name",),
    ),
    Family(
        "headgate_verdict_valid_seconds",
        "Until that verdict is too old; negative afterwards.",
        _standing(_left_s),
        ("name",),
    ),
    Family(
        "headgate_rollout_share",
        "Share of sessions that the candidate answers; absent without a rollout.",
        _rollout("share"),
        ("name",),
    ),
    Family(
        "headgate_rollout_shadow_share",
        "Share of sessions that it answers for nobody.",
        _rollout("shadow"),
        ("name",),
    ),
    Family(
        "headgate_rollout_state",
        "1 for the state that the rollout is in, 0 for the others.",
        _stage,
        ("name", "state"),
    ),
)

COUNTERS = (
    Family(
        "process_cpu_seconds",
        "Seconds of processors that this process took.",
        lambda _: process.cpu_s(),
    ),
    Family(
        PREFIX + "requests",
        "Answers by how they ended.",
        lambda r: r.edge.meters.requests,
        ("tier", "model", "arm", "outcome"),
    ),
    Family(
        PREFIX + "goodput_requests",
        "Answers, by whether they kept all that their tier promises; what failed has not.",
        _goodput,
        ("tier", "arm", "met"),
    ),
    Family(
        PREFIX + "replica_requests",
        "Answers of a replica by how they ended.",
        _by_replica,
        ("replica", "outcome"),
    ),
    Family(
        PREFIX + "admitted", "Requests that got a place.", _tallied(lambda t: t.admitted), ("tier",)
    ),
    Family(
        PREFIX + "queue_seconds",
        "Seconds that requests waited for a place, together.",
        _tallied(lambda t: t.waited_s),
        ("tier",),
    ),
    Family(
        PREFIX + "phase_seconds",
        "Seconds that requests took, by where they went.",
        _phases,
        ("phase", "tier"),
    ),
    Family(
        PREFIX + "shed",
        "Requests sent away for saturation.",
        _tallied(lambda t: t.shed),
        ("tier",),
    ),
    Family(
        PREFIX + "limited",
        "Requests beyond a tenant's limits.",
        _tallied(lambda t: t.limited),
        ("tier",),
    ),
    Family(
        PREFIX + "first_token_in_time",
        "Streams whose first token came within their target.",
        _tallied(lambda t: t.in_time),
        ("tier",),
    ),
    Family(
        PREFIX + "first_token_late",
        "Streams whose first token came after it.",
        _tallied(lambda t: t.late),
        ("tier",),
    ),
    Family(
        PREFIX + "tokens_in_time",
        "Streams with a usage whose tokens came within their target, on average.",
        _tallied(lambda t: t.in_pace),
        ("tier",),
    ),
    Family(
        PREFIX + "tokens_late",
        "Streams with a usage whose tokens came slower.",
        _tallied(lambda t: t.slow),
        ("tier",),
    ),
    Family(
        PREFIX + "prompt_tokens",
        "Prompt tokens, and how many of them were cached: somewhere, at a replica that could be "
        "chosen, at the one that was, and found there.",
        _rungs,
        ("rung",),
    ),
    Family(
        PREFIX + "uncached_prompt_tokens",
        "Why prompt tokens were not found in a cache.",
        _missed,
        ("cause",),
    ),
    Family(
        PREFIX + "trimmed_tokens",
        "Prompt tokens that trimming left out, and those that it made the replicas compute again.",
        _trimmed,
        ("what",),
    ),
    Family(
        PREFIX + "draft_tokens",
        "Guessed tokens by whether they were right, as far as answers tell.",
        _drafted,
        ("fate",),
    ),
    Family(
        PREFIX + "stalls",
        "Gaps inside streams of 50 ms and more that were over five times the stream's median.",
        lambda r: r.edge.meters.stalls,
        ("tier",),
    ),
    Family(
        PREFIX + "bytes_after_cancel",
        "Bytes that replicas still sent for clients that had left.",
        lambda r: r.edge.meters.bytes_in_vain,
    ),
    Family(
        PREFIX + "response_cache_hits",
        "Requests answered from what was answered before; absent where that is off.",
        _answered("hits"),
    ),
    Family(
        PREFIX + "response_cache_misses",
        "Requests that were looked for there in vain.",
        _answered("misses"),
    ),
    Family(
        PREFIX + "records",
        "Requests for the recorder, by what became of them.",
        _recorded,
        ("outcome",),
    ),
    Family(
        PREFIX + "trace_spans",
        "Spans for a collector, by what became of them; `refused` are traces that found no room.",
        lambda r: _by(r.edge.tracer.told()),
        ("outcome",),
    ),
    Family(
        PREFIX + "store_outages",
        "Times that the shared store was lost.",
        _outages,
    ),
    Family(
        "headgate_token_ledger_tokens",
        "Tokens of answers that came whole, by the stage of their way.",
        lambda r: _by(r.edge.meters.stages),
        ("stage",),
    ),
    Family(
        "headgate_token_ledger_requests",
        "Requests whose counts were checked.",
        lambda r: r.edge.meters.checked,
    ),
    Family(
        "headgate_token_ledger_violations",
        "Requests whose counts do not add up, by what does not hold.",
        lambda r: _by(r.edge.meters.violations),
        ("invariant",),
    ),
)

OF_ANSWERS = ("tier", "model", "arm")
# Name, meaning, where it stands.
HISTOGRAMS: tuple[tuple[str, str, Callable[[Reading], Histogram]], ...] = (
    (
        "gen_ai_server_time_to_first_token_seconds",
        "From a streamed request's last byte at its socket to its first token at the client's.",
        lambda r: r.edge.meters.first_token_s,
    ),
    (
        "gen_ai_server_time_per_output_token_seconds",
        "Mean time between a stream's tokens, where it tells how many they were.",
        lambda r: r.edge.meters.token_s,
    ),
    (
        "gen_ai_server_request_duration_seconds",
        "From a request's last byte at its socket to the end of its answer.",
        lambda r: r.edge.meters.duration_s,
    ),
    (
        PREFIX + "largest_gap_seconds",
        "Longest time between two reads of a stream, but for a client that does not read.",
        lambda r: r.edge.meters.gap_s,
    ),
    (
        PREFIX + "recv_queue_seconds",
        "How long a request lay unread in its socket: event loop lag, by the kernel's clock.",
        lambda r: r.edge.meters.recv_queue_s,
    ),
)


# Of several processes behind one port, which one page tells of (gateway/scrape.py).
TOLD = Family(
    PREFIX + "process_told",
    "1 for each process behind this port whose samples are on this page, 0 for one that has not "
    "answered; absent where there is one process.",
    lambda _: {},
    ("process",),
)


def families(reading: Reading, form: Format) -> Iterator[tuple[str, str, Iterator[str]]]:
    """The name of each metric, its head, and its samples in pieces."""
    for kind, found in (("gauge", GAUGES), ("counter", COUNTERS)):
        for family in found:
            head = form.head(family.name, kind, family.text)
            yield family.name, head, _samples(family, kind, reading, form)
    for name, text, read in HISTOGRAMS:
        yield (
            name,
            form.head(name, "histogram", text),
            form.buckets(name, OF_ANSWERS, read(reading)),
        )


def _samples(family: Family, kind: str, reading: Reading, form: Format) -> Iterator[str]:
    values = family.read(reading)
    by: Mapping[tuple[str, ...], float]
    by = values if isinstance(values, Mapping) else {(): values}
    name = family.name + ("_total" if kind == "counter" else "")
    yield form.samples(name, family.labels, by)
