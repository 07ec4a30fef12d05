"""Spans on their way to a collector: OTLP, protobuf over HTTP, from a thread of its own.

Whoever hands spans over waits for nothing: a collector that is slow or dead loses spans, which are
counted. Knows the protocol; what is sent, others decide. The one importer of OpenTelemetry.
"""

from __future__ import annotations

import http.client
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from telemetry.trace import EVENTS_MAX, Span

log = logging.getLogger("headgate.telemetry")

PATH = "/v1/traces"
EVERY_S = 0.5  # what has come goes together
BATCH_TRACES = 256
WAITING_MAX = 4096  # traces in front of the thread; beyond they are lost
TIMEOUT_S = 5.0  # of one request to the collector
TRIES = 3
AGAIN_S = 0.5  # before the second try, twice that before the third
AGAIN_STATUS = frozenset((429, 502, 503, 504))  # by the protocol, worth another try
COMPLAIN_S = 60.0  # between complaints in the log
END_S = 2.0  # for what is left at the end
KINDS = {"INTERNAL": 1, "SERVER": 2, "CLIENT": 3}
STATES = {"UNSET": 0, "OK": 1, "ERROR": 2}

Make = Callable[[], Iterable[Span]]  # spans are made in the thread, too


class OtlpMissing(Exception):
    """What writes the protocol is not installed."""


@dataclass(frozen=True, slots=True)
class Collector:
    """Where spans go."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def named(cls, endpoint: str | None, environ: Mapping[str, str]) -> Collector | None:
        """By a base URL, else by OpenTelemetry's own variables; None where neither names one."""
        headers = dict(_pairs(environ.get("OTEL_EXPORTER_OTLP_HEADERS", "")))
        if endpoint is None and (whole := environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")):
            return cls(whole, headers)
        base = endpoint or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        return cls(base.rstrip("/") + PATH, headers) if base else None


def _pairs(text: str) -> Iterable[tuple[str, str]]:
    """`a=1,b=2`, the values percent-encoded."""
    for pair in text.split(","):
        name, is_one, value = pair.partition("=")
        if is_one and name.strip():
            yield name.strip().lower(), unquote(value.strip())


class Exporter:
    """Sends what it is given to one collector, until it is closed."""

    def __init__(
        self,
        collector: Collector,
        resource: Mapping[str, Any] | None = None,
        *,
        waiting_max: int = WAITING_MAX,
    ) -> None:
        """`resource`: what is true of every span's process. Raises OtlpMissing."""
        self.collector = collector
        self.exported = self.lost = self.refused = 0  # spans; traces that found the queue full
        self._encode = _Protobuf(resource or {}).encode
        self._waiting: deque[Make] = deque()
        self._waiting_max = waiting_max
        self._wake = threading.Event()
        self._closing = False
        self._complained = float("-inf")
        self._thread = threading.Thread(target=self._work, name="otlp", daemon=True)
        self._thread.start()

    def put(self, make: Make) -> None:
        """Takes the spans of one trace. Any thread; returns at once."""
        if len(self._waiting) >= self._waiting_max:
            self.refused += 1
            return
        self._waiting.append(make)

    def told(self) -> dict[str, int]:
        """What became of them: spans, and `refused` traces."""
        return {"exported": self.exported, "lost": self.lost, "refused": self.refused}

    def close(self) -> None:
        """Sends what is left, within a moment."""
        self._closing = True
        self._wake.set()
        self._thread.join(END_S)

    # ---- the thread -----------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._closing:
            self._wake.wait(EVERY_S)
            self._send_waiting()
        self._send_waiting()

    def _send_waiting(self) -> None:
        while self._waiting:
            spans: list[Span] = []
            for _ in range(min(BATCH_TRACES, len(self._waiting))):
                try:
                    spans += self._waiting.popleft()()
                except Exception:  # one trace that cannot be told costs no other one
                    log.exception("a trace could not be made")
                time.sleep(0)  # whoever serves may go on after each
            if spans:
                self._deliver(spans)

    def _deliver(self, spans: Sequence[Span]) -> None:
        body = self._encode(spans)
        why = ""
        for attempt in range(TRIES):
            if attempt and self._wake_after(AGAIN_S * attempt):
                break
            why, again = self._post(body)
            if not why:
                self.exported += len(spans)
                return
            if not again:
                break
        self.lost += len(spans)
        if time.monotonic() - self._complained > COMPLAIN_S:
            self._complained = time.monotonic()
            log.warning("%d spans were lost: %s: %s", len(spans), self.collector.url, why)

    def _wake_after(self, pause_s: float) -> bool:
        """Waits, unless all is to end."""
        return self._wake.wait(pause_s) and self._closing

    def _post(self, body: bytes) -> tuple[str, bool]:
        """What went wrong, "": nothing; and whether another try may help."""
        headers = {**self.collector.headers, "content-type": "application/x-protobuf"}
        request = urllib.request.Request(self.collector.url, body, headers, method="POST")  # noqa: S310  # http(s)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
                answer.read()
        except urllib.error.HTTPError as error:
            return f"it answered {error.code}", error.code in AGAIN_STATUS
        except (OSError, http.client.HTTPException, ValueError) as error:
            return str(error) or type(error).__name__, True
        return "", False


def exporter(
    endpoint: str | None, service: str, environ: Mapping[str, str] | None = None
) -> Exporter | None:
    """By a policy's endpoint and the environment; None where neither names a collector, or where
    it cannot be spoken to, which is logged."""
    environ = os.environ if environ is None else environ
    collector = Collector.named(endpoint, environ)
    if collector is None:
        return None
    resource = dict(_pairs(environ.get("OTEL_RESOURCE_ATTRIBUTES", "")))
    resource["process.pid"] = str(os.getpid())
    try:
        return Exporter(collector, {"service.namespace": "headgate", **resource})
    except OtlpMissing as error:
        log.warning("no trace of %s is sent to %s: %s", service, collector.url, error)
        return None


# ---- protobuf -----------------------------------------------------------------------------------


class _Protobuf:
    """Writes spans as the body of a request; by service, each with its resource."""

    def __init__(self, resource: Mapping[str, Any]) -> None:
        """Raises OtlpMissing."""
        try:
            from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
            from opentelemetry.proto.common.v1 import common_pb2
        except ImportError as error:
            missing = f"{error.name} is missing: pip install 'headgate[otel]'"
            raise OtlpMissing(missing) from None
        self._request = trace_service_pb2.ExportTraceServiceRequest
        self._common = common_pb2
        self._resource = resource

    def encode(self, spans: Sequence[Span]) -> bytes:
        request = self._request()
        places: dict[str, Any] = {}
        for span in spans:
            if span.service not in places:
                group = request.resource_spans.add()
                named = {"service.name": span.service, **self._resource}
                group.resource.attributes.extend(self._pairs(named))
                places[span.service] = group.scope_spans.add()
                places[span.service].scope.name = "headgate"
            self._fill(places[span.service].spans.add(), span)
        return bytes(request.SerializeToString())

    def _fill(self, told: Any, span: Span) -> None:
        told.trace_id, told.span_id = bytes.fromhex(span.trace_id), bytes.fromhex(span.span_id)
        told.parent_span_id = bytes.fromhex(span.parent_id)
        told.name, told.kind, told.flags = span.name, KINDS[span.kind], span.flags & 0xFF
        told.trace_state = span.tracestate
        told.start_time_unix_nano, told.end_time_unix_nano = ns(span.start_s), ns(span.end_s)
        told.attributes.extend(self._pairs(span.attributes))
        told.status.code, told.status.message = STATES[span.status], span.message
        for event in span.events[:EVENTS_MAX]:
            pairs = self._pairs(event.attributes)
            told.events.add(name=event.name, time_unix_nano=ns(event.at_s), attributes=pairs)
        told.dropped_events_count = max(0, len(span.events) - EVENTS_MAX)

    def _pairs(self, given: Mapping[str, Any]) -> list[Any]:
        pair = self._common.KeyValue
        return [pair(key=name, value=self._value(one)) for name, one in given.items()]

    def _value(self, given: Any) -> Any:
        value = self._common.AnyValue
        if isinstance(given, bool):
            return value(bool_value=given)
        if isinstance(given, int):
            return value(int_value=given)
        if isinstance(given, float):
            return value(double_value=given)
        if isinstance(given, list | tuple):
            several = [self._value(one) for one in given]
            return value(array_value=self._common.ArrayValue(values=several))
        return value(string_value=str(given))


def ns(at_s: float) -> int:
    return round(at_s * 1e9)
