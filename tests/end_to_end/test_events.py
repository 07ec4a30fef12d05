"""Block events over real processes: a worker killed in mid-answer, subscribers of every kind."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from command.machine import free_ports
from tests.end_to_end.stack import (
    CHAT,
    DEFAULTS,
    START_S,
    Program,
    events,
    ready,
    started,
    until,
)
from tests.runtime.subscriber import Known, Subscriber

LONG = DEFAULTS[CHAT] | {
    "messages": [{"role": "user", "content": "Count the parcels of order JR-9265. " * 20}],
    "max_tokens": 400,
    "ignore_eos": True,
    "stream": True,
}


@contextlib.contextmanager
def worker(folder: Path, policy: Path, port: int) -> Iterator[Program]:
    """A worker process that a test may kill."""
    with started(folder, "runtime", policy, port) as one:
        until(lambda: ready(one), START_S, one.log.read_text)
        yield one


def answer(one: Program) -> str:
    body = LONG | {"stream": False}
    response = httpx.post(one.url + CHAT, json=body, timeout=60)
    return str(response.json()["choices"][0]["message"]["content"])


def findable(one: Program) -> int:
    """Blocks that an idle worker can find."""
    until(lambda: not one.health()["running"], 60, one.log.read_text)
    blocks = one.health()["blocks"]
    assert blocks["in_use"] == 0
    return int(blocks["cached"])


def half_an_answer(one: Program) -> str:
    """What a client got of a stream when its worker was killed in the middle of it."""
    got = b""
    with (
        contextlib.suppress(httpx.TransportError),
        httpx.stream("POST", one.url + CHAT, json=LONG, timeout=60) as response,
    ):
        for chunk in response.iter_bytes():
            got += chunk
            if got.count(b"data:") > 20:
                one.process.send_signal(signal.SIGKILL)
    assert b"[DONE]" not in got
    whole = got[: got.rindex(b"\n\n") + 2]
    pieces: list[dict[str, Any]] = [event["choices"][0]["delta"] for event in events(whole)]
    return "".join(piece.get("content", "") for piece in pieces)


def test_no_wrong_token_and_no_wrong_block_after_a_kill_in_mid_answer(tmp_path: Path) -> None:
    """The client keeps a beginning of the right answer, the next life says the same answer, and a
    subscriber that followed the first life comes to know the second; a deaf one and one that left
    cost nobody anything."""
    port, live, replay = free_ports(3)
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "version: 1\nruntime:\n  kv_tokens: 4096\n  threads: 1\n  kv_events:\n"
        f"    endpoint: tcp://127.0.0.1:{live}\n    replay_endpoint: tcp://127.0.0.1:{replay}\n"
        "    hwm: 4\n    buffer_steps: 8\n"
    )
    live_at, replay_at = f"tcp://127.0.0.1:{live}", f"tcp://127.0.0.1:{replay}"
    with (
        Subscriber(live_at, replay_at) as follows,
        Subscriber(live_at, replay_at, hwm=1),  # it never reads
    ):
        with worker(tmp_path, policy, port) as first:
            told = first.health()["kv_events"]
            assert (told["endpoint"], told["replay_endpoint"]) == (live_at, replay_at)
            with Subscriber(live_at, replay_at) as leaves:
                right = answer(first)
                leaves.catch_up()
            follows.catch_up()
            assert len(follows.known.blocks) == findable(first) > 20
            got = half_an_answer(first)
            assert got
            assert right.startswith(got)
            first.process.wait()
        with worker(tmp_path, policy, port) as second:
            assert answer(second) == right
            numbers = [seq for _, seq, _ in follows.replay(0)]
            assert numbers[-1] + 1 == second.health()["kv_events"]["batches"]  # from 0 again
            follows.known = Known()
            follows.catch_up()
            assert len(follows.known.blocks) == findable(second) > 20
            assert follows.known.orphans == 0
            assert second.health()["kv_events"]["failures"] == 0
