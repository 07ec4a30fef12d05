"""Optimizations over real processes: on with a live pass, off and said so once a leaf changed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from command.machine import free_ports
from policies.devices import devices
from tests.end_to_end.stack import ENVIRONMENT, PROBE, START_S, program, ready, until
from tests.end_to_end.test_serve import served
from tests.policies.gated_world import World, build
from tests.runtime.tiny_models import FAMILIES, write_model

KV = "{runtime.kv: int8}"
TRIM = "{gateway.trim.drop: oldest}"
POLICY = """\
version: 1
gateway: {drain_s: 1.0}
runtime: {model: llama, kv_tokens: 2048, threads: 1, device: cpu}
"""


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A real model; the cache of int8 has passed, trimming was never judged."""
    world = build(tmp_path)
    write_model(tmp_path / "llama", *FAMILIES["llama"])
    world.hypothesis("kv", KV)
    world.hypothesis("trim", TRIM, "lossy_input")
    world.serve("kv", "trim", text=POLICY)
    world.judge("kv", at=time.time(), devices=devices())
    return world


def told(url: str) -> dict[str, dict[str, Any]]:
    """The optimizations that a server tells, by name."""
    listed = PROBE.get(f"{url}/v1/fingerprint").json()["optimizations"]
    return {one["hypothesis"]: one for one in listed}


def kv_of(fingerprint: dict[str, Any]) -> str:
    return str(fingerprint["facts"]["configuration"]["kv"])


def test_serve_enables_what_has_passed_and_nothing_once_the_weights_have_changed(
    world: World,
) -> None:
    """With a byte of the weights changed the same policy starts without the optimization: by
    `headgate serve`, and by a worker that is started by hand."""
    with served(str(world.policy)) as (_, lines):
        said = "\n".join(lines)
        assert "optimization kv    on   runtime.kv: passed on 20" in said
        assert "optimization trim  off  there is no verdict: headgate gate run" in said
        assert said.count("optimization kv") == 1, "the children have told it again"
        url = next(line.split()[1] for line in lines if line.startswith("  gateway "))
        (replica,) = PROBE.get(f"{url}/v1/fingerprint").json()["data"]
        assert kv_of(replica["fingerprint"]) == "int8"
        for server in (url, replica["url"]):
            states = {name: one["state"] for name, one in told(server).items()}
            assert states == {"kv": "on", "trim": "off"}
        body = {"model": "llama", "prompt": "hi", "max_tokens": 1}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        assert answer["system_fingerprint"] == replica["fingerprint"]["system_fingerprint"]
    weights = world.folder / "llama" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1  # the last number's least bit
    weights.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-m", "headgate", "gate", "status", str(world.policy)],
        env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=START_S,
    )  # fmt: skip
    assert done.returncode == 6
    assert "optimization kv    stale  weights has changed since its verdict" in done.stdout
    with program(world.folder, "runtime", world.policy, *free_ports(1)) as worker:
        until(lambda: ready(worker), START_S, worker.log.read_text)
        assert "optimization kv: stale  weights has changed" in worker.log.read_text()
        assert kv_of(PROBE.get(f"{worker.url}/v1/fingerprint").json()) == "auto"
        one = told(worker.url)["kv"]
        assert (one["state"], one["enabled"], one["stale_leaves"]) == ("stale", False, ["weights"])
