"""What a worker takes from a request's headers about the trace that it belongs to."""

from __future__ import annotations

import pytest

from policies.tracing import Tracing
from runtime.tracing import Tracer

PARENT = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03"
STATE = (b"tracestate", b"a=1")


@pytest.mark.parametrize(
    ("headers", "joins", "state"),
    [
        ([(b"traceparent", PARENT), STATE, (b"tracestate", b"b=2")], True, "a=1,b=2"),
        ([(b"traceparent", PARENT), (b"tracestate", b"\xff=1")], True, ""),
        ([STATE], False, ""),
        ([(b"traceparent", b"garbage"), STATE], False, ""),
        ([(b"traceparent", PARENT), (b"traceparent", PARENT), STATE], False, ""),
    ],
    ids=["lists", "bytes", "state alone", "garbage", "two parents"],
)
def test_a_worker_joins_one_valid_trace_and_nothing_else(
    headers: list[tuple[bytes, bytes]], joins: bool, state: str
) -> None:
    """State of what it does not join is dropped: it is of another trace."""
    visit = Tracer(Tracing()).begin(headers)
    assert (visit.context.trace_id == PARENT.decode().split("-")[1]) == joins
    assert visit.tracestate == state
