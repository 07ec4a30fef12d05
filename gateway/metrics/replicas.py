"""Replicas: which take requests, what they have to do, what was learned of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gateway.metrics.family import PREFIX, Family, Reading, Values
from gateway.replica import Replica


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


def _counted(read: Callable[[Reading], Mapping[str, Mapping[str, int]]]) -> Callable[..., Values]:
    """What is counted by replica and outcome."""

    def values(r: Reading) -> Values:
        return {
            (url, outcome): count
            for url, outcomes in read(r).items()
            for outcome, count in outcomes.items()
        }

    return values


GAUGES = (
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
)

COUNTERS = (
    Family(
        PREFIX + "replica_requests",
        "Answers of a replica by how they ended.",
        _counted(lambda r: r.edge.meters.replicas),
        ("replica", "outcome"),
    ),
    Family(
        PREFIX + "replica_attempts",
        "Requests that were sent to a replica, also those that another one answered then.",
        _counted(lambda r: r.edge.admission.tallies.tried),
        ("replica", "outcome"),
    ),
)
