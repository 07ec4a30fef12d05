"""`GET /metrics` of the gateway: Prometheus text, by tier and no finer.

Tenants, models and replicas are no labels: nobody bounds how many there are, and what a tenant does
is no other's to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gateway.admission import Admission
from gateway.edge import Edge
from gateway.tallies import Tally

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

PREFIX = "headgate_gateway_"
# Counters of a tier: name without `_total`, meaning, where they stand.
TOTALS: tuple[tuple[str, str, Callable[[Tally], float]], ...] = (
    ("admitted", "Requests that got a place.", lambda one: one.admitted),
    (
        "queue_seconds",
        "Seconds that requests waited for a place, together.",
        lambda one: one.waited_s,
    ),
    ("shed", "Requests sent away for saturation.", lambda one: one.shed),
    ("limited", "Requests beyond a tenant's limits.", lambda one: one.limited),
    (
        "first_token_in_time",
        "Streams whose first token came within their target.",
        lambda one: one.in_time,
    ),
    ("first_token_late", "Streams whose first token came after it.", lambda one: one.late),
    (
        "tokens_in_time",
        "Streams with a usage whose tokens came within their target, on average.",
        lambda one: one.in_pace,
    ),
    ("tokens_late", "Streams with a usage whose tokens came slower.", lambda one: one.slow),
)


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
        if edge.recorder is not None:
            records = CounterMetricFamily(
                PREFIX + "records", "Requests for the recorder, by what became of them.",
                labels=["outcome"],
            )  # fmt: skip
            for outcome, count in edge.recorder.told().items():
                records.add_metric([outcome], count)
            yield records
        for name, text, counts in _now(edge.admission):
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["tier"])
            for tier, count in counts.items():
                gauge.add_metric([tier], count)
            yield gauge
        for name, text, total in TOTALS:
            counter = CounterMetricFamily(PREFIX + name, text, labels=["tier"])
            for tier in edge.admission.tiers:
                counter.add_metric([tier], total(edge.admission.tallies.of(tier)))
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
