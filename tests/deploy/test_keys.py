"""`python -m deploy.keys`: a key for each door of the stack, made once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.keys import NAMES, main, read, settled

ROOT = Path(__file__).parents[2]


def test_every_door_gets_a_key_of_its_own_that_only_its_owner_can_read(tmp_path: Path) -> None:
    """Compose and a shell read the same; a second run changes nothing."""
    file = tmp_path / ".env"
    assert main([str(file)]) == 0
    made = read(file)
    assert list(made) == list(NAMES)
    assert len(set(made.values())) == len(NAMES)
    assert all(len(key) > 40 for key in made.values())
    assert file.stat().st_mode & 0o777 == 0o600
    shell = subprocess.run(
        ["sh", "-c", f". {file}; echo $HEADGATE_KEY $HEADGATE_GRAFANA_PASSWORD"],
        capture_output=True, text=True, check=True, env={},
    )  # fmt: skip
    assert shell.stdout.split() == [made["HEADGATE_KEY"], made["HEADGATE_GRAFANA_PASSWORD"]]
    was = file.read_text()
    assert main([str(file)]) == 0
    assert file.read_text() == was


def test_what_a_file_says_already_stays(tmp_path: Path) -> None:
    """A key that somebody has given out, and other variables; whoever else could read the file
    cannot any more."""
    file = tmp_path / ".env"
    file.write_text("# mine\nHEADGATE_KEY='hg-given'\nHEADGATE_ADMIN_KEY=\nHEADGATE_PORT=9090")
    file.chmod(0o644)
    assert main([str(file)]) == 0
    assert file.read_text().startswith("# mine\nHEADGATE_KEY='hg-given'\nHEADGATE_ADMIN_KEY=\n")
    told = read(file)
    assert told["HEADGATE_KEY"] == "hg-given"
    assert told["HEADGATE_PORT"] == "9090"
    assert told["HEADGATE_ADMIN_KEY"].startswith("hg-")
    assert file.stat().st_mode & 0o777 == 0o600


def test_an_environment_that_has_all_keys_needs_no_file(tmp_path: Path) -> None:
    """It goes before the file's; an empty variable is none."""
    file = tmp_path / ".env"
    given = {name: f"hg-{at}" for at, name in enumerate(NAMES)}
    assert settled(file, given) == given
    assert not file.exists()
    partly = settled(file, given | {"HEADGATE_SECRET": ""})
    assert partly.keys() == given.keys()
    assert list(read(file)) == ["HEADGATE_SECRET"]
    assert {name for name in NAMES if partly[name] != given[name]} == {"HEADGATE_SECRET"}


def test_it_runs_with_python_alone(tmp_path: Path) -> None:
    """Whoever has containers has installed nothing: not even site-packages are looked at."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "deploy.keys", str(tmp_path / ".env")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "made HEADGATE_KEY, HEADGATE_ADMIN_KEY" in done.stdout


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=b", "b"),
        ("A=b # why", "b"),
        ("A=b#c", "b#c"),
        ("export A='b # c'", "b # c"),
        ('A="b c"  # why', "b c"),
        ("#A=b", None),
        ("A=", None),
    ],
)
def test_lines_are_read_as_compose_reads_them(line: str, value: str | None, tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(line + "\n")
    assert read(file).get("A") == value
