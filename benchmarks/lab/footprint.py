"""How much memory one worker takes: a process of its own, read from the operating system.

Knows the worker's command line and Linux's /proc; knows no model.
"""

from __future__ import annotations

import http.client
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.lab.conditions import ROOT
from benchmarks.lab.report import MeasurementFailed
from benchmarks.lab.stack import ask_health, stop
from command.machine import free_ports

_HOST = "127.0.0.1"
_POLL_S = 0.05
_READY_LIMIT_S = 300.0
_ANSWER_LIMIT_S = 300.0
_SETTLE_S = 1.0
_QUOTED_BYTES = 2000
_FORGET_PEAK = "5"  # what /proc/PID/clear_refs takes to begin a new peak (proc(5))


@dataclass(frozen=True, slots=True)
class Footprint:
    """Resident memory in 10^6 bytes: the peak of each phase, and what stays."""

    peak_loading: float
    loaded: float
    peak_serving: float
    rest: float
    files: float  # of what stays, pages of libraries and other files
    kv: float  # of the pool, as the worker says
    held: Mapping[str, int]  # layers by the way in which they are held


def footprint(runtime: Mapping[str, Any], prompt_tokens: int, answer_tokens: int) -> Footprint:
    """A worker with this `runtime` part of a policy is started, asked once, and stopped.

    Raises MeasurementFailed.
    """
    (port,) = free_ports(1, _HOST)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        policy = Path(folder) / "policy.yaml"
        policy.write_text(json.dumps({"version": 1, "runtime": dict(runtime)}), encoding="utf-8")
        worker = subprocess.Popen(
            [sys.executable, "-m", "runtime", str(policy), "--port", str(port)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            facts = _await_ready(worker, port, log)
            peak_loading, loaded, _ = _memory(worker.pid)
            Path(f"/proc/{worker.pid}/clear_refs").write_text(_FORGET_PEAK, encoding="ascii")
            _ask(port, prompt_tokens, answer_tokens)
            time.sleep(_SETTLE_S)
            peak_serving, rest, files = _memory(worker.pid)
        finally:
            stop(worker)
    kv = facts["kv_bytes"] / 1e6
    return Footprint(peak_loading, loaded, peak_serving, rest, files, kv, facts["weights"])


def _await_ready(worker: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> dict[str, Any]:
    deadline = time.monotonic() + _READY_LIMIT_S
    while time.monotonic() < deadline and worker.poll() is None:
        status, health = ask_health(port)
        if status == 200:
            return health
        time.sleep(_POLL_S)
    log.seek(max(0, log.seek(0, 2) - _QUOTED_BYTES))
    said = log.read().decode("utf-8", "replace").strip()
    raise MeasurementFailed(f"a worker was not ready (exit code {worker.poll()}):\n{said}")


def _ask(port: int, prompt_tokens: int, answer_tokens: int) -> None:
    draw = random.Random(0)
    name = _call(port, "GET", "/v1/models")["data"][0]["id"]
    body = {
        "model": name,
        "prompt": [draw.randrange(256, 4096) for _ in range(prompt_tokens)],
        "max_tokens": answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = _call(port, "POST", "/v1/completions", body)
    if answer["usage"]["completion_tokens"] != answer_tokens:
        raise MeasurementFailed(f"a worker was asked for {answer_tokens} tokens: {answer}")


def _call(port: int, method: str, path: str, body: Any = None) -> Any:
    connection = http.client.HTTPConnection(_HOST, port, timeout=_ANSWER_LIMIT_S)
    try:
        connection.request(method, path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
    finally:
        connection.close()
    if response.status != 200:
        raise MeasurementFailed(f"a worker answered {path} with {response.status}: {answer}")
    return answer


def _memory(pid: int) -> tuple[float, float, float]:
    """Resident memory in 10^6 bytes: the peak since the last one was forgotten, now, and how much
    of that is pages of files."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        raise MeasurementFailed("memory is read from /proc, which this system lacks") from None
    told = dict(line.split(":", 1) for line in lines)
    names = ("VmHWM", "VmRSS", "RssFile")
    peak, now, files = (int(told[name].split()[0]) * 1024 / 1e6 for name in names)
    return peak, now, files
