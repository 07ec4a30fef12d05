"""`GET /metrics` of the gateway: Prometheus text, by tier and no finer.

Tenants, models and replicas are no labels: nobody bounds how many there are, and what a tenant does
is no other's to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gateway.admission import Admission
from gateway.edge import Edge

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

PREFIX = "headgate_gateway_"


def page(edge: Edge) -> tuple[bytes, bytes]:
    """The page and its content type. The library is imported when somebody asks first."""
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(edge))
    return generate_latest(registry), CONTENT_TYPE_LATEST.encode()


class _Families:
    """What the library asks for the samples of a moment."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        edge = self._edge
        yield GaugeMetricFamily(
            PREFIX + "requests_in_flight", "Requests, waiting ones included.", edge.pool.in_flight
        )
        well = sum(replica.healthy for replica in edge.pool.replicas)
        yield GaugeMetricFamily(PREFIX + "replicas_ready", "Replicas that take requests.", well)
        for name, text, counts in _now(edge.admission):
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["tier"])
            for tier, count in counts.items():
                gauge.add_metric([tier], count)
            yield gauge
        for name, text, totals in _totals(edge.admission):
            counter = CounterMetricFamily(PREFIX + name, text, labels=["tier"])
            for tier, total in totals.items():
                counter.add_metric([tier], total)
            yield counter


def _now(admission: Admission) -> Iterator[tuple[str, str, dict[str, int]]]:
    """Gauges: name, meaning, value of each tier."""
    waiting = dict.fromkeys(admission.tiers, 0)
    running = dict.fromkeys(admission.tiers, 0)
    for front in admission.fronts.values():
        for tier, line in front.queue.lines.items():
            waiting[tier] += line.waiting
            running[tier] += line.running
    yield "requests_waiting", "Requests that wait for a replica.", waiting
    yield "requests_running", "Requests that a replica works on.", running


def _totals(admission: Admission) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Counters: name without `_total`, meaning, value of each tier."""
    told = [(tier, admission.tallies.of(tier)) for tier in admission.tiers]
    yield "admitted", "Requests that got a place.", {t: float(one.admitted) for t, one in told}
    yield (
        "queue_seconds",
        "Seconds that requests waited for a place, together.",
        {t: one.waited_s for t, one in told},
    )
    yield "shed", "Requests sent away for saturation.", {t: float(one.shed) for t, one in told}
    yield (
        "limited",
        "Requests beyond a tenant's limits.",
        {t: float(one.limited) for t, one in told},
    )
    yield (
        "first_token_in_time",
        "Streams whose first token came within their target.",
        {t: float(one.in_time) for t, one in told},
    )
    yield (
        "first_token_late",
        "Streams whose first token came after it.",
        {t: float(one.late) for t, one in told},
    )
    yield (
        "tokens_in_time",
        "Streams with a usage whose tokens came within their target, on average.",
        {t: float(one.in_pace) for t, one in told},
    )
    yield (
        "tokens_late",
        "Streams with a usage whose tokens came slower.",
        {t: float(one.slow) for t, one in told},
    )
