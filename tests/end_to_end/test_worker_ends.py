"""A worker as a process of its own, as containers run it: how it ends, and what it takes."""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path

import httpx
import pytest

from command.machine import free_ports
from tests.end_to_end.stack import CHAT, DEFAULTS, POLICY, START_S, STOP_S, ready, started, until


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_gives_its_running_answer_to_the_end_and_ends_with_0(
    tmp_path: Path, told: signal.Signals
) -> None:
    """It drained, and then ended by the signal: 143, which a container's runtime tells as a failure
    of it. A worker has as many open files as it may have, too."""
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    (port,) = free_ports(1)
    with started(tmp_path, "runtime", policy, port) as worker:
        until(lambda: ready(worker), START_S, worker.log.read_text)
        if sys.platform == "linux":
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            soft, _ = resource.prlimit(worker.process.pid, resource.RLIMIT_NOFILE)
            assert soft == min(hard, 65_536)
        body = DEFAULTS[CHAT] | {"stream": True, "max_tokens": 60, "ignore_eos": True}
        with httpx.stream("POST", worker.url + CHAT, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            worker.process.send_signal(told)
            said = [one for one in (first, *lines) if one]
        assert worker.process.wait(STOP_S) == 0, worker.log.read_text()
    assert said[-1] == "data: [DONE]"
    assert json.loads(said[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert "Traceback" not in worker.log.read_text()
