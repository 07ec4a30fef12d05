"""Two real workers, one of which is killed inside a stream: its client gets the whole answer."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from command.machine import free_ports
from tests.end_to_end.stack import (
    CHAT,
    START_S,
    events,
    program,
    ready,
    started,
    until,
)

POLICY = """\
version: 1
gateway:
  resume: auto
runtime:
  model: pocket
  kv_tokens: 4096
  threads: 1
"""
ASKED: dict[str, Any] = {
    "model": "pocket",
    "messages": [{"role": "user", "content": "Tell me all about order 12."}],
    "max_tokens": 120,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


def told(chunks: list[Any]) -> tuple[str, Any, Any]:
    """Text, usage and why it ended."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    usage = next(chunk["usage"] for chunk in chunks if chunk.get("usage"))
    counted = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
    return text, counted, choices[-1]["finish_reason"]


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.0, "seed": 11}])
def test_the_answer_of_a_killed_worker_goes_on_token_by_token(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    """Greedy and seeded: text, usage and end are those of the uninterrupted answer, under one id,
    declared in band; the gateway says who is down."""
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    front, *backs = free_ports(3)
    with contextlib.ExitStack() as stop:
        workers = [stop.enter_context(started(tmp_path, "runtime", policy, port)) for port in backs]
        for one in workers:
            until(lambda: ready(one), START_S, lambda: one.log.read_text())  # noqa: B023
        named = [word for one in workers for word in ("--replica", one.url)]
        gateway = stop.enter_context(program(tmp_path, "gateway", policy, front, *named))
        client = stop.enter_context(httpx.Client(base_url=gateway.url, timeout=60))

        def both() -> bool:
            return ready(gateway) and all(one["healthy"] for one in gateway.health()["replicas"])

        until(both, START_S, lambda: gateway.log.read_text())
        body = ASKED | how
        whole = [one for one in events(client.post(CHAT, json=body).content) if one != "[DONE]"]
        with client.stream("POST", CHAT, json=body) as response:
            pieces = response.iter_bytes()
            got = b""
            while got.count(b"data: ") < 25:
                got += next(pieces)
            busy = {one["url"] for one in gateway.health()["replicas"] if one["in_flight"]}
            (victim,) = [one for one in workers if one.url in busy]
            victim.process.send_signal(signal.SIGKILL)
            got += b"".join(pieces)
        *chunks, end = events(got)
        assert end == "[DONE]"
        assert told(chunks) == told(whole)
        assert len({chunk["id"] for chunk in chunks}) == 1
        declared = [chunk["headgate"] for chunk in chunks if "headgate" in chunk]
        assert declared == [{"resumed": {"by": "tokens", "exact": True}}]
        down = [one["url"] for one in gateway.health()["replicas"] if not one["healthy"]]
        assert down == [victim.url]
