"""A worker with a disk tier, killed and started again: what it kept is found, nothing is wrong."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from command.machine import free_ports
from tests.end_to_end.stack import COMPLETIONS, START_S, Program, program, ready, until

POLICY = """\
version: 1
runtime:
  model: pocket
  kv_tokens: 512
  step_tokens: 64
  threads: 1
  tiers:
    disk: {path: kv, max_bytes: 64 MiB}
"""
HEAD = "The desk is open from nine to five, and on Saturdays until noon. " * 4
PROMPTS = [
    HEAD + f"Customer {number} says that order {number}{number} is late. " * 12
    for number in range(4)
]


@contextlib.contextmanager
def worker(folder: Path) -> Iterator[Program]:
    """A worker of its own, with 512 tokens of KV pool, over what earlier ones left on disk."""
    policy = folder / "policy.yaml"
    policy.write_text(POLICY)
    (port,) = free_ports(1)
    with program(folder, "runtime", policy, port) as one:
        until(lambda: ready(one), START_S, lambda: one.log.read_text())
        yield one


class Killed(Exception):
    """What the world of a killed worker ends with, so that nobody looks for an orderly end."""


def ask(one: Program, prompt: str) -> tuple[str, int]:
    """A greedy answer, and how many tokens of its prompt were found."""
    body = {"model": "pocket", "prompt": prompt, "temperature": 0, "max_tokens": 8}
    response = httpx.post(one.url + COMPLETIONS, json=body, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    details = answer["usage"].get("prompt_tokens_details") or {}
    return answer["choices"][0]["text"], details.get("cached_tokens", 0)


def tiers(one: Program) -> dict[str, Any]:
    return dict(one.health()["tiers"])


def kill_while_it_answers(one: Program) -> None:
    """SIGKILL, with prompts in the middle of their prefill and blocks on their way to the disk."""

    def hopeless(prompt: str) -> None:
        with contextlib.suppress(httpx.TransportError):
            ask(one, prompt)

    threads = [threading.Thread(target=hopeless, args=(prompt[::-1],)) for prompt in PROMPTS[:2]]
    for thread in threads:
        thread.start()
    until(lambda: bool(one.health()["running"]), 30, lambda: "nothing runs")
    one.process.kill()
    one.process.wait()
    for thread in threads:
        thread.join()


def test_a_killed_worker_finds_its_disk_again(tmp_path: Path) -> None:
    """The same answers before and after; after an orderly end all of the prompts is found."""
    with contextlib.suppress(Killed), worker(tmp_path) as one:
        first = [ask(one, prompt)[0] for prompt in PROMPTS]
        assert tiers(one)["disk"]["on"]
        until(lambda: tiers(one)["disk"]["stored"] > 10, 30, lambda: str(tiers(one)))
        kill_while_it_answers(one)
        raise Killed
    with worker(tmp_path) as one:
        again = [ask(one, prompt) for prompt in PROMPTS]
        assert [text for text, _ in again] == first
        assert sum(found for _, found in again) > 0
        assert tiers(one)["disk"]["loaded"] > 0
        assert tiers(one)["disk"]["bytes_per_s"] > 1e6
    with worker(tmp_path) as one:
        last = [ask(one, prompt) for prompt in PROMPTS]
        assert [text for text, _ in last] == first
        assert all(found > 150 for _, found in last)
