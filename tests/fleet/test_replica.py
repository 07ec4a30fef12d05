"""A replica on its node, up to where it would load a model: tests/fleet/test_ray.py does that."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from command.on_ray import OnRay
from command.serve import version
from fleet.cluster import Job, Lost
from fleet.replica import Replica
from policies.load import FLEET_KEY_ENV, load

HOST = "127.0.0.1"


def a_job(file: Path) -> Job:
    return Job("replica-1", str(file), file.read_text(), version(), 0, "key", {}, 60.0, 1.0)


def policy(folder: Path) -> Path:
    file = folder / "policy.yaml"
    file.write_text("version: 1\nruntime: {model: ./gone}\n")
    return file


def why(job: Job) -> Lost:
    with pytest.raises(Lost) as lost:
        asyncio.run(Replica(job, HOST).start())
    return lost.value


def test_a_node_that_would_serve_something_else_is_refused(tmp_path: Path) -> None:
    """Another version: nothing is started there."""
    lost = why(replace(a_job(policy(tmp_path)), version="0.0.1"))
    assert lost.refused
    assert f"has headgate {version()}, the fleet is of 0.0.1" in str(lost)


EDITS = {
    "the gateway's part": "version: 1\ngateway: {max_body_bytes: 9}\nruntime: {model: ./gone}\n",
    "the runtime's part": "version: 1\n\nruntime: {model: ./another}\n",
    "a slip": "version: [1\n",
    "not there": None,
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_becomes_of_the_policy_file_changes_no_replica(tmp_path: Path, edit: str) -> None:
    """It was refused for ever as "another file" once a tier's target had been edited."""
    file = policy(tmp_path)
    job = a_job(file)
    text = EDITS[edit]
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    assert f"{file}:2:18  runtime.model  no such folder: {tmp_path / 'gone'}" in str(why(job))


def test_the_fleet_stays_with_the_policy_that_it_was_started_with(tmp_path: Path) -> None:
    """Also its program's next life, which finds an edited file: whole replicas beside one another
    are of one policy."""
    file = policy(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    started = file.read_text()
    program = OnRay("head:6379", run).program(file, load(file), 7000, [], {FLEET_KEY_ENV: "key"})
    file.write_text("version: [1\n")
    asked = "import sys; from pathlib import Path; from fleet.__main__ import job_of, load; "
    asked += "p = load(sys.argv[1]); print(job_of(Path(sys.argv[1]), p, p.runtime).text, end='')"
    told = subprocess.run(
        [sys.executable, "-c", asked, str(file)],
        env=os.environ | program.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (told.stdout, told.stderr) == (started, "")


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
