"""A collector of a test's own: takes OTLP over HTTP, decodes it by OpenTelemetry's classes."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass
class Received:
    """A span as it came."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    service: str
    kind: int
    start_ns: int
    end_ns: int
    flags: int
    error: bool
    attributes: dict[str, Any]
    events: list[str] = field(default_factory=list)
    event_attributes: list[dict[str, Any]] = field(default_factory=list)
    links: list[str] = field(default_factory=list)  # ids of spans

    @property
    def s(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


class Collector:
    """`refuse`: it answers everything with this status instead, from which `location` leads on."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.headers: dict[str, str] = {}
        self.requests = 0
        self.refuse: int | None = None
        self.location = ""
        self.url = ""

    def traces(self) -> dict[str, list[Received]]:
        found: dict[str, list[Received]] = defaultdict(list)
        for span in list(self.spans):
            found[span.trace_id].append(span)
        return found

    def take(self, body: bytes) -> None:
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = attributes(group.resource.attributes)["service.name"]
            for scope in group.scope_spans:
                self.spans += [received(service, span) for span in scope.spans]


def received(service: str, span: Any) -> Received:
    return Received(
        span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.name, service,
        span.kind, span.start_time_unix_nano, span.end_time_unix_nano, span.flags,
        span.status.code == 2, attributes(span.attributes), [one.name for one in span.events],
        [attributes(one.attributes) for one in span.events],
        [one.span_id.hex() for one in span.links],
    )  # fmt: skip


def attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: value(pair.value) for pair in pairs}


def value(given: Any) -> Any:
    kind = given.WhichOneof("value")
    if kind == "array_value":
        return [value(one) for one in given.array_value.values]
    return getattr(given, kind)


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.requests += 1
            collector.headers = {name.lower(): text for name, text in self.headers.items()}
            if collector.refuse is None and self.path == "/v1/traces":
                collector.take(body)
            self.send_response(collector.refuse or 200)
            self.send_header("content-length", "0")
            if collector.location:
                self.send_header("location", collector.location)
            self.end_headers()

        def do_GET(self) -> None:
            collector.requests += 1
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def whole(spans: list[Received]) -> Received:
    """The root of a trace that is one tree: every other span's parent is in it."""
    known = {span.span_id for span in spans}
    assert len(known) == len(spans), "a span came twice"
    roots = [span for span in spans if span.parent_id not in known]
    assert len(roots) == 1, f"not one tree: {[(one.service, one.name) for one in roots]}"
    return roots[0]
