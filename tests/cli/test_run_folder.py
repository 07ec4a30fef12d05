"""Folders of runs: one for each, and what killed ones left goes with the next start."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from command.run_folder import LOCK, own_folder, remove_abandoned

ROOT = Path(__file__).parents[2]
OWNER = """
import sys
from command.run_folder import own_folder
with own_folder() as folder:
    (folder / "policy.yaml").write_text("version: 1")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What this test and those that it starts take for the folder of temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@contextmanager
def owner() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that has a folder, until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


def test_a_killed_runs_folder_goes_with_the_next_start_and_a_living_ones_stays(
    temporary: Path,
) -> None:
    """It stayed for ever, with the copy of the policy in it."""
    with owner() as (killed, its), owner() as (living, other):
        assert (its / "policy.yaml").exists()
        killed.kill()
        killed.wait()
        with own_folder() as mine:
            assert {*temporary.iterdir()} == {mine, other}
            assert mine.stat().st_mode & 0o777 == 0o700
        assert {*temporary.iterdir()} == {other}
        living.communicate()
    assert not list(temporary.iterdir())


def test_children_that_outlive_their_owner_do_not_keep_its_lock(temporary: Path) -> None:
    """A lock belongs to all who have inherited the file; who runs another program has not."""
    with own_folder() as folder:
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
        lock = (folder / LOCK).stat()
        held = [
            one for one in Path(f"/proc/{child.pid}/fd").glob("*")
            if one.exists() and os.path.samestat(one.stat(), lock)
        ]  # fmt: skip
        child.kill()
        child.wait()
    assert not held
    assert not list(temporary.iterdir())


def test_what_is_not_a_dead_runs_own_folder_is_left_alone(tmp_path: Path, temporary: Path) -> None:
    """Another program's, one that others may enter, a link in its place or to its lock, a file, and
    whatever a link inside of it leads to."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / LOCK).touch()
    (precious / "kept").touch()
    (temporary / "headgate-linked").symlink_to(precious)
    (temporary / "headgate-file").touch()
    (temporary / "headgate-other").mkdir(0o700)
    (temporary / "headgate-open").mkdir()
    (temporary / "headgate-open" / LOCK).touch()
    (temporary / "headgate-open").chmod(0o755)
    (temporary / "headgate-trap").mkdir(0o700)
    (temporary / "headgate-trap" / LOCK).symlink_to(precious / LOCK)
    (temporary / "headgate-pipe").mkdir(0o700)
    os.mkfifo(temporary / "headgate-pipe" / LOCK)
    (temporary / "headgate-dead").mkdir(0o700)
    (temporary / "headgate-dead" / LOCK).touch()
    (temporary / "headgate-dead" / "way-out").symlink_to(precious)
    remove_abandoned()
    left = {one.name.removeprefix("headgate-") for one in temporary.iterdir()}
    assert left - {"pipe"} == {"linked", "file", "other", "open", "trap"}
    assert {one.name for one in precious.iterdir()} == {LOCK, "kept"}


def _begin(together: Barrier, alone: Queue[bool]) -> None:
    together.wait()
    for _ in range(50):
        with own_folder() as folder:
            alone.put((folder / LOCK).exists())


def test_runs_that_begin_together_take_nothing_of_each_other(temporary: Path) -> None:
    """Between making the folder and holding the lock another one looks for what is abandoned."""
    context = multiprocessing.get_context("spawn")
    together, alone = context.Barrier(3), context.Queue()
    runs = [context.Process(target=_begin, args=(together, alone)) for _ in range(3)]
    for one in runs:
        one.start()
    assert all(alone.get(timeout=120) for _ in range(3 * 50))
    for one in runs:
        one.join()
    assert [one.exitcode for one in runs] == [0, 0, 0]
    assert not list(temporary.glob("headgate-*"))
