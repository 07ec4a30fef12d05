"""`headgate serve --on ray` on a real cluster of three nodes: one more replica under load and one
less after it, an edited policy, and a node that dies."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.end_to_end.stack import CHAT, ENVIRONMENT, START_S, STOP_S

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: make ray"
)

POLICY = """\
version: 1
gateway: {drain_s: 5, resume: auto, tenants: {clients: {key_env: CLIENT_KEY}}}
runtime: {model: pocket, kv_tokens: 4096, threads: 1}
fleet: {replicas_min: 2, replicas_max: 2, spread: strict, domain: zone}
"""
SCALED = """\
version: 1
gateway: {drain_s: 5, resume: auto, tenants: {clients: {key_env: CLIENT_KEY}}}
runtime: {model: pocket, kv_tokens: 4096, threads: 1}
fleet:
  {replicas_min: 1, replicas_max: 2, running: 1, up_after_s: 2, down_after_s: 5, domain: zone}
"""
KEY = {"authorization": "Bearer of a client"}
LONG = {
    "model": "pocket",
    "messages": [{"role": "user", "content": "Tell me more."}],
    "temperature": 0,
    "max_tokens": 80,
    "ignore_eos": True,
    "stream": True,
}


@dataclass(frozen=True)
class Node:
    zone: str
    pids: tuple[int, ...]

    def kill(self) -> None:
        """As a machine dies: all that runs there, at once."""
        every = [psutil.Process(pid) for pid in self.pids]
        every += [child for process in list(every) for child in process.children(recursive=True)]
        for process in every:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, list[Node]]]:
    """Three nodes with room for two replicas each, the first one with the control plane."""
    program = [sys.executable, str(Path(__file__).with_name("ray_nodes.py")), "3"]
    process = subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin
    assert process.stdout
    try:
        told = json.loads(process.stdout.readline())
        nodes = [Node(one["zone"], tuple(one["pids"])) for one in told["nodes"]]
        yield told["address"], nodes
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        for one in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.kill()
        process.wait()
        process.stdout.close()


@dataclass
class Served:
    """A running `headgate serve`, and what it said."""

    process: subprocess.Popen[str]
    policy: Path
    lines: list[str] = field(default_factory=list)

    def read(self) -> None:
        assert self.process.stdout
        self.lines.extend(self.process.stdout)

    def until(self, pattern: str, count: int = 1) -> list[str]:
        """The lines that match, once there are so many."""
        ends = time.monotonic() + START_S
        while len(found := [line for line in self.lines if re.search(pattern, line)]) < count:
            said = "".join(self.lines)
            assert time.monotonic() < ends, said
            assert self.process.poll() is None, said
            time.sleep(0.05)
        return found


@pytest.fixture
def served(
    cluster: tuple[str, list[Node]], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Served]:
    file = tmp_path / "policy.yaml"
    file.write_text(request.param)
    address, _ = cluster
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "headgate", "serve", "--on", "ray",
         "--ray-address", address, str(file)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | ENVIRONMENT | {"HEADGATE_PORT": "0", "CLIENT_KEY": "of a client"},
    )  # fmt: skip
    run = Served(process, file)
    reading = threading.Thread(target=run.read)
    reading.start()
    try:
        yield run
    finally:
        process.kill()
        process.wait()
        reading.join()
        assert process.stdout
        process.stdout.close()


@pytest.mark.parametrize("served", [SCALED], indirect=True)
def test_a_replica_comes_under_load_in_another_domain_and_goes_after_it(
    cluster: tuple[str, list[Node]], served: Served
) -> None:
    """Also after a hot edit of the policy, which had ended restarts and scaling for good; no stream
    is lost, and no replica."""
    nodes = cluster[1]
    served.until("ready in")
    (line,) = served.until(r"gateway +http")
    with httpx.Client(base_url=line.split()[1], timeout=60, headers=KEY) as client:
        until(lambda: list(replicas(client).values()) == [True])
        assert sum(len(workers_of(node)) for node in nodes) == 1
        edited = SCALED.replace("drain_s: 5,", "drain_s: 5, tiers: {interactive: {ttft_ms: 300}},")
        served.policy.write_text(edited)
        served.until("the policy was reloaded")
        with asking(client, 3) as answers:
            served.until("is ready at", 2)
            until(lambda: list(replicas(client).values()) == [True, True])
            assert sorted(len(workers_of(node)) for node in nodes) == [0, 1, 1]
            so_far = len(answers)
            until(lambda: len(answers) >= so_far + 6)
        assert len(set(answers)) == 1
        served.until("is not wanted any more: it drains")
        until(lambda: len(replicas(client)) == 1)
        until(lambda: sum(len(workers_of(node)) for node in nodes) == 1)
        assert whole(client.post(CHAT, json=LONG)) == answers[0]
    assert not [line for line in served.lines if "is lost" in line]
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(STOP_S + 20) == 0, "".join(served.lines)


@pytest.mark.parametrize("served", [POLICY], indirect=True)
def test_a_node_dies_under_load_and_no_client_notices(
    cluster: tuple[str, list[Node]], served: Served
) -> None:
    """Each stream is whole, by another attempt or by going on elsewhere; a replica comes back on
    the node that is left; workers ask strangers for a key; Ctrl-C leaves nothing behind."""
    served.until("is ready at", 2)
    served.until("ready in")
    (line,) = served.until(r"gateway +http")
    nodes = cluster[1]
    with httpx.Client(base_url=line.split()[1], timeout=60, headers=KEY) as client:
        until(lambda: list(replicas(client).values()) == [True, True])
        before = replicas(client)
        assert sorted(len(workers_of(node)) for node in nodes) == [0, 1, 1]  # a domain each
        for url in before:
            assert httpx.get(f"{url}/v1/models").status_code == 401
        expected = whole(client.post(CHAT, json=LONG))
        with asking(client, 3) as answers:
            next(node for node in nodes[1:] if workers_of(node)).kill()
            served.until("is lost")
            served.until("is ready at", 3)
            until(lambda: sum(replicas(client).values()) == 2 and len(answers) >= 10)
        assert set(answers) == {expected}  # to the letter, whoever gave which part
        assert len(replicas(client).keys() - before.keys()) == 1

    assert sorted(len(workers_of(node)) for node in nodes) == [0, 1, 1]
    workers = [worker for node in nodes for worker in workers_of(node)]
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(STOP_S + 20) == 0, "".join(served.lines)
    _, alive = psutil.wait_procs(workers, timeout=STOP_S)
    assert not alive


def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + START_S
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.1)


def replicas(client: httpx.Client) -> dict[str, bool]:
    """URL -> whether it takes requests, as the gateway sees them."""
    return {one["url"]: one["healthy"] for one in client.get("/health").json()["replicas"]}


@contextlib.contextmanager
def asking(client: httpx.Client, clients: int) -> Iterator[list[str]]:
    """Streams, one after the other by each of several clients; the texts that came."""
    answers: list[str] = []
    enough = threading.Event()

    def ask() -> None:
        while not enough.is_set():
            answers.append(whole(client.post(CHAT, json=LONG)))

    with ThreadPoolExecutor(clients) as beside:
        running = [beside.submit(ask) for _ in range(clients)]
        try:
            yield answers
        finally:
            enough.set()
        for one in running:
            one.result()  # raises for a stream that was not whole


def workers_of(node: Node) -> list[psutil.Process]:
    """Of the runtime, on a node."""
    found = []
    for pid in node.pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "runtime" in child.cmdline():
                        found.append(child)
    return found


def whole(response: httpx.Response) -> str:
    """The text of a stream that came to its end."""
    assert response.status_code == 200, response.text
    assert response.text.endswith("data: [DONE]\n\n"), response.text
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    events: list[dict[str, Any]] = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert not any("error" in event for event in events), response.text
    choices = [choice for event in events for choice in event["choices"]]
    assert choices[-1]["finish_reason"] == "length"
    return "".join(choice["delta"].get("content") or "" for choice in choices)
