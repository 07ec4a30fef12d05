"""A replica on its node, up to where it would load a model: tests/fleet/test_ray.py does that."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from command.serve import version
from fleet.cluster import Job, Lost
from fleet.replica import Replica

HOST = "127.0.0.1"


def a_job(file: Path) -> Job:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Job("replica-1", str(file), digest, version(), 0, "key", {}, 60.0, 1.0)


def policy(folder: Path) -> Path:
    file = folder / "policy.yaml"
    file.write_text("version: 1\nruntime: {model: ./gone}\n")
    return file


def why(job: Job) -> Lost:
    with pytest.raises(Lost) as lost:
        asyncio.run(Replica(job, HOST).start())
    return lost.value


def test_a_node_that_would_serve_something_else_is_refused(tmp_path: Path) -> None:
    """Another version, another policy file, or none: nothing is started there."""
    job = a_job(policy(tmp_path))
    for changed, told in (
        (replace(job, version="0.0.1"), f"has headgate {version()}, the fleet is of 0.0.1"),
        (replace(job, digest="0" * 64), "is another file than where the fleet was started"),
        (replace(job, policy=str(tmp_path / "none.yaml")), "must lie there on every node"),
    ):
        lost = why(changed)
        assert lost.refused
        assert told in str(lost)


def test_a_worker_that_refuses_its_policy_is_not_tried_again(tmp_path: Path) -> None:
    """Its exit code says so, and its own words go with it."""
    lost = why(a_job(policy(tmp_path)))
    assert lost.refused
    assert "its worker ended with exit code 2" in str(lost)
    assert "runtime.model  no such folder" in str(lost)


def test_a_replica_that_nobody_looks_at_is_abandoned(tmp_path: Path) -> None:
    """After its lease, since the last look; and one whose worker has not begun runs nothing."""
    clock = [0.0]
    replica = Replica(a_job(policy(tmp_path)), HOST, now=lambda: clock[0])
    clock[0] = 50.0
    assert not asyncio.run(replica.look()).running
    clock[0] = 109.0
    assert not replica.abandoned
    clock[0] = 111.0
    assert replica.abandoned
