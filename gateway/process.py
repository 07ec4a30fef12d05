"""What this process takes of its machine, by the names of Prometheus' own clients; read from /proc,
so that where there is none memory, files and start are absent. Knows nothing of requests."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

_SELF = Path("/proc/self")
_START = 19  # of what follows the name in /proc/PID/stat: ticks since the machine started


def cpu_s() -> float:
    """Seconds of processors, user's and system's."""
    took = os.times()
    return took.user + took.system


def resident_bytes() -> float | Mapping[tuple[str, ...], float]:
    """Memory that is really there."""
    try:
        pages = int((_SELF / "statm").read_text().split()[1])
    except OSError:
        return {}
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def open_files() -> float | Mapping[tuple[str, ...], float]:
    """Connections are files, too."""
    try:
        return float(sum(1 for _ in (_SELF / "fd").iterdir()))
    except OSError:
        return {}


@cache
def started_at() -> float | Mapping[tuple[str, ...], float]:
    """In seconds since 1970; once, so that a clock that is set does not move it."""
    try:
        # The name, in brackets, may have blanks and brackets of its own.
        ticks = int((_SELF / "stat").read_text().rpartition(")")[2].split()[_START])
    except OSError:
        return {}
    running_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - running_s
