"""The server whose moments are known, our client in front of it, and what counts as unchanged."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from benchmarks import clients_agree
from benchmarks.lab.edges import OURS, listening
from benchmarks.lab.load_tools import Load, Times
from benchmarks.lab.paced_server import FIRST_S, STEP_S


def test_our_client_measures_what_the_server_does(tmp_path: Path) -> None:
    """Never less than it takes; how much more depends on the machine, and is not asserted."""
    with listening("paced_server", str(tmp_path)) as port:
        times = asyncio.run(clients_agree._ask(f"http://127.0.0.1:{port}", Load(4, 2, 8, 5)))
    assert times.requests == 4
    assert times.ttft_ms >= 1000 * FIRST_S
    assert times.tpot_ms >= 1000 * STEP_S * 0.5
    bodies = (tmp_path / "bodies.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["max_tokens"] for line in bodies] == [5] * 4


def test_the_distance_is_of_the_same_round() -> None:
    """A machine that was slow for everybody in one round says nothing against anybody."""
    rounds = {
        OURS: [Times(100, 10, 1), Times(200, 20, 1), Times(100, 10, 1)],
        "a": [Times(102, 10, 1), Times(204, 20, 1), Times(102, 10, 1)],
        "b": [Times(100, 10, 1), Times(200, 25, 1), Times(100, 10, 1)],
    }
    assert clients_agree._off(rounds, "ttft_ms") == round(1 - 100 / 102, 4)
    assert clients_agree._off(rounds, "tpot_ms") == 0


def test_a_request_is_the_same_in_either_form_of_its_content() -> None:
    """Parts of text say what a text says; other words or limits are another request."""
    plain = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 3}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    other = {"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 3}
    assert clients_agree._told(plain) == clients_agree._told(other)
    assert clients_agree._told(plain) != clients_agree._told(plain | {"max_tokens": 4})
