"""The gateway process itself: what it takes, shares, records and sends."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

from gateway import process
from gateway.metrics.family import PREFIX, Family, Reading, Values, by_name


def _store_up(r: Reading) -> Values:
    far = r.edge.state.far
    return {} if far is None else float(far.up)


def _outages(r: Reading) -> Values:
    far = r.edge.state.far
    return {} if far is None else far.outages


def _recorded(r: Reading) -> Values:
    return by_name(r.edge.recorder.told()) if r.edge.recorder is not None else {}


@cache
def _version() -> str:
    try:
        return version("headgate")
    except PackageNotFoundError:  # it runs from a folder that was never installed
        return "0"


GAUGES = (
    Family(
        PREFIX + "info",
        "1, with what serves as labels.",
        lambda _: {(_version(), python_version()): 1.0},
        ("version", "python"),
    ),
    Family(
        "process_resident_memory_bytes",
        "Memory of this process that is really there.",
        lambda _: process.resident_bytes(),
    ),
    Family(
        "process_start_time_seconds",
        "When this process began, in seconds since 1970.",
        lambda _: process.started_at(),
    ),
    Family(
        "process_open_fds",
        "Files and connections that it has open.",
        lambda _: process.open_files(),
    ),
    Family(
        PREFIX + "store_up",
        "1 while the shared store answers; absent without one.",
        _store_up,
    ),
)

COUNTERS = (
    Family(
        "process_cpu_seconds",
        "Seconds of processors that this process took.",
        lambda _: process.cpu_s(),
    ),
    Family(
        PREFIX + "store_outages",
        "Times that the shared store was lost.",
        _outages,
    ),
    Family(
        PREFIX + "records",
        "Requests for the recorder, by what became of them.",
        _recorded,
        ("outcome",),
    ),
    Family(
        PREFIX + "trace_spans",
        "Spans for a collector, by what became of them; `refused` are traces that found no room.",
        lambda r: by_name(r.edge.tracer.told()),
        ("outcome",),
    ),
)
