"""Code that models wrote: right where its tests hold, and unable to do anything else."""

from __future__ import annotations

import asyncio
import gzip
import json
import platform
import sys
from pathlib import Path

import pytest

from evals.dataset import Suite
from evals.item import Item
from evals.scorers import score
from evals.scorers.code import program
from evals.scorers.jail import filter_for
from evals.scorers.sandbox import Limits, run_python, try_sandbox
from policies.suite import Scorer
from telemetry import Observation

HUMANEVAL = Path(__file__).parents[3] / "shared" / "data" / "evals" / "humaneval.jsonl.gz"
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="code is held in on Linux only",
)
LIMITS = Limits(seconds=5, memory_bytes=256 * 2**20)


def runs(source: str, limits: Limits = LIMITS) -> tuple[bool, str]:
    ran = asyncio.run(run_python(source, limits))
    return ran.passed, ran.said


def test_what_runs_to_its_end_passes() -> None:
    assert runs("import math\nassert math.gcd(12, 18) == 6") == (True, "")
    passed, said = runs("assert 1 == 2, 'no'")
    assert not passed
    assert said.rstrip().endswith("AssertionError: no")


@pytest.mark.parametrize("source", ["import sys; sys.exit(0)", "import os; os._exit(0)"])
def test_an_early_end_is_no_success(source: str) -> None:
    assert not runs(source + "\nassert False")[0]


@pytest.mark.parametrize(
    "source",
    [
        "import socket; socket.socket()",
        "import socket; socket.socketpair()",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.kill(os.getppid(), 0)",
        "open({here!r}, 'w')",
        "open({here!r}, 'a')",
        "import os; os.open({here!r}, os.O_RDWR)",
        "import os; os.remove({here!r})",
        "import os; os.rename({here!r}, {here!r} + '2')",
        "import os; os.chmod({here!r}, 0o777)",
        "import os; os.truncate({here!r}, 0)",
        "import os; os.mkdir({here!r} + '3')",
        "import os; os.symlink('/', {here!r} + '4')",
        "import os; os.utime({here!r})",
        "import tempfile; tempfile.TemporaryFile()",
    ],
)
def test_the_world_is_out_of_reach(source: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.write_text("as it was")
    passed, said = runs(source.format(here=str(here)))
    assert not passed
    assert "not permitted" in said or "No usable temporary" in said
    assert [one.name for one in tmp_path.iterdir()] == ["here"]
    assert here.read_text() == "as it was"


def test_sockets_are_out_of_reach_for_machine_code_too() -> None:
    """The filter is the kernel's: going past Python's modules changes nothing."""
    source = "import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) == -1"
    assert runs(source)[0]


def test_code_is_not_run_where_it_cannot_be_held_in() -> None:
    """Too little memory even for the filter: nothing of the program runs."""
    try_sandbox()
    passed, said = runs("open('/dev/null', 'w')", Limits(1, 2**20))
    assert not passed
    assert "answer.py" not in said


def test_time_and_memory_have_an_end() -> None:
    assert not runs("while True: pass", Limits(1, 256 * 2**20))[0]
    passed, said = runs("x = 'a' * 10**9")
    assert not passed
    assert "MemoryError" in said


def test_the_filter_is_for_machines_that_it_was_written_for() -> None:
    assert len(filter_for("x86_64")) % 8 == 0
    assert len(filter_for("aarch64")) // 8 < 4096  # as the kernel takes at most
    with pytest.raises(KeyError):
        filter_for("vax")


def test_code_is_taken_from_its_fence_or_as_it_is() -> None:
    scorer = Scorer(kind="code")
    item = Item("a", "a", 0, {}, "def check(f):\n    assert f(1) == 2", meta={"entry_point": "f"})
    fenced = program(scorer, item, "Sure:\n```python\ndef f(x):\n    return x + 1\n```\nDone.")
    assert "Sure" not in fenced
    assert runs(fenced)[0]
    meta = {"entry_point": "f", "prefix": "def f(x):\n"}
    begun = Item("a", "a", 0, {}, item.expected, meta=meta)
    assert runs(program(scorer, begun, "    return x + 1"))[0]
    assert not runs(program(scorer, begun, "    return x"))[0]


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="the shared eval files are not here")
def test_humanevals_own_solutions_pass_and_others_do_not() -> None:
    with gzip.open(HUMANEVAL, "rt") as lines:
        rows = [json.loads(line) for line in lines][:12]

    async def passed(row: dict[str, str], text: str) -> float:
        meta = {"entry_point": row["entry_point"], "prefix": row["prompt"]}
        item = Item("a", "a", 0, {}, row["test"], meta=meta)
        suite = Suite("s", (item,), (Scorer(kind="code"),))
        seen = Observation("a", "suite:s", "baseline", "a", text=text)
        return (await score(suite, item, seen))["correct"]

    async def all_passed() -> tuple[list[float], list[float]]:
        right = [await passed(row, row["canonical_solution"]) for row in rows]
        wrong = [await passed(row, "    return None\n") for row in rows]
        return right, wrong

    right, wrong = asyncio.run(all_passed())
    assert right == [1.0] * len(rows)
    assert wrong == [0.0] * len(rows)
