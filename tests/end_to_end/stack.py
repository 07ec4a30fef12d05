"""The real stack as processes: one worker with the pocket model, one gateway in front of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from command.machine import free_ports
from tests.collector import Collector, collecting

ROOT = Path(__file__).parents[2]
START_S = 300.0  # against hanging: where others use the cores, torch alone imports for a minute
STOP_S = 20.0
LIMIT_S = 120.0  # against hanging, too: what a program is to spend is told in CPU time
BODY_TIMEOUT_S = 1.5
PROBE = httpx.Client(timeout=10)  # one for all: a client's making costs more than its request
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
VIOLATIONS = "headgate_token_ledger_violations_total{"
POLICY = f"""\
version: 1
gateway:
  body_timeout_s: {BODY_TIMEOUT_S}
  drain_s: 5.0
runtime:
  model: pocket
  kv_tokens: 8192
  threads: 1
"""
# Children find our packages wherever they start; one thread each, so that tests share a machine.
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}


@dataclass(frozen=True)
class Program:
    """A process that serves at `url`; all that it prints goes to `log`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def health(self) -> dict[str, Any]:
        return dict(PROBE.get(f"{self.url}/health").json())

    def cpu_s(self) -> float:
        """CPU time so far, of all threads: what a busy machine does not stretch."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def rss_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)


@dataclass(frozen=True)
class Stack:
    """Both programs, and requests to the gateway."""

    gateway: Program
    worker: Program
    client: httpx.Client = field(repr=False)
    collector: Collector = field(repr=False)  # of both programs' traces

    @property
    def port(self) -> int:
        return int(self.gateway.url.rsplit(":", 1)[1])

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """A request with what every request has, unless `body` says otherwise."""
        return self.client.post(self.gateway.url + path, json=DEFAULTS[path] | body)

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """The JSON answer of a request that must succeed."""
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def works(self) -> bool:
        """Both programs live and answer."""
        assert self.gateway.process.poll() is None, self.gateway.log.read_text()
        assert self.worker.process.poll() is None, self.worker.log.read_text()
        answer = self.ask(CHAT, max_tokens=1)
        return bool(answer["usage"]["completion_tokens"] == 1)


DEFAULTS: dict[str, dict[str, Any]] = {
    CHAT: {"model": "pocket", "messages": [{"role": "user", "content": "hi"}], "temperature": 0},
    COMPLETIONS: {"model": "pocket", "prompt": "Order 12 is", "temperature": 0},
}


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Started once; at the end both must stop by themselves, with every block back, quietly, and
    the tokens of whatever tests asked for must add up."""
    folder = tmp_path_factory.mktemp("stack")
    policy = folder / "policy.yaml"
    front, back = free_ports(2)
    with contextlib.ExitStack() as stop:
        collector = stop.enter_context(collecting())
        policy.write_text(f"{POLICY}tracing: {{endpoint: '{collector.url}', keep: 64}}\n")
        worker = stop.enter_context(program(folder, "runtime", policy, back))
        replica = ("--replica", worker.url)
        gateway = stop.enter_context(program(folder, "gateway", policy, front, *replica))
        for one in (worker, gateway):
            until(lambda: ready(one), START_S, lambda: one.log.read_text())  # noqa: B023
        yield Stack(gateway, worker, stop.enter_context(httpx.Client(timeout=60)), collector)
        assert_idle(worker)
        assert miscounts(gateway) == miscounts(worker) == {}


def miscounts(one: Program) -> dict[str, float]:
    """Requests whose tokens do not add up, by what does not hold."""
    lines = PROBE.get(f"{one.url}/metrics").text.splitlines()
    counts = (line.rsplit(" ", 1) for line in lines if line.startswith(VIOLATIONS))
    return {series: float(count) for series, count in counts if float(count)}


@contextlib.contextmanager
def program(folder: Path, module: str, policy: Path, port: int, *more: str) -> Iterator[Program]:
    """A program that is ended by SIGTERM: it drains, and says so by its exit code."""
    with started(folder, module, policy, port, *more) as one:
        yield one
        one.process.terminate()
        code = one.process.wait(STOP_S)
    assert code == 0, f"{module} ended with {code}:\n{one.log.read_text()}"
    assert "Traceback" not in one.log.read_text(), one.log.read_text()


@contextlib.contextmanager
def started(folder: Path, module: str, policy: Path, port: int, *more: str) -> Iterator[Program]:
    """`python -m module policy --port port`, which a test may kill, and which is in the end."""
    log = folder / f"{module}-{port}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(policy), "--port", str(port), *more],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
        )
    try:
        yield Program(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.kill()
        process.wait()


def ready(one: Program) -> bool:
    assert one.process.poll() is None, f"it ended early:\n{one.log.read_text()}"
    try:
        return PROBE.get(f"{one.url}/health").status_code == 200
    except httpx.TransportError:
        return False


def until(holds: Callable[[], bool], limit_s: float, why: Callable[[], str]) -> float:
    """Asks until it holds; how many seconds that took. It asks less and less often: on a machine
    with few cores, asking would take them from what is waited for."""
    started = time.perf_counter()
    pause_s = 0.002
    while not holds():
        assert time.perf_counter() - started < limit_s, why()
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, 0.05)
    return time.perf_counter() - started


def idle(worker: Program) -> bool:
    """True when no request is left in the worker, and no block is lost."""
    health = worker.health()
    blocks = health["blocks"]
    quiet = not (health["running"] or health["waiting"] or health["streams"] or blocks["in_use"])
    return quiet and blocks["free"] + blocks["cached"] == blocks["total"]


def assert_idle(worker: Program, limit_s: float = LIMIT_S) -> float:
    """Waits until the worker is idle; the seconds that it took."""
    return until(lambda: idle(worker), limit_s, lambda: f"not idle: {worker.health()}")


def events(body: bytes) -> list[Any]:
    """The JSON payloads of a stream; the terminator as its text."""
    lines = [line for line in body.split(b"\n") if line.startswith(b"data: ")]
    texts = [line.removeprefix(b"data: ") for line in lines]
    return ["[DONE]" if text == b"[DONE]" else json.loads(text) for text in texts]
