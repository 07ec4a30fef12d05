"""A rollout over real processes: gateway, workers, controller, and what is killed of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from evals.rollout import LEASE_S
from policies.devices import devices
from tests.end_to_end.stack import ENVIRONMENT, START_S, until
from tests.end_to_end.test_serve import served
from tests.policies.gated_world import World, build

POLICY = """\
version: 1
gateway: {drain_s: 1.0, resume: auto}
runtime: {model: pocket, kv_tokens: 4096, threads: 1, device: cpu}
"""
ROLLOUT = "rollout: {shadow: 5, steps: [50%], min_step: 1s}\nstats: {alpha: 0.2}\n"


@dataclass
class Traffic:
    """Two clients that ask all the time, each request in a session of its own."""

    url: str
    statuses: set[int] = field(default_factory=set)
    last_by_candidate: float = 0.0
    by_candidate: int = 0
    stopped: bool = False

    def run(self, name: int) -> None:
        body = {
            "model": "pocket", "max_tokens": 3, "temperature": 0,
            "messages": [{"role": "user", "content": "Say hello."}],
        }  # fmt: skip
        with httpx.Client(base_url=self.url, timeout=60) as client:
            for at in range(10**6):
                if self.stopped:
                    return
                headers = {"x-session-id": f"{name} {at}"}
                answer = client.post("/v1/chat/completions", json=body, headers=headers)
                self.statuses.add(answer.status_code)
                if "x-headgate-variant" in answer.headers:
                    self.by_candidate += 1
                    self.last_by_candidate = time.monotonic()


@contextmanager
def traffic(url: str) -> Iterator[Traffic]:
    it = Traffic(url)
    threads = [threading.Thread(target=it.run, args=(name,)) for name in range(2)]
    for one in threads:
        one.start()
    try:
        yield it
    finally:
        it.stopped = True
        for one in threads:
            one.join()


@contextmanager
def controller(hypothesis: Path, url: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`headgate rollout` with workers of its own."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "headgate", "rollout", str(hypothesis), "--url", url],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def world(tmp_path: Path) -> World:
    """The pocket model; its cache in int8 has passed."""
    world = build(tmp_path)
    world.policy.write_text(POLICY)
    file = world.hypothesis("kv", "{runtime.kv: int8}")
    file.write_text(file.read_text() + ROLLOUT)
    world.judge("kv", at=time.time(), devices=devices())
    return world


def test_whatever_is_killed_no_client_notices_and_no_candidate_stays(world: World) -> None:
    """The controller by SIGKILL in the middle of a step: its workers die with it, the baseline
    serves. Started again it goes on; the candidate's worker is killed; it comes to an end by
    itself, and every request of all this time was answered."""
    log = world.folder / "rollout.log"
    hypothesis = world.folder / "kv.yaml"
    with served(str(world.policy)) as (_, lines):
        url = next(line.split()[1] for line in lines if line.startswith("  gateway "))
        with traffic(url) as it:
            with controller(hypothesis, url, log) as first:
                until(lambda: it.by_candidate >= 3, START_S, log.read_text)
                candidates = psutil.Process(first.pid).children(recursive=True)
                first.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            until(lambda: not any(map(_runs, candidates)), START_S, log.read_text)
            until(lambda: time.monotonic() > killed + LEASE_S, START_S, log.read_text)
            before = it.by_candidate
            until(lambda: time.monotonic() > killed + LEASE_S + 2, START_S, log.read_text)
            assert it.by_candidate == before
            with controller(hypothesis, url, log) as second:
                until(lambda: it.by_candidate > before, START_S, log.read_text)
                assert "goes on at 0.5 of sessions" in log.read_text()
                _worker(second.pid).kill()
                until(lambda: second.poll() is not None, START_S, log.read_text)
        assert it.statuses == {200}, log.read_text()
        state = httpx.get(f"{url}/admin/variants").json()
        assert state == {"candidate": None}
    stages = [one.decision or one.kind for one in world.ledger.read().decisions]
    assert stages[:4] == ["pass", "shadow", "0.5 of sessions", stages[-1]]
    ends = {0: "promoted", 1: "quarantine"}
    assert stages[-1] == ends[second.returncode], log.read_text()
    file = next((world.folder / ".headgate" / "rollouts").glob("*/progress.json"))
    assert json.loads(file.read_text())["ended"] in ("promoted", "rolled back")


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _worker(controller: int) -> psutil.Process:
    """The candidate's, below the controller's `headgate serve`."""
    for one in psutil.Process(controller).children(recursive=True):
        if "runtime" in one.cmdline():
            return one
    raise AssertionError("the candidate has no worker")
