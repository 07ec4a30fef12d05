"""Spans on their way to a collector: OTLP, protobuf over HTTP, from a thread of its own.

Whoever hands spans over makes bytes of them and waits for nothing: a collector that is slow or dead
loses spans, which are counted. Knows HTTP and when to try again; what is sent, others decide.
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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from telemetry import protobuf
from telemetry.trace import Span

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

Make = Callable[[], Iterable[Span]]


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


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would turn spans into a GET without any, and take keys elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_Stay)


class Exporter:
    """Sends what it is given to one collector, until it is closed."""

    def __init__(
        self,
        collector: Collector,
        resource: Mapping[str, Any] | None = None,
        *,
        waiting_max: int = WAITING_MAX,
    ) -> None:
        """`resource`: what is true of every span's process."""
        self.collector = collector
        self.exported = self.lost = self.refused = 0  # spans; traces that found the queue full
        self._resource = resource or {}
        self._waiting: deque[tuple[int, protobuf.Written]] = deque()
        self._waiting_max = waiting_max
        self._wake = threading.Event()
        self._closing = False
        self._complained = float("-inf")
        self._thread = threading.Thread(target=self._work, name="otlp", daemon=True)
        self._thread.start()

    def put(self, make: Make) -> None:
        """Takes the spans of one trace, as bytes at once: a thread that made them beside whoever
        serves would cost both more than it takes here, since only one of them can run. Any thread.
        """
        if len(self._waiting) >= self._waiting_max:
            self.refused += 1
            return
        spans: list[Span] = []
        try:
            spans += make()
            told = protobuf.written(spans)
        except Exception:  # one trace that cannot be told costs no other one
            self.lost += len(spans) or 1
            log.exception("a trace could not be made")
        else:
            self._waiting.append((len(spans), told))

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
            some = [self._waiting.popleft() for _ in range(min(BATCH_TRACES, len(self._waiting)))]
            count = sum(spans for spans, _ in some)
            try:
                self._deliver(count, protobuf.request([told for _, told in some], self._resource))
            except Exception:  # a batch does not end the thread, after which nothing would be sent
                self.lost += count
                log.exception("%d spans could not be sent", count)

    def _deliver(self, count: int, body: bytes) -> None:
        why = ""
        for attempt in range(TRIES):
            if attempt and self._wake_after(AGAIN_S * attempt):
                break
            why, again = self._post(body)
            if not why:
                self.exported += count
                return
            if not again:
                break
        self.lost += count
        if time.monotonic() - self._complained > COMPLAIN_S:
            self._complained = time.monotonic()
            log.warning("%d spans were lost: %s: %s", count, self.collector.url, why)

    def _wake_after(self, pause_s: float) -> bool:
        """Waits, unless all is to end."""
        return self._wake.wait(pause_s) and self._closing

    def _post(self, body: bytes) -> tuple[str, bool]:
        """What went wrong, "": nothing; and whether another try may help."""
        headers = {**self.collector.headers, "content-type": "application/x-protobuf"}
        request = urllib.request.Request(self.collector.url, body, headers, method="POST")  # noqa: S310  # http(s)
        try:
            with _opener.open(request, timeout=TIMEOUT_S) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            return f"it answered {error.code}", error.code in AGAIN_STATUS
        except (OSError, http.client.HTTPException, ValueError) as error:
            return str(error) or type(error).__name__, True
        return "", False


def exporter(endpoint: str | None, environ: Mapping[str, str] | None = None) -> Exporter | None:
    """By a policy's endpoint and the environment; None where neither names a collector."""
    environ = os.environ if environ is None else environ
    collector = Collector.named(endpoint, environ)
    if collector is None:
        return None
    resource = dict(_pairs(environ.get("OTEL_RESOURCE_ATTRIBUTES", "")))
    resource["process.pid"] = str(os.getpid())
    return Exporter(collector, {"service.namespace": "headgate", **resource})
