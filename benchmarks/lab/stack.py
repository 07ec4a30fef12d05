"""`headgate serve` as a user starts it: how soon it is ready, what it holds and what it costs."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.lab.conditions import ROOT
from benchmarks.lab.report import MeasurementFailed
from command.machine import free_ports

_HOST = "127.0.0.1"
_CLOCK_SCHED = 2  # of a process's three clocks, linux/posix-timers.h
_POLL_S = 0.02
_READY_LIMIT_S = 180.0
_STOP_LIMIT_S = 30.0
_LOG_TAIL_BYTES = 2000


@dataclass(frozen=True, slots=True)
class Stack:
    """A served policy: the gateway and its workers."""

    ready_s: float  # from the start of the command until all workers are healthy
    url: str
    worker_url: str
    model: str
    worker_facts: dict[str, Any]  # what the worker's own /health says
    gateway: psutil.Process
    workers: tuple[psutil.Process, ...]

    @property
    def worker(self) -> psutil.Process:
        """The first one."""
        return self.workers[0]


@contextlib.contextmanager
def serve(policy: Path | None = None, key: str = "") -> Iterator[Stack]:
    """Starts a policy, or the one that ships, on a free port; drains it in the end. `key`: of a
    tenant of its, where it has some."""
    (port,) = free_ports(1, _HOST)
    environment = os.environ | {"HEADGATE_PORT": str(port)}
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        command = subprocess.Popen(
            [sys.executable, "headgate.py", "serve", *([str(policy)] if policy else [])],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            health = _await_ready(command, port, log, key)
            yield _look_at(command, port, time.perf_counter() - started, health)
        finally:
            stop(command)


def _await_ready(
    command: subprocess.Popen[bytes], port: int, log: IO[bytes], key: str
) -> dict[str, Any]:
    deadline = time.monotonic() + _READY_LIMIT_S
    while time.monotonic() < deadline:
        status, health = ask_health(port, key)
        if status == 200 and all(one["healthy"] for one in health["replicas"]):
            return health
        if command.poll() is not None:
            break
        time.sleep(_POLL_S)
    log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
    said = log.read().decode("utf-8", "replace").strip()
    ended = f"it ended with exit code {command.returncode}" if command.returncode else "no answer"
    raise MeasurementFailed(f"`headgate serve` was not ready: {ended}\n{said}")


def _look_at(
    command: subprocess.Popen[bytes], port: int, ready_s: float, health: dict[str, Any]
) -> Stack:
    replica = health["replicas"][0]
    ports = [int(one["url"].rpartition(":")[2]) for one in health["replicas"]]
    _, facts = ask_health(ports[0])
    return Stack(
        ready_s,
        f"http://{_HOST}:{port}",
        replica["url"],
        replica["models"][0],
        facts,
        _child(command, port),
        tuple(_child(command, worker_port) for worker_port in ports),
    )


def _child(command: subprocess.Popen[bytes], port: int) -> psutil.Process:
    """The child that was told this port."""
    for process in psutil.Process(command.pid).children(recursive=True):
        arguments = process.cmdline()
        if "--port" in arguments and arguments[arguments.index("--port") + 1] == str(port):
            return process
    raise MeasurementFailed(f"`headgate serve` has no child that was started with --port {port}")


def ask_health(port: int, key: str = "") -> tuple[int, dict[str, Any]]:
    """Status and body of GET /health; (0, {}) while nothing answers."""
    connection = http.client.HTTPConnection(_HOST, port, timeout=2)
    try:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        connection.request("GET", "/health", headers=headers)
        response = connection.getresponse()
        health: dict[str, Any] = json.loads(response.read())
        return response.status, health
    except (OSError, http.client.HTTPException, ValueError):
        return 0, {}
    finally:
        connection.close()


def stop(command: subprocess.Popen[bytes]) -> None:
    """Asks a process to end, and ends it when it does not."""
    if command.poll() is None:
        command.send_signal(signal.SIGTERM)
    try:
        command.wait(_STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        command.kill()
        command.wait()


def cpu_s(process: psutil.Process) -> float:
    """User and system CPU time of a process so far: by its own clock, as exact as the scheduler's,
    where there is one (Linux); else in hundredths of a second."""
    if sys.platform == "linux":
        try:
            return time.clock_gettime((~process.pid << 3) | _CLOCK_SCHED)
        except OSError:
            raise psutil.NoSuchProcess(process.pid) from None
    times = process.cpu_times()
    return float(times.user + times.system)


def resident_mb(process: psutil.Process) -> float:
    """Resident memory in 10^6 bytes, pages shared with other processes included."""
    return float(process.memory_info().rss / 1e6)
