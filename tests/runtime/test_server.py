"""One worker over a real socket, with a tiny random model that the tests can stop and break."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from cache.tiers import Tiers
from cache.tokens import Tokenizer
from runtime.adapters import load_adapters
from runtime.engine import Engine
from runtime.fingerprint import LEAVES, combine
from runtime.loading import load_model
from runtime.metrics_page import Page
from runtime.model import Model
from runtime.server import create_app
from runtime.streams import Streams
from runtime.swap import Swap
from runtime.tally import Tally
from runtime.worker import Served, Worker
from telemetry.phases import Phases, of_header
from tests.runtime.tiny_models import FAMILIES, REFUSED, write_model

ROOT = Path(__file__).parents[2]
LIMIT_S = 30.0
CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 4,
    "ignore_eos": True,
    "temperature": 0,
}
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), *FAMILIES["llama"])


class Gated:
    """A model whose forward waits for a gate, and fails as often as it was told to."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.gate = threading.Event()
        self.gate.set()
        self.failures: list[RuntimeError] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward(self, *args: Any) -> torch.Tensor:
        assert self.gate.wait(LIMIT_S)
        if self.failures:
            raise self.failures.pop()
        return self.model.forward(*args)


@dataclass
class World:
    """A serving worker, its inside, and a client of it."""

    client: httpx.Client
    model: Gated
    worker: Worker
    died_of: list[BaseException] = field(default_factory=list)

    def post(self, **change: Any) -> httpx.Response:
        return self.client.post(CHAT, json=HELLO | change)

    def leave(self, when: Callable[[], bool]) -> None:
        """Asks, and hangs up without an answer once that holds."""
        host, port = self.client.base_url.host, self.client.base_url.port
        assert port is not None
        body = json.dumps(HELLO).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, port), timeout=LIMIT_S) as sock:
            sock.sendall(head.encode() + body)
            self.until(when)

    def health(self) -> dict[str, Any]:
        return dict(self.client.get("/health").json())

    def until(self, holds: Callable[[], bool]) -> None:
        """Waits for what other threads bring about."""
        end = time.monotonic() + LIMIT_S
        while not holds():
            assert time.monotonic() < end, self.health()
            time.sleep(0.002)  # whoever brings it about needs the core

    def idle(self) -> bool:
        health = self.health()
        blocks = health["blocks"]
        assert blocks["free"] + blocks["cached"] + blocks["in_use"] == blocks["total"]
        return not (health["running"] + health["waiting"] + health["streams"] + blocks["in_use"])


@contextmanager
def serving(
    folder: Path,
    *,
    wait: threading.Event | None = None,
    ready: bool = True,
    adapters: Path | None = None,
    below: Callable[[Model], Tiers] | None = None,
    formats: Mapping[str, Any] | None = None,
    **engine: Any,
) -> Iterator[World]:
    """A worker on a free port; its loading waits for `wait`, and goes by `formats`."""
    model = Gated(load_model(folder, kv_tokens=1024, **(formats or {}))[0])
    if adapters is not None:
        engine["adapters"] = load_adapters(model.model, adapters)
    if below is not None:
        # On a clock that stands still nobody gives up waiting for a disk, however busy it is.
        engine["swap"] = Swap(model.model, below(model.model), now=lambda: 0.0)
    tokenizer = Tokenizer.load(folder)
    identity = combine(dict.fromkeys(LEAVES))

    def load(streams: Streams) -> Served:
        assert wait is None or wait.wait(LIMIT_S)
        tally = Tally(model.context_tokens)
        made = Engine(model, tokenizer, emit=streams.emit, listeners=[tally], **engine)  # type: ignore[arg-type]
        page = Page(
            tally,
            made,
            model_name="tiny",
            rank=0,
            identity=identity,
            late_tokens=lambda: streams.late_tokens,
        )
        return Served("tiny", made, tokenizer, {"device": "cpu"}, 0, identity, page)

    died_of: list[BaseException] = []
    worker = Worker(load, max_body_bytes=2**16, on_failure=died_of.append)
    config = uvicorn.Config(create_app(worker), log_level="error", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, timeout=LIMIT_S) as client:
                world = World(client, model, worker, died_of)
                world.until(lambda: server.started)
                if ready:
                    world.until(lambda: client.get("/health").status_code == 200)
                yield world
                if ready:
                    model.gate.set()
                    world.until(world.idle)
                    assert not any(worker.require().metrics.tally.violations.values())
        finally:
            model.gate.set()
            server.should_exit = True
            thread.join(LIMIT_S)
    assert not thread.is_alive()
    assert died_of == []


def test_while_the_model_loads_the_worker_says_so(folder: Path) -> None:
    """503 with Retry-After, for health as for requests; then it serves."""
    loaded = threading.Event()
    with serving(folder, wait=loaded, ready=False) as world:
        assert world.client.get("/health").json() == {"status": "loading"}
        for response in (world.post(), world.client.get("/v1/models")):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["code"] == "loading"
        loaded.set()
        world.until(lambda: world.client.get("/health").status_code == 200)
        assert world.post().status_code == 200


def test_a_fault_of_a_workers_own_is_one_in_its_counts_and_traces_too(folder: Path) -> None:
    with serving(folder) as world:
        served = world.worker.require()
        world.worker.served = replace(served, tokenizer=None)  # type: ignore[arg-type]
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        mark = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
        failed = world.client.post(CHAT, json=HELLO, headers=mark)
        world.worker.served = served
        counts = served.metrics.tally.http
        (span,) = world.client.get(f"/traces/{trace}").json()["spans"]
        counted = [counts.get((CHAT, "POST", one), 0) for one in ("2xx", "5xx")]
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "internal_error")
    assert failed.headers["connection"] == "close"  # the next request does not meet a reset
    assert counted == [0, 1]
    assert (span["status"], span["attributes"]["error.type"]) == ("ERROR", "AttributeError")


def test_a_web_page_from_elsewhere_gets_nothing_from_a_worker(folder: Path) -> None:
    """Its port is as near to a browser as the gateway's: the same rule, on every path."""
    with serving(folder) as world:
        page = {"origin": "https://evil.example", "content-type": "text/plain"}
        rebound = {"host": "evil.example:8001"}
        for path in (CHAT, "/health", "/metrics", "/v1/models", "/reset_prefix_cache", "/nothing"):
            for headers, code in ((page, "origin_not_allowed"), (rebound, "host_not_allowed")):
                refused = world.client.post(path, content=json.dumps(HELLO), headers=headers)
                assert (refused.status_code, refused.json()["error"]["code"]) == (403, code), path
                assert "evil.example" in refused.json()["error"]["message"]
        assert world.client.get("/health").json()["prompt_tokens"] == 0
        local = {"origin": "http://localhost:3000", "host": "[::1]:1"}
        assert world.client.post(CHAT, json=HELLO, headers=local).status_code == 200


def test_every_answer_carries_the_fingerprint_that_the_worker_tells(folder: Path) -> None:
    """Whole and streamed, chat and text: what GET /v1/fingerprint says, on every chunk."""
    with serving(folder) as world:
        told = world.client.get("/v1/fingerprint").json()
        assert told["model"] == "tiny"
        assert told["leaves"].keys() == set(LEAVES)
        bodies = [world.post().json()]
        text = HELLO | {"prompt": "hi", "stream": False}
        bodies.append(world.client.post("/v1/completions", json=text).json())
        for path in (CHAT, "/v1/completions"):
            body = text | {"stream": True, "stream_options": {"include_usage": True}}
            lines = world.client.post(path, json=body).text.split("\n\n")
            bodies += [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert len(bodies) > 8
        assert {body["system_fingerprint"] for body in bodies} == {told["system_fingerprint"]}


def test_a_full_queue_is_503_with_retry_after_and_takes_nothing(folder: Path) -> None:
    """What waits already is served; what was refused leaves no trace."""
    with serving(folder, max_waiting=2, max_sequences=1) as world, ThreadPoolExecutor(4) as pool:
        world.model.gate.clear()
        running = pool.submit(world.post)
        world.until(lambda: world.health()["running"] == 1)
        waiting = [pool.submit(world.post) for _ in range(2)]
        world.until(lambda: world.health()["waiting"] == 2)
        refused = world.post(n=2)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        error = refused.json()["error"]
        assert (error["code"], error["type"]) == ("queue_full", "server_error")
        assert world.health()["streams"] == 3
        world.model.gate.set()
        assert [one.result().status_code for one in (running, *waiting)] == [200] * 3


def test_a_step_that_fails_is_500_and_the_worker_goes_on(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A device that fails costs the requests of that step, not the process."""
    with serving(folder) as world:
        expected = world.post().json()["choices"]
        world.model.failures.append(RuntimeError("out of memory\nwith details"))
        response = world.post()
        assert response.status_code == 500
        error = response.json()["error"]
        assert (error["code"], error["type"]) == ("engine_error", "server_error")
        assert "out of memory" in error["message"]
        assert "details" not in error["message"]
        assert "a step with 1 sequences failed" in caplog.text
        assert world.post().json()["choices"] == expected


def test_a_step_that_fails_within_a_stream_is_an_event_in_band(folder: Path) -> None:
    """The status is out already: an error event and the terminator follow what was sent."""
    with serving(folder) as world:
        body = HELLO | {"stream": True, "max_tokens": 50, "n": 2}
        with world.client.stream("POST", CHAT, json=body) as response:
            chunks = response.iter_bytes()
            got = next(chunks)
            world.model.failures.append(RuntimeError("the device failed"))
            got += b"".join(chunks)
        assert response.status_code == 200
        *before, error, done = [
            line.removeprefix(b"data: ") for line in got.split(b"\n") if line.startswith(b"data:")
        ]
        assert done == b"[DONE]"
        assert json.loads(error)["error"]["code"] == "engine_error"
        assert all("choices" in json.loads(line) for line in before)


def test_a_failed_step_ends_only_what_was_in_it(folder: Path) -> None:
    """What waits outside the batch is computed afterwards as if nothing had happened."""
    with serving(folder, max_sequences=1) as world, ThreadPoolExecutor(2) as pool:
        expected = world.post().json()["choices"]
        world.model.gate.clear()
        world.model.failures.append(RuntimeError("once"))
        first = pool.submit(world.post)
        world.until(lambda: world.health()["running"] == 1)
        second = pool.submit(world.post)
        world.until(lambda: world.health()["waiting"] == 1)
        world.model.gate.set()
        assert first.result().status_code == 500
        assert second.result().json()["choices"] == expected


def test_a_client_that_leaves_while_it_waits_is_forgotten(folder: Path) -> None:
    """A request that never ran takes no turn later."""
    with serving(folder, max_sequences=1) as world, ThreadPoolExecutor(1) as pool:
        world.model.gate.clear()
        running = pool.submit(world.post)
        world.until(lambda: world.health()["running"] == 1)
        world.leave(lambda: world.health()["waiting"] == 1)
        world.until(lambda: world.health()["streams"] == 1)
        world.model.gate.set()
        assert running.result().status_code == 200
        world.until(world.idle)


def test_a_body_over_the_limit_is_413_with_and_without_a_length(folder: Path) -> None:
    """Told before the rest is read; the connection may be used again or not, the worker is fine."""
    with serving(folder) as world:
        for content in (b"x" * 100_000, iter([b"x" * 50_000] * 2)):
            response = world.client.post(CHAT, content=content)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "body_too_large"
        assert world.post().status_code == 200


def timing(response: httpx.Response) -> Phases:
    """What its one `Server-Timing` says."""
    (said,) = response.headers.get_list("server-timing")
    told = of_header(said)
    assert told is not None, said
    return told


def test_every_answer_says_how_long_it_took_refusals_too(folder: Path) -> None:
    """A refusal had no `Server-Timing`; what never came to a choice has waited all the time."""
    with serving(folder, max_sequences=1, max_waiting=1) as world, ThreadPoolExecutor(2) as pool:
        post, origin = world.client.post, {"origin": "https://evil.example"}
        refused = [
            (400, post(CHAT, content=b"{")),
            (403, post(CHAT, json=HELLO, headers=origin)),
            (404, world.post(model="another")),
            (405, world.client.get(CHAT)),
            (413, post(CHAT, content=b"x" * 100_000)),
        ]
        served = world.worker.require()
        world.worker.served = replace(served, tokenizer=None)  # type: ignore[arg-type]
        refused.append((500, world.post()))
        world.worker.served = served
        world.model.gate.clear()
        running = pool.submit(world.post)
        world.until(lambda: world.health()["running"] == 1)
        late = {"x-slo-deadline-ms": "1000"}
        waiting = pool.submit(post, CHAT, json=HELLO, headers=late)
        world.until(lambda: world.health()["waiting"] == 1)
        refused.append((503, world.post()))
        world.until(lambda: waiting.running() and world.client.get("/health").is_success)
        began = time.monotonic()
        world.until(lambda: time.monotonic() - began > 1.0)  # its deadline has passed
        world.model.gate.set()
        too_late, answered = waiting.result(), running.result()
        for status, response in refused:
            assert response.status_code == status
            told = timing(response)
            assert 0 <= told.queue_s < LIMIT_S
            assert (told.prefill_s, told.decode_s) == (0, 0)
        assert (too_late.status_code, timing(too_late).queue_s >= 1.0) == (504, True)
        assert timing(answered).prefill_s >= 1.0  # the gate held its first step
        assert timing(world.post(stream=True)).prefill_s == 0  # its head goes before that
        for path in ("/health", "/v1/models", "/nothing"):
            assert "server-timing" not in world.client.get(path).headers


def test_more_sequences_than_the_pool_holds_all_end(folder: Path) -> None:
    """Preempted ones are computed again, and answer what they answer alone."""
    with serving(folder) as world, ThreadPoolExecutor(16) as pool:
        asked = {"max_tokens": 120, "messages": [{"role": "user", "content": "x" * 100}]}
        alone = world.post(**asked).json()["choices"][0]["message"]
        answers = list(pool.map(lambda _: world.post(**asked), range(16)))
        assert [one.json()["choices"][0]["message"] for one in answers] == [alone] * 16
        assert world.health()["preemptions"] > 0


# ---- as a process -------------------------------------------------------------------------------


def refused(folder: Path, model: str) -> tuple[int, str]:
    """Exit code and stderr of a worker that cannot serve."""
    policy = folder / "policy.yaml"
    policy.write_text(f"version: 1\nruntime:\n  model: {model}\n")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "runtime", str(policy), "--port", "0"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


def test_a_model_that_is_refused_ends_the_process_with_3(tmp_path: Path) -> None:
    """So that the supervisor knows that starting it again would not help."""
    config, changes, words = REFUSED["dynamic_rope"]
    write_model(tmp_path / "odd", config, changes)
    code, said = refused(tmp_path, "./odd")
    assert code == 3, said
    assert words in said
    assert "odd" in said


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "odd"),
        (("tokenizer.json", "model.safetensors"), "config.json"),
        (("config.json", "tokenizer.json", "pytorch_model.bin"), "safetensors"),
        (("config.json", "tokenizer.json", "model.ckpt"), "safetensors"),
    ],
    ids=["missing", "no config", "pickle only", "checkpoint only"],
)
def test_a_folder_without_what_it_needs_is_refused_before_torch_starts(
    tmp_path: Path, files: tuple[str, ...] | None, words: str
) -> None:
    """The message stands at the policy's line and names the file that is missing."""
    if files is not None:
        (tmp_path / "odd").mkdir()
        for name in files:
            (tmp_path / "odd" / name).write_text("{}")
    code, said = refused(tmp_path, "./odd")
    assert code != 0
    assert "policy.yaml:3:" in said
    assert words in said
