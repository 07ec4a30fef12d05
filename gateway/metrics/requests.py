"""Requests: how many there are, how they ended, how long they took, by tier."""

from __future__ import annotations

from collections.abc import Callable

from gateway.histogram import Histogram
from gateway.metrics.family import PREFIX, Family, Reading, Values, by_name
from gateway.tallies import Tally


def _lines(what: str) -> Callable[[Reading], Values]:
    """A number of each tier's line, over all queues."""

    def read(r: Reading) -> Values:
        found = dict.fromkeys(r.edge.admission.tiers, 0)
        for front in r.edge.admission.fronts.values():
            for tier, line in front.queue.lines.items():
                found[tier] += getattr(line, what)
        return by_name(found)

    return read


def _tallied(read: Callable[[Tally], float]) -> Callable[[Reading], Values]:
    """A number of each tier's tally."""
    return lambda r: by_name(
        {tier: read(r.edge.admission.tallies.of(tier)) for tier in r.edge.admission.tiers}
    )


def _phases(r: Reading) -> Values:
    return {
        (name, tier): s
        for tier in r.edge.admission.tiers
        for name, s in r.edge.admission.tallies.of(tier).phase_s.items()
    }


def _queued(r: Reading) -> Values:
    waiting = sum(
        line.uncached
        for front in r.edge.admission.fronts.values()
        for line in front.queue.lines.values()
    )
    sent = sum(replica.waiting_tokens for replica in r.edge.pool.replicas)
    return by_name({"gateway": waiting, "replicas": sent})


def _answered(name: str) -> Callable[[Reading], Values]:
    """A number of the response cache, where there is one."""
    return lambda r: {} if r.edge.answers is None else r.edge.answers.told()[name]


def _goodput(r: Reading) -> Values:
    """With zeros before the first: a share of misses, and its rate, are numbers from the start."""
    counted = r.edge.meters.goodput
    arms = dict.fromkeys([(tier, "baseline") for tier in r.edge.admission.tiers])
    arms |= dict.fromkeys((tier, arm) for tier, arm, _ in list(counted))
    return {(*arm, met): counted[*arm, met] for arm in arms for met in ("true", "false")}


GAUGES = (
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
)

COUNTERS = (
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
)

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
