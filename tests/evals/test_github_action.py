"""The example that gates a pull request: its YAML, its shell, and the commands that it types."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
from ruamel.yaml import YAML

from headgate import main

FILE = Path(__file__).parents[2] / "examples" / "github-actions" / "gate.yml"


def workflow() -> dict[str, Any]:
    return dict(YAML(typ="safe", pure=True).load(FILE.read_text(encoding="utf-8")))


def scripts() -> list[str]:
    return [
        step["run"] for job in workflow()["jobs"].values() for step in job["steps"] if "run" in step
    ]


def test_what_it_types_are_commands_that_exist() -> None:
    """With the options that it gives them."""
    typed = [
        line.split()
        for script in scripts()
        for line in script.splitlines()
        if line.strip().startswith("headgate ")
    ]
    assert len(typed) == 4
    for _, *words in typed:
        command: click.Command = main
        while isinstance(command, click.Group):
            found = command.get_command(click.Context(command), words.pop(0))
            assert found is not None, words
            command = found
        known = {option for one in command.params for option in one.opts}
        assert {word for word in words if word.startswith("--")} <= known


def test_its_shell_has_no_text_of_a_pull_request_in_it() -> None:
    """Names come by the environment, where the shell does not run them; and the shell is valid."""
    for script in scripts():
        assert "${{" not in script
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_it_may_read_and_comment_and_nothing_else() -> None:
    given = workflow()
    assert given["permissions"] == {"contents": "read", "pull-requests": "write"}
    assert list(given["on"]) == ["pull_request"]  # never pull_request_target, which has secrets


def test_it_finds_the_hypotheses_that_a_branch_touches(tmp_path: Path) -> None:
    """Changed ones and new ones, not others, not those that are gone."""
    if shutil.which("jq") is None or shutil.which("git") is None:
        pytest.skip("the step needs git and jq, as GitHub's runners have them")

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        done = subprocess.run(
            ["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    for name in ("old", "gone", "same"):
        (tmp_path / f"{name}.yaml").write_text("kind: Hypothesis\n")
    git("add", ".")
    git("commit", "-qm", "base")
    base = git("rev-parse", "HEAD")
    (tmp_path / "old.yaml").write_text("kind: Hypothesis\nmetadata: {name: a}\n")
    (tmp_path / "with space.yaml").write_text("kind: Hypothesis\n")
    (tmp_path / "policy.yaml").write_text("kind: Deployment\n")
    (tmp_path / "gone.yaml").unlink()
    git("add", "-A")
    git("commit", "-qm", "change")
    output = tmp_path / "output"
    subprocess.run(
        ["bash", "-c", scripts()[0]], cwd=tmp_path, check=True,
        env={"BASE": base, "GITHUB_OUTPUT": str(output), "PATH": "/usr/bin:/bin:/usr/local/bin"},
    )  # fmt: skip
    name, _, value = output.read_text().partition("=")
    assert name == "files"
    assert json.loads(value) == ["old.yaml", "with space.yaml"]
