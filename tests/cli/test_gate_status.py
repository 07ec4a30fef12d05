"""`headgate gate status`, as a person or a program reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from policies.devices import VARIABLE
from tests.policies.gated_world import DAY, DEVICES, World, build

ROOT = Path(__file__).parents[2]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return build(tmp_path)


def status(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headgate", "gate", "status", str(world.policy), *arguments],
        cwd=ROOT, env=os.environ | {VARIABLE: json.dumps(DEVICES)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_policy_without_optimizations_says_so(world: World) -> None:
    done = status(world)
    assert (done.returncode, done.stdout) == (0, f"{world.policy} has no optimizations\n")


def test_each_state_has_its_line_and_its_exit_code(world: World) -> None:
    """No verdict 3, on 0, stale 6 with the leaf, quarantined 1, fail 1."""
    world.hypothesis("int8")
    world.serve("int8")
    done = status(world)
    assert done.returncode == 3
    assert done.stdout.startswith("optimization int8  off  there is no verdict: headgate gate run ")
    made = world.judge("int8", at=time.time() - 3 * DAY)
    done = status(world)
    assert (done.returncode, done.stdout.split()[2]) == (0, "on")
    rows = world.folder / "a.jsonl"
    rows.write_text(rows.read_text().replace("ho", "hu"))
    done = status(world)
    assert done.returncode == 6
    assert "optimization int8  stale  suite:a has changed since its verdict" in done.stdout
    rows.write_text(rows.read_text().replace("hu", "ho"))
    world.ledger.quarantine("int8", made.candidate, "5xx")
    done = status(world)
    assert (done.returncode, done.stdout.split()[2]) == (1, "quarantined")
    world.judge("int8", "fail", at=time.time())
    assert status(world).returncode == 1


def test_a_program_reads_verdict_age_and_leaf(world: World) -> None:
    """Of each hypothesis, also of one that the policy does not name, and of one that is wrong."""
    for name in ("int8", "kv", "ready"):
        world.hypothesis(name)
        world.judge(name, at=time.time() - 3 * DAY)
    world.judge("kv", "no_benefit", at=time.time() - DAY)
    world.serve("int8")
    weights = world.folder / "tiny" / "model.safetensors"
    weights.write_bytes(b"\1" * 64)
    world.judge("ready", at=time.time() - DAY)
    (world.folder / "hypotheses").mkdir()
    (world.folder / "hypotheses" / "bad.yaml").write_text("kind: Hypothesis\nmetdata: {}\n")
    done = status(world, "--json")
    assert done.returncode == 6
    told = json.loads(done.stdout)
    (one,) = told["optimizations"]
    assert (one["hypothesis"], one["state"], one["enabled"]) == ("int8", "stale", False)
    assert (one["verdict"], one["stale_leaves"]) == ("pass", ["weights"])
    assert one["stale_findings"] == [
        {"finding": "guardrail 0 suite:a correct", "leaf": "weights", "effect": "stale"}
    ]
    assert 3 * DAY <= one["age_s"] < 3 * DAY + 600
    kv, ready, bad = told["not_in_the_policy"]
    assert (kv["verdict"], kv["state"], kv["stale_leaves"]) == ("no_benefit", "off", ["weights"])
    assert (ready["hypothesis"], ready["state"], ready["enabled"]) == ("ready", "on", False)
    assert "bad.yaml:1:1  apiVersion  missing" in bad["problem"]
    lines = status(world).stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["optimization", "int8", "stale"],
        ["hypothesis", "kv", "off"],
        ["hypothesis", "ready", "ready"],
        ["hypothesis", "bad", "wrong"],
    ]


def test_a_hypothesis_that_cannot_be_looked_at_is_told(world: World) -> None:
    """A folder that is closed to whoever serves, as a container's user, ended with a traceback; a
    name that is too long fails in the same way, and for root, too."""
    world.serve("x" * 300)
    done = status(world)
    assert done.returncode == 2
    assert "optimizations[0].hypothesis  '" in done.stderr
    assert "cannot be read: File name too long" in done.stderr


def test_a_wrong_policy_exits_with_2(world: World) -> None:
    world.serve("gone")
    done = status(world)
    assert done.returncode == 2
    assert "optimizations[0].hypothesis  there is no file" in done.stderr
    assert done.stdout == ""
