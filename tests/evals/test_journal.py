"""What a run wrote down is there after a crash, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evals.design import Block, Step
from evals.journal import Done, Journal, JournalError
from telemetry import Observation

ROOT = Path(__file__).parents[2]


def done(block: int, arm: str = "baseline") -> Done:
    seen = Observation("a", "suite:s", arm, "a", block, text="grün", scores={"correct": 1.0})
    return Done("suite:s", block, arm, (seen,), {"steps_total": 3.0}, (0.25,), 1.5)


def step(block: int, arm: str = "baseline") -> Step:
    return Step(Block("suite:s", block, 0, ()), arm)


def test_it_gives_back_what_it_was_given(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "journal.jsonl"
    with Journal(file) as journal:
        journal.add(done(0))
        journal.add(done(0, "candidate"))
    with Journal(file) as again:
        assert again.done == [done(0), done(0, "candidate")]
        assert step(0, "candidate") in again
        assert step(1) not in again


@pytest.mark.parametrize("lost", range(1, 12))
def test_a_line_that_was_cut_off_is_run_again(tmp_path: Path, lost: int) -> None:
    """Wherever the power went: the block before stands, the torn one is asked again, and what is
    written next makes whole lines.
    """
    file = tmp_path / "journal.jsonl"
    with Journal(file) as journal:
        journal.add(done(0))
        whole = file.stat().st_size
        journal.add(done(1))
    size = file.stat().st_size
    os.truncate(file, whole + (size - whole) * lost // 12)
    with Journal(file) as again:
        assert again.done == [done(0)]
        again.add(done(1))
        again.add(done(2))
    with Journal(file) as third:
        assert third.done == [done(0), done(1), done(2)]


def test_a_damaged_line_is_told_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    file.write_text('{"source": "suite:s"}\n')
    with pytest.raises(JournalError, match=r"journal.jsonl:1  is no line of a journal"):
        Journal(file)


def test_two_runs_cannot_write_one_journal(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    with Journal(file), pytest.raises(JournalError, match="another run is writing it"):
        Journal(file)
    with Journal(file) as later:
        assert later.done == []


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    """The process is killed as soon as `add` has returned."""
    file = tmp_path / "journal.jsonl"
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from evals.journal import Done, Journal\n"
        "from telemetry import Observation\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "journal.add(Done('suite:s', 0, 'baseline', (Observation('a', 'suite:s', 'b', 'a'),)))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(file)], cwd=ROOT, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    with Journal(file) as again:
        assert step(0) in again
