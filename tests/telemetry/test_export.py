"""Spans on their way to a collector, and what becomes of them when there is none."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from hypothesis import given, strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from policies.tracing import Tracing
from runtime.tracing import Tracer
from telemetry.otlp import Collector as Endpoint, Exporter
from telemetry.phases import Phases, cut, of_header
from telemetry.protobuf import request, written
from telemetry.trace import EVENTS_MAX, Event, Span
from tests.collector import attributes, collecting, received

SPAN = Span("ab" * 16, "cd" * 8, "", "one", "headgate-gateway", "SERVER", 1.5, 2.25, flags=3)
SIMPLE = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(max_size=300),
)
GIVEN = st.dictionaries(st.text(max_size=40), st.one_of(SIMPLE, st.lists(SIMPLE, max_size=4)))


def until(holds: Callable[[], bool], limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


@given(GIVEN, GIVEN, st.text(max_size=200), st.sampled_from(("UNSET", "OK", "ERROR")))
def test_opentelemetrys_own_classes_read_what_is_written(told, beside, text, status) -> None:
    """Every kind of value, in attributes of spans, events and resources."""
    one = replace(
        SPAN, name=text, attributes=told, status=status, parent_id="ef" * 8, tracestate=text,
        message=text, events=[Event(text, 1.75, beside)],
    )  # fmt: skip
    found = ExportTraceServiceRequest.FromString(request([written([one, SPAN])], beside | {"a": 1}))
    (group,) = found.resource_spans
    assert attributes(group.resource.attributes) == {
        "service.name": beside.get("service.name", SPAN.service), **beside, "a": 1,
    }  # fmt: skip
    first, second = group.scope_spans[0].spans
    seen = received(SPAN.service, first)
    assert (seen.trace_id, seen.span_id, seen.parent_id) == ("ab" * 16, "cd" * 8, "ef" * 8)
    assert (seen.name, seen.kind, seen.flags) == (text, 2, 3)
    assert (seen.start_ns, seen.end_ns) == (1_500_000_000, 2_250_000_000)
    assert seen.attributes == told
    assert (first.trace_state, first.status.message, seen.events) == (text, text, [text])
    assert first.status.code == ("UNSET", "OK", "ERROR").index(status)
    assert attributes(first.events[0].attributes) == beside
    assert first.events[0].time_unix_nano == 1_750_000_000
    assert second.parent_span_id == b""


def test_events_beyond_the_most_are_counted() -> None:
    many = replace(SPAN, events=[Event("e", 1.0)] * (EVENTS_MAX + 200))
    found = ExportTraceServiceRequest.FromString(request([written([many])], {}))
    told = found.resource_spans[0].scope_spans[0].spans[0]
    assert (len(told.events), told.dropped_events_count) == (EVENTS_MAX, 200)


def test_a_dead_collector_loses_spans_and_holds_nobody_up() -> None:
    """What it has no room for is refused at once; what it will not take is lost, and counted."""
    with collecting() as collector:
        collector.refuse = 400
        exporter = Exporter(Endpoint(f"{collector.url}/v1/traces"), waiting_max=3)
        for _ in range(5):
            exporter.put(lambda: [SPAN, SPAN])
        until(lambda: exporter.told() == {"exported": 0, "lost": 6, "refused": 2})
        collector.refuse = None
        exporter.put(lambda: [SPAN])
        exporter.close()
        assert exporter.exported == len(collector.spans) == 1


def test_a_busy_collector_is_asked_again() -> None:
    with collecting() as collector:
        collector.refuse = 503
        exporter = Exporter(Endpoint(f"{collector.url}/v1/traces", {"x-key": "k"}))
        exporter.put(lambda: [SPAN])
        until(lambda: collector.requests > 0)
        collector.refuse = None
        until(lambda: exporter.exported == 1)
        assert collector.headers["x-key"] == "k"
        exporter.close()


def test_spans_that_cannot_be_written_are_lost_and_later_ones_are_not() -> None:
    with collecting() as collector:
        exporter = Exporter(Endpoint(f"{collector.url}/v1/traces"))
        exporter.put(lambda: [replace(SPAN, name="\ud800")])
        until(lambda: exporter.lost == 1)
        exporter.put(lambda: [SPAN])
        until(lambda: exporter.exported == 1)
        exporter.close()


def test_a_worker_sends_each_request_of_a_wanted_trace_once() -> None:
    """A client's requests may share a trace, and each of them may turn out to be worth it."""
    with collecting() as collector:
        exporter = Exporter(Endpoint(f"{collector.url}/v1/traces"))
        tracer = Tracer(Tracing(share=0), exporter)
        trace = "ab" * 16
        for number in range(1, 4):
            parent = f"00-{trace}-{number:016x}-00".encode()
            tracer.end(tracer.begin([(b"traceparent", parent)]))
            assert tracer.want(trace) == number
        exporter.close()
    assert [int(span.parent_id, 16) for span in collector.spans] == [1, 2, 3]


def test_a_redirect_is_not_followed() -> None:
    """It would arrive as a GET without spans, and with the collector's key at whoever it names."""
    with collecting() as collector, collecting() as other:
        collector.refuse, collector.location = 302, f"{other.url}/elsewhere"
        exporter = Exporter(Endpoint(f"{collector.url}/v1/traces", {"x-key": "k"}))
        exporter.put(lambda: [SPAN])
        until(lambda: exporter.told() == {"exported": 0, "lost": 1, "refused": 0})
        exporter.close()
    assert (collector.requests, other.requests) == (1, 0)


def test_a_collector_is_named_by_the_policy_or_by_opentelemetrys_variables() -> None:
    assert Endpoint.named(None, {}) is None
    base = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318/"}
    assert Endpoint.named(None, base) == Endpoint("http://a:4318/v1/traces")
    whole = base | {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b/spans"}
    assert Endpoint.named(None, whole) == Endpoint("http://b/spans")
    keyed = whole | {"OTEL_EXPORTER_OTLP_HEADERS": "Authorization=Bearer%20x, b = 2"}
    assert Endpoint.named("http://c:4318", keyed) == Endpoint(
        "http://c:4318/v1/traces", {"authorization": "Bearer x", "b": "2"}
    )


@given(*[st.floats(0, 1e5)] * 3, st.binary(max_size=40), st.binary(max_size=40))
def test_what_a_worker_tells_of_its_time_is_read_again(queue, prefill, decode, before, after):
    """In a stream's comment, which is cut out of what it stands in, and in a header."""
    told = Phases(queue, prefill, decode)
    rest, found = cut(before.replace(b":", b"") + told.comment() + after)
    assert rest == before.replace(b":", b"") + after
    assert found is not None
    for one in (found, of_header(told.header())):
        assert one is not None
        assert abs(one.queue_s - queue) + abs(one.decode_s - decode) < 2e-6
        assert abs(one.prefill_s - prefill) < 1e-6
    assert of_header("cache;desc=hit, db;dur=53") is None
    assert cut(after.replace(b":", b"")) == (after.replace(b":", b""), None)
