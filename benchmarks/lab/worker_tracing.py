"""`python -m benchmarks.lab.worker_tracing NAME=SHARE:URL ...`: what a worker's traces take.

Calls what its server and its engine call of tracing for a request, in the same order, without
either. In between, as many bytes go through the caches as a step of a small model reads, and other
requests are parsed: alone it takes half. Imports torch as a worker does, so it is a program of its
own; it says JSON.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.tracing import Tracing
from runtime.inbox import Order
from runtime.sequence import Sampling
from runtime.tracing import Tracer
from runtime.wire import parse_chat
from telemetry.otlp import exporter

REQUESTS = 400
STEPS = 16  # of one answer, in each of which guesses are verified
CACHES_BYTES = 2**25
HEADERS = (
    (b"host", b"127.0.0.1"), (b"content-type", b"application/json"),
    (b"x-request-id", b"req_0123456789abcdef01234567"), (b"x-headgate-timing", b"1"),
)  # fmt: skip
TRACEPARENT = b"00-%032x-%016x-%02x"
BODY = (
    b'{"model": "pocket", "messages": [{"role": "user", "content": "a word or two"}], '
    b'"max_tokens": 200, "temperature": 0.2, "stream": true}'
)


class Stopwatch:
    """Microseconds of this thread inside `with`, by the processor's clock."""

    def __init__(self) -> None:
        self.us: list[float] = []
        self._began_ns = 0

    def __enter__(self) -> None:
        self._began_ns = time.thread_time_ns()

    def __exit__(self, *_: object) -> None:
        self.us.append((time.thread_time_ns() - self._began_ns) / 1000)


def main() -> int:
    told = {}
    for argument in sys.argv[1:]:
        name, _, rest = argument.partition("=")
        share, _, url = rest.partition(":")
        told[name] = measure(Tracer(Tracing(share=float(share)), exporter(url)), share == "1")
    print(json.dumps(told))
    return 0


def measure(tracer: Tracer, sampled: bool) -> dict[str, float]:
    """Microseconds of the processor: of a request without its steps, and of one step."""
    caches = np.zeros(CACHES_BYTES, np.uint8)
    begin, track, step, end, nothing = (Stopwatch() for _ in range(5))
    before_s = _others_s()
    for number in range(1, REQUESTS + 1):
        headers = (*HEADERS, (b"traceparent", TRACEPARENT % (number, number, 2 | sampled)))
        given = [Order((1, 2, 3), Sampling())]
        _meanwhile(caches)
        with begin:
            visit = tracer.begin(headers)
        with track:
            (order,) = visit.tracked(given)
        noted: Any = order.track
        noted.sequence = _sequence()
        _meanwhile(caches)
        with step:
            for _ in range(STEPS):
                noted.guess(time.monotonic(), 4, 2)
        _meanwhile(caches)
        with end:
            visit.phases().header()
            tracer.end(visit)
        _meanwhile(caches)
        with nothing:
            pass
    tracer.close()
    clock_us = median(nothing.us)
    requests_us = [sum(of_one) for of_one in zip(begin.us, track.us, end.us, strict=True)]
    sent_us = 1e6 * (_others_s() - before_s) / REQUESTS
    return {
        "us_per_request": round(median(requests_us) - 3 * clock_us + sent_us, 1),
        "us_per_step": round((median(step.us) - clock_us) / STEPS, 2),
    }


def _meanwhile(caches: NDArray[np.uint8]) -> None:
    """What a worker does between."""
    caches += 1
    for _ in range(3):
        parse_chat(BODY)


def _others_s() -> float:
    """Time of all threads but this one: of the one that sends."""
    return time.process_time() - time.thread_time()


def _sequence() -> Any:
    """As much of a sequence as is noted of one."""
    now = time.monotonic()
    times = SimpleNamespace(arrived=now, admitted=now, first_token=now, last_token=now)
    counts = {"prompt_tokens": 16, "cached": 0, "answer_tokens": 200, "preemptions": 0}
    return SimpleNamespace(times=times, **counts)


if __name__ == "__main__":
    sys.exit(main())
