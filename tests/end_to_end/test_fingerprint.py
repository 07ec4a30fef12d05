"""The fingerprint over the real processes: one worker, its restart, and the gateway in front."""

from __future__ import annotations

from pathlib import Path

from command.machine import free_ports
from tests.end_to_end.stack import (
    CHAT,
    COMPLETIONS,
    POLICY,
    PROBE,
    START_S,
    Stack,
    program,
    ready,
    until,
)


def test_the_gateway_tells_what_the_answers_carry(stack: Stack) -> None:
    """One replica, one fingerprint; chat and text answers name it."""
    (entry,) = stack.client.get(f"{stack.gateway.url}/v1/fingerprint").json()["data"]
    assert entry["url"] == stack.worker.url
    short = entry["fingerprint"]["system_fingerprint"]
    assert short == stack.worker.health()["fingerprint"]
    for path in (CHAT, COMPLETIONS):
        assert stack.ask(path, max_tokens=1)["system_fingerprint"] == short


def test_a_restart_keeps_it(stack: Stack, tmp_path: Path) -> None:
    """A second process with the same policy elsewhere says the same, leaf by leaf."""
    policy = tmp_path / "other.yaml"
    policy.write_text(POLICY)
    with program(tmp_path, "runtime", policy, *free_ports(1)) as worker:
        until(lambda: ready(worker), START_S, worker.log.read_text)
        told = PROBE.get(f"{worker.url}/v1/fingerprint").json()
    assert told == PROBE.get(f"{stack.worker.url}/v1/fingerprint").json()
