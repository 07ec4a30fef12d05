"""Choices by measurement: one worker measures, all others on such a machine choose alike."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from runtime import processor
from runtime.choices import MACHINES_MAX, Choices, this_machine, ways_file

MACHINE: dict[str, str | None] = {"processor": "a", "torch": "2"}
WAYS = ("one", "two")


def never() -> str:
    raise AssertionError("it was measured")


def kept(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())["machines"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "home" / "ways.json"


def test_what_was_chosen_is_chosen_again(file: Path) -> None:
    """In this process, in the next one, and for no other question or other ways."""
    first = Choices(file, MACHINE)
    assert first.make("q", WAYS, lambda: "two") == "two"
    assert first.make("q", WAYS, never) == "two"
    again = Choices(file, MACHINE)
    assert again.make("q", WAYS, never) == "two"
    assert again.make("other", WAYS, lambda: "one") == "one"
    assert again.make("q", (*WAYS, "three"), lambda: "three") == "three"
    assert Choices(file, MACHINE).make("q", WAYS, never) == "two"
    assert sorted(path.name for path in file.parent.iterdir()) == ["ways.json", "ways.lock"]


@pytest.mark.parametrize("change", [{"processor": "b"}, {"torch": "3"}, {"compiler": "g++"}])
def test_what_another_machine_has_chosen_is_not_used(file: Path, change: dict[str, str]) -> None:
    """A home may be shared: each kind has its own, and both stay."""
    Choices(file, MACHINE | change).make("q", WAYS, lambda: "one")
    assert Choices(file, MACHINE).make("q", WAYS, lambda: "two") == "two"
    assert Choices(file, MACHINE | change).make("q", WAYS, never) == "one"
    assert [entry["machine"] for entry in kept(file).values()] == [MACHINE | change, MACHINE]


def test_the_file_lies_beside_compiled_code_or_where_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fleet's machines may be given one file."""
    monkeypatch.delenv("HEADGATE_WAYS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ways_file() == tmp_path / "headgate" / "native" / "ways.json"
    monkeypatch.setenv("HEADGATE_WAYS", "/etc/headgate/ways.json")
    assert ways_file() == Path("/etc/headgate/ways.json")


def test_kinds_of_machines_that_nobody_asks_for_any_more_go(file: Path) -> None:
    for number in range(MACHINES_MAX + 2):
        Choices(file, {"processor": str(number)}).make("q", WAYS, lambda: "one")
    names = [entry["machine"]["processor"] for entry in kept(file).values()]
    assert names == [str(number) for number in range(2, MACHINES_MAX + 2)]


BAD = {
    "empty": b"",
    "cut": b'{"headgate_ways": 1, "machines": {',
    "no text": b"\xff\xfe\x00",
    "nested": b"[" * 100_000,
    "a list": b"[1]",
    "another program's": b'{"version": 3, "machines": {}}',
    "a later format": b'{"headgate_ways": 2, "machines": {}}',
    "no machines": b'{"headgate_ways": 1, "machines": 7}',
    "an odd machine": b'{"headgate_ways": 1, "machines": {"x": {"chosen": 7}}}',
    "huge": b" " * (2**22 + 1),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_file_that_is_not_ours_is_measured_again_and_said_so(
    file: Path, bad: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And is a good one afterwards."""
    file.parent.mkdir()
    file.write_bytes(BAD[bad])
    assert Choices(file, MACHINE).make("q", WAYS, lambda: "two") == "two"
    (told,) = [one for one in caplog.messages if "measured again" in one]
    assert told.startswith(f"{file} is not believed (")
    assert Choices(file, MACHINE).make("q", WAYS, never) == "two"


@pytest.mark.parametrize("odd", ["three", None, 7, ["one"], {"one": 1}])
def test_an_answer_that_is_none_is_measured_again(
    file: Path, odd: object, caplog: pytest.LogCaptureFixture
) -> None:
    Choices(file, MACHINE).make("q", WAYS, lambda: "one")
    text = json.loads(file.read_text())
    (entry,) = text["machines"].values()
    (name,) = entry["chosen"]
    entry["chosen"][name] = odd
    file.write_text(json.dumps(text))
    assert Choices(file, MACHINE).make("q", WAYS, lambda: "two") == "two"
    assert ("is none of the ways" in caplog.text) == (odd is not None)
    assert Choices(file, MACHINE).make("q", WAYS, never) == "two"


def test_where_nothing_can_be_kept_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A read-only home is no reason not to serve; within a process choices stand nevertheless."""
    blocked = tmp_path / "a-file"
    blocked.write_bytes(b"")
    choices = Choices(blocked / "ways.json", MACHINE)
    assert choices.make("q", WAYS, lambda: "two") == "two"
    assert choices.make("other", WAYS, lambda: "one") == "one"
    assert choices.make("q", WAYS, never) == "two"
    (told,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "another start may choose otherwise" in told.getMessage()


def test_what_stands_in_a_home_that_nobody_can_write_to_is_believed(file: Path) -> None:
    """A fleet's images may carry one file for all."""
    Choices(file, MACHINE).make("q", WAYS, lambda: "two")
    lock = file.with_suffix(".lock")
    lock.unlink()
    lock.mkdir()
    assert Choices(file, MACHINE).make("q", WAYS, never) == "two"
    assert Choices(file, MACHINE).make("other", WAYS, lambda: "one") == "one"
    assert len(next(iter(kept(file).values()))["chosen"]) == 1


def test_a_process_that_does_not_end_its_turn_is_not_waited_for(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is measured here, and not kept, as whoever has the turn may have begun to write."""
    file.parent.mkdir()
    with file.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert Choices(file, MACHINE, wait_s=0).make("q", WAYS, lambda: "two") == "two"
    assert "another process has" in caplog.text
    assert not file.exists()
    assert Choices(file, MACHINE, wait_s=0).make("q", WAYS, lambda: "one") == "one"


def test_a_full_disk_costs_one_measurement_and_not_two(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    measured = iter(["two"])
    monkeypatch.setattr(os, "fsync", full)
    assert Choices(file, MACHINE).make("q", WAYS, lambda: next(measured)) == "two"
    assert not file.exists()


CONTENDER = """\
import sys
from pathlib import Path
from runtime.choices import Choices
choices = Choices(Path(sys.argv[1]), {"processor": "a"})
among = [str(number) for number in range(6)]
found = []
print("ready", flush=True)
sys.stdin.readline()
for question in "abcdefgh":
    def measure():
        print("measured", question, flush=True)
        return sys.argv[2]
    found.append(choices.make(question, among, measure))
print("found", *found, flush=True)
"""


@pytest.fixture
def contenders(file: Path) -> Iterator[list[subprocess.Popen[str]]]:
    with ExitStack() as stop:
        yield [
            stop.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", CONTENDER, str(file), str(number)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
                )
            )
            for number in range(6)
        ]


@pytest.mark.parametrize("before", [None, b"{"])
def test_all_that_choose_at_once_choose_alike(
    file: Path, contenders: list[subprocess.Popen[str]], before: bytes | None
) -> None:
    """Each would choose itself. Whoever comes first measures, alone, also where a file is cut."""
    if before is not None:
        file.parent.mkdir()
        file.write_bytes(before)
    lines: list[list[str]] = []
    for one in contenders:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in contenders:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    for one in contenders:
        said, _ = one.communicate()
        assert one.returncode == 0
        lines += [line.split() for line in said.splitlines()]
    found = [line[1:] for line in lines if line[0] == "found"]
    assert len(found) == 6
    assert len(set(map(tuple, found))) == 1
    assert sorted(line[1] for line in lines if line[0] == "measured") == list("abcdefgh")


def test_a_machine_is_its_processor_torch_and_what_measures() -> None:
    """Not the kernel's mitigations, which come and go with its updates; nor a compiler that is not
    asked."""
    plain, compiles = this_machine(compiles=False), this_machine(compiles=True)
    assert plain == this_machine(compiles=False)
    assert plain["compiler"] is None
    assert plain | {"compiler": None} == compiles | {"compiler": None}
    assert plain["processor"]
    assert plain["torch"]


CPUINFO = """\
processor\t: 0
model name\t: Some CPU @ 2.50GHz
flags\t\t: fpu md_clear {more} sse4_1 avx2 ssse3 avx512_vnni fma
"""


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (processor.name, "Some CPU @ 2.50GHz"),
        (processor.features, "avx2 avx512_vnni fma sse4_1 ssse3"),
    ],
)
def test_a_processor_is_what_it_computes_with(
    read: Callable[[], str], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for more in ("", "ibrs stibp"):
        text = CPUINFO.format(more=more)
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text: text)
        assert read() == value
